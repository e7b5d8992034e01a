"""Exports say what the plan says, in words that the tools accept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from gpuplan.errors import InputError
from gpuplan.export import EXPORTS, nvidia_smi, reading
from gpuplan.export.lint import lint, promql
from gpuplan.hardware import mig
from gpuplan.hardware.catalog import gpu

from .plans import MANY, QUICKSTART, planned, planned_of

A100 = gpu("a100-80gb")


def plan(*profiles: str, count: int = 1) -> dict[str, Any]:
    placed = mig.place(A100, profiles) if profiles != ("whole",) else [mig.Placement(mig.whole(A100), 0)]
    placements = [
        {"card": card, "profile": p.profile.name, "start": p.start, "width": p.profile.width, "model": None}
        for card in range(count)
        for p in placed
    ]
    layout = {"gpu": A100.name, "profiles": list(profiles), "count": count, "placements": placements}
    return {"scenario": "s", "mig": {"layouts": [layout]}, "replicas": []}


def test_mig_parted_counts_profiles_on_its_devices() -> None:
    config = yaml.safe_load(EXPORTS["mig-parted"].write(plan("3g.40gb", "1g.10gb", "1g.10gb", count=2)))
    assert config == {
        "version": "v1",
        "mig-configs": {
            "gpuplan": [{"devices": [0, 1], "mig-enabled": True, "mig-devices": {"3g.40gb": 1, "1g.10gb": 2}}]
        },
    }


def test_an_uncut_card_has_mig_off() -> None:
    config = yaml.safe_load(EXPORTS["mig-parted"].write(plan("whole")))
    assert config["mig-configs"]["gpuplan"] == [{"devices": [0], "mig-enabled": False}]
    assert EXPORTS["nvidia-smi"].write(plan("whole")).splitlines()[-1] == "nvidia-smi -i 0 -mig 0"


def test_nvidia_smi_creates_each_slice_at_its_place() -> None:
    script = EXPORTS["nvidia-smi"].write(plan("4g.40gb", "2g.20gb", "1g.10gb", count=2))
    creations = [line for line in script.splitlines() if "-cgi" in line]
    assert creations == [f"nvidia-smi mig -i {i} -cgi 4g.40gb:0,2g.20gb:4,1g.10gb:6 -C" for i in (0, 1)]


@pytest.mark.parametrize("name", ["mig-parted", "nvidia-smi", "gpu-operator"])
def test_a_plan_for_the_cpu_has_nothing_to_cut(name: str) -> None:
    with pytest.raises(InputError, match="no GPU to cut"):
        EXPORTS[name].write({"scenario": "s", "mig": {"layouts": []}})


@pytest.mark.parametrize("name", ["vllm", "kserve"])
def test_a_plan_for_the_cpu_has_no_slice_to_serve_on(name: str) -> None:
    with pytest.raises(InputError, match="no GPU for its models"):
        EXPORTS[name].write(planned_of({"mood": {"role": "classifier"}}, gpu=False))


@pytest.mark.parametrize("name", ["hpa", "keda"])
def test_a_plan_without_thresholds_scales_nothing(name: str) -> None:
    with pytest.raises(InputError, match="no autoscale thresholds"):
        EXPORTS[name].write(QUICKSTART | {"autoscale": {}}, "vllm")
    with pytest.raises(InputError, match="unknown source of metrics"):
        EXPORTS[name].write(QUICKSTART, "vlm")


def test_what_is_no_profile_reaches_no_command() -> None:
    bad = plan("3g.40gb")
    bad["mig"]["layouts"][0]["placements"][0]["profile"] = "3g.40gb; reboot"
    for name in ("mig-parted", "nvidia-smi", "gpu-operator"):
        with pytest.raises(InputError, match="no name of a MIG profile"):
            EXPORTS[name].write(bad)


def test_every_file_says_what_is_the_plan_s_and_what_to_fill_in() -> None:
    for name, form in EXPORTS.items():
        text = form.write(QUICKSTART, "vllm") if form.takes_metrics else form.write(QUICKSTART)
        assert "# From the plan: " in text and "# Fill in: " in text, name


def test_the_undo_clears_a_card_before_its_mode_goes() -> None:
    """An instance keeps MIG mode on: the driver refuses the other order."""
    lines = [line for line in nvidia_smi.undo(plan("3g.40gb")).splitlines() if line.startswith("nvidia-smi")]
    assert lines == [
        "nvidia-smi mig -i 0 -dci || true",
        "nvidia-smi mig -i 0 -dgi || true",
        "nvidia-smi -i 0 -mig 0",
    ]


def test_mig_parted_s_rules_hold() -> None:
    """Those of its `UnmarshalJSON` (api/spec/v1/spec.go) and of the files that NVIDIA gives as examples."""
    texts = [EXPORTS["mig-parted"].write(plan(*profiles)) for profiles in (("whole",), ("3g.40gb", "1g.10gb+me"))]
    texts.append(yaml.safe_load(EXPORTS["gpu-operator"].write(QUICKSTART))["data"]["config.yaml"])
    for text in texts:
        config = yaml.safe_load(text)
        assert config.keys() == {"version", "mig-configs"} and config["version"] == "v1"
        for devices in config["mig-configs"].values():
            for device in devices:
                assert {"devices", "mig-enabled"} <= device.keys() <= {"devices", "mig-enabled", "mig-devices"}
                assert device["devices"] == "all" or all(isinstance(i, int) for i in device["devices"])
                assert bool(device.get("mig-devices")) == device["mig-enabled"]


def test_the_gpu_operator_finds_its_default_and_ours() -> None:
    document = yaml.safe_load(EXPORTS["gpu-operator"].write(QUICKSTART))
    configs = yaml.safe_load(document["data"]["config.yaml"])["mig-configs"]
    assert configs.keys() == {"all-disabled", "gpuplan"}
    assert configs["gpuplan"][0]["mig-devices"] == {"4g.40gb": 1, "2g.20gb": 1, "1g.10gb": 1}


def test_vllm_gets_the_plan_s_limits_and_a_slice_each() -> None:
    script = EXPORTS["vllm"].write(planned(chat={"max_batch_size": 4096, "processes": 2}, mood={"role": "classifier"}))
    served = [line for line in script.splitlines() if line.startswith("vllm serve")]
    assert served == [
        f'vllm serve "$CHAT_WEIGHTS" --port {port} --served-model-name=chat --max-num-seqs=4096 '
        "--max-num-batched-tokens=4096 --tensor-parallel-size=1 --gpu-memory-utilization=0.45 &"
        for port in (8000, 8001)
    ], "vLLM refuses fewer tokens than sequences; two processes share the slice's memory"
    assert script.count('CUDA_VISIBLE_DEVICES="$GPU_0_4G_40GB_AT_0"') == 2
    with pytest.raises(InputError, match="no model that generates tokens"):
        EXPORTS["vllm"].write(planned(mood={"role": "classifier"}))


def test_a_pod_asks_for_the_slice_by_the_device_plugin_s_name() -> None:
    assert reading.resource("whole") == "nvidia.com/gpu"
    assert reading.resource("1g.10gb+me") == "nvidia.com/mig-1g.10gb.me"
    chat, mood = yaml.safe_load_all(EXPORTS["kserve"].write(QUICKSTART))
    assert chat["spec"]["predictor"]["model"]["resources"]["limits"] == {"nvidia.com/mig-4g.40gb": "1"}
    assert "--max-num-seqs=32" in chat["spec"]["predictor"]["model"]["args"]
    assert mood["spec"]["predictor"]["model"]["modelFormat"] == {"name": "triton"}


def test_an_hpa_s_numbers_are_the_plan_s() -> None:
    text = EXPORTS["hpa"].write(QUICKSTART, "vllm")
    chat, mood = yaml.safe_load_all(text)
    targets = [m["external"]["target"]["averageValue"] for m in chat["spec"]["metrics"]]
    assert targets == ["260m", "1"]
    assert mood["spec"]["metrics"][0]["external"]["target"]["averageValue"] == "9200m"
    assert chat["spec"]["behavior"]["scaleDown"] == {
        "stabilizationWindowSeconds": 300,
        "policies": [{"type": "Pods", "value": 1, "periodSeconds": 45}],
    }
    adapter = yaml.safe_load("\n".join(line[4:] for line in text.splitlines() if line.startswith("#   ")))
    names = [rule["name"]["as"] for rule in adapter["rules"]["external"]]
    wanted = [m["external"]["metric"]["name"] for hpa in (chat, mood) for m in hpa["spec"]["metrics"]]
    assert names == wanted, "every metric that is asked for is one that the adapter is told to make"


def test_times_beyond_what_the_api_server_takes_are_cut_to_it() -> None:
    long = planned(chat={"cooldown_s": 7200.0, "stabilization_window_s": 14400.0})
    (hpa,) = yaml.safe_load_all(EXPORTS["hpa"].write(long, "gpuplan"))
    down = hpa["spec"]["behavior"]["scaleDown"]
    assert (down["stabilizationWindowSeconds"], down["policies"][0]["periodSeconds"]) == (3600, 1800)


@pytest.mark.parametrize(
    ("source", "series"),
    [
        ("gpuplan", 'gpuplan_requests_waiting{model="moderator"}'),
        ("vllm", 'vllm:num_requests_waiting{model_name="moderator"}'),
        ("triton", 'nv_inference_pending_request_count{model="moderator"}'),
    ],
)
def test_keda_s_queries_give_one_element(source: str, series: str) -> None:
    *_, mood = yaml.safe_load_all(EXPORTS["keda"].write(QUICKSTART, source))
    waiting, held = (trigger["metadata"]["query"] for trigger in mood["spec"]["triggers"])
    assert waiting == f"sum(avg_over_time({series}[1m]))"
    assert held == f"count({series}) * (avg(avg_over_time({series}[1m])) > bool 0.01)"
    assert all(promql.read(query).apart == frozenset() for query in (waiting, held))  # type: ignore[union-attr]


def test_a_decoder_s_queue_does_not_show_in_triton() -> None:
    """Its vLLM backend takes every request at once."""
    assert len(list(yaml.safe_load_all(EXPORTS["keda"].write(QUICKSTART, "triton")))) == 1
    with pytest.raises(InputError, match="no model's queue shows there"):
        EXPORTS["keda"].write(planned(chat={}), "triton")


def test_what_an_export_writes_its_linter_accepts(tmp_path: Path) -> None:
    for name in ("hpa", "keda"):
        for source in ("gpuplan", "vllm", "triton"):
            file = tmp_path / f"{name}.yaml"
            file.write_text(EXPORTS[name].write(MANY, source))
            assert lint(file) == []


def test_ray_counts_what_runs_and_what_waits() -> None:
    apps = yaml.safe_load(EXPORTS["ray-serve"].write(QUICKSTART))["applications"]
    chat = apps[0]["args"]["llm_configs"][0]["deployment_config"]
    assert chat["autoscaling_config"]["target_ongoing_requests"] == 32.26
    assert chat["max_ongoing_requests"] > 32.26
    assert apps[1]["deployments"][0]["ray_actor_options"] == {"num_gpus": 1.0}


def test_compose_has_a_service_for_each_process_and_a_port_for_each_service() -> None:
    services = yaml.safe_load(EXPORTS["compose"].write(planned(chat={"processes": 2}, mood={"role": "classifier"})))
    assert list(services["services"]) == ["chat-0-0", "chat-0-1", "mood-0"]
    assert len({service["ports"][0] for service in services["services"].values()}) == 3
    devices = services["services"]["mood-0"]["deploy"]["resources"]["reservations"]["devices"][0]["device_ids"]
    assert devices == ["${GPU_0_2G_20GB_AT_4:?MIG UUID from nvidia-smi -L}"]


def test_a_plan_from_before_plans_told_roles_is_exported_too() -> None:
    old = {key: value for key, value in QUICKSTART.items() if key != "models"}
    assert EXPORTS["vllm"].write(old).count("vllm serve") == 2
    assert "dynamic_batching" in EXPORTS["triton"].write(old)
