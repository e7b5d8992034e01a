"""ONNX files: what a model folder needs, and that the provider asked for is the one that runs."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models, pre_tokenizers

from gpuplan.errors import GpuplanError
from gpuplan.hardware import catalog, mig
from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.vocabulary import Prefill, RunStep
from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.serve.engines import Engine, Prompt
from gpuplan.serve.engines.session import CUDA_PROVIDER, EngineSpec
from gpuplan.serve.engines.single_step import SingleStepEngine
from gpuplan.serve.models import engine_for
from gpuplan.serve.worker import WorkerProcess
from gpuplan.telemetry.nvml import Card, Instance, discover

WORDS = {"[UNK]": 0, "good": 1, "bad": 2, "nothing": 3}


def model_folder(folder: Path, scores: list[list[float]]) -> Path:
    """A model that adds up a row of scores for each word, with its tokenizer and its labels."""
    table = numpy_helper.from_array(np.array(scores, dtype=np.float32), "table")
    axis = numpy_helper.from_array(np.array([1]), "axis")
    graph = helper.make_graph(
        [
            helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
            helper.make_node("ReduceSum", ["rows", "axis"], ["logits"], keepdims=0),
        ],
        "votes",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        [table, axis],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    (folder / "model.onnx").write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(models.WordLevel(WORDS, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"id2label": {"1": "yes", "0": "no"}}))
    return folder / "model.onnx"


def engine(file: Path, gpu: str = "cpu", **options: bool) -> Engine:
    data = {"name": "m", "models": {"m": {"onnx": str(file)}}, "deployment": {"gpu": gpu}}
    supply = deployment.resolve(build(data, Scenario))
    return engine_for(supply.replicas[0], supply, **options)


def answers(engine: Engine, *texts: str) -> list[tuple[str, str | None]]:
    async def main() -> list[tuple[str, str | None]]:
        await engine.load()
        prompts = {i: Prompt(text, engine.tokenize(text)) for i, text in enumerate(texts)}
        prefills = tuple(Prefill(i, len(p.token_ids), True) for i, p in prompts.items())
        step = RunStep("m-0", 1, prefills, (), StepLoad(0, 0, 0, 0, len(texts)), 0)
        outputs = await engine.run(step, prompts, asked_s=0.0)
        await engine.close()
        return [(outputs[i].text, outputs[i].error) for i in range(len(texts))]

    return asyncio.run(main())


def test_a_file_answers_with_its_own_tokenizer_and_labels(tmp_path: Path) -> None:
    file = model_folder(tmp_path, [[0, 0], [0, 1], [1, 0], [0, 0]])
    assert answers(engine(file), "good good bad", "bad", "good") == [("yes", None), ("no", None), ("yes", None)]


def test_a_nan_is_an_error_of_its_request_alone(tmp_path: Path) -> None:
    file = model_folder(tmp_path, [[0, 0], [0, 1], [1, 0], [float("nan"), 0]])
    assert answers(engine(file), "good", "nothing", "bad") == [("yes", None), ("", "nan_output"), ("no", None)]


def test_a_file_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    file = model_folder(tmp_path, [[0, 0]] * 4)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(GpuplanError, match=r"no such file .*tokenizer\.json beside"):
        engine(file)


def test_what_is_no_model_is_refused_in_one_line(tmp_path: Path) -> None:
    file = model_folder(tmp_path, [[0, 0]] * 4)
    file.write_bytes(b"not a protobuf")
    with pytest.raises(GpuplanError, match="cannot load the model") as refused:
        answers(engine(file), "good")
    assert "\n" not in str(refused.value)


def test_a_card_that_is_not_here_is_never_replaced_in_silence(tmp_path: Path) -> None:
    file = model_folder(tmp_path, [[0, 0], [0, 1], [1, 0], [0, 0]])
    with pytest.raises(GpuplanError, match="there is no a100-80gb in this machine"):
        engine(file, "a100-80gb")
    allowed = engine(file, "a100-80gb", allow_cpu=True)
    assert allowed.provenance == "cpu"
    assert answers(allowed, "good") == [("yes", None)]


@pytest.mark.skipif(bool(discover()), reason="there is a card here")
def test_cuda_asked_for_and_not_there_does_not_run_on_the_cpu(tmp_path: Path) -> None:
    file = model_folder(tmp_path, [[0, 0], [0, 1], [1, 0], [0, 0]])
    wants_cuda = SingleStepEngine(EngineSpec(source=str(file), role="classifier", provider=CUDA_PROVIDER))
    with pytest.raises(GpuplanError, match="CUDAExecutionProvider"):
        wants_cuda.load()


def card(*instances: Instance, mig_enabled: bool = True) -> Card:
    return Card(0, "NVIDIA A100-SXM4-80GB", "GPU-1", 80 << 30, mig_enabled, "a100-80gb", instances=instances)


def instance(name: str, start: int | None, uuid: str | None) -> Instance:
    part = mig.profile(catalog.gpu("a100-80gb"), name)
    return Instance(part, start, part.width, 1, uuid)


CUT = {"gpu": "a100-80gb", "mig": ["3g.40gb", "1g.10gb", "1g.10gb"]}


@pytest.mark.parametrize(
    ("cards", "slice_name", "devices"),
    [
        ([], "1g.10gb", [None, None]),  # emulated
        ([card(mig_enabled=False)], "1g.10gb", [None, None]),  # the whole card is never passed off as a slice
        ([card(instance("3g.40gb", 0, "MIG-a"))], "1g.10gb", [None, None]),  # the card is not cut like that
        ([card(instance("1g.10gb", 2, "MIG-a"), instance("1g.10gb", 3, "MIG-b"))], "1g.10gb", ["MIG-b", "MIG-a"]),
        ([card(instance("1g.10gb", None, "MIG-c"), instance("1g.10gb", None, "MIG-d"))], "1g.10gb", ["MIG-c", "MIG-d"]),
        ([card(instance("1g.10gb", 3, None), instance("1g.10gb", 2, "MIG-b"))], "1g.10gb", [None, "MIG-b"]),  # no CI
        ([card(mig_enabled=False)], "whole", ["GPU-1"]),
        ([card()], "whole", [None]),  # MIG is on: nothing runs on the uncut card
    ],
)
def test_every_replica_sees_its_own_slice(cards: list[Card], slice_name: str, devices: list[str | None]) -> None:
    cut = {**CUT, "replicas": [{"model": "m", "slice": slice_name, "count": len(devices)}]}
    if slice_name == "whole":
        cut["mig"] = []
    supply = deployment.resolve(
        build({"name": "m", "models": {"m": {"builtin": "sentiment"}}, "deployment": cut}, Scenario)
    )
    engines = [engine_for(replica, supply, cards=cards) for replica in supply.replicas]
    assert [e.spec.device if isinstance(e, WorkerProcess) else None for e in engines] == devices
    assert [e.provenance for e in engines] == ["hardware" if device else "emulated" for device in devices]


def test_a_file_for_a_slice_that_is_not_cut_is_refused(tmp_path: Path) -> None:
    source = {"onnx": str(model_folder(tmp_path, [[0.0, 0.0]] * len(WORDS)))}
    cut = {"gpu": "a100-80gb", "mig": ["3g.40gb"]}
    supply = deployment.resolve(build({"name": "m", "models": {"m": source}, "deployment": cut}, Scenario))
    with pytest.raises(GpuplanError, match=r"no 3g\.40gb is cut here"):
        engine_for(supply.replicas[0], supply, cards=[card(mig_enabled=False)])
