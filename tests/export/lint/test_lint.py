"""Files that do not do what their owners think, each with the one finding that it should get."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gpuplan.errors import InputError
from gpuplan.export.lint import lint

RUNNING = 'sum(vllm:num_requests_running{model_name="chat"})'
RESOURCE = {
    "type": "Resource",
    "resource": {"name": "nvidia.com/gpu", "target": {"type": "Utilization", "averageUtilization": 75}},
}
DOWN = {"scaleDown": {"stabilizationWindowSeconds": 300}}


def trigger(query: str = RUNNING, threshold: object = "16", **more: Any) -> dict[str, Any]:
    told = {"serverAddress": "http://p:9090", "query": query, "threshold": threshold, "ignoreNullValues": "false"}
    kind = {"metricType": more.pop("metricType")} if "metricType" in more else {}
    return {"type": "prometheus", **kind, "metadata": {**told, **more}}


def keda(*triggers: dict[str, Any], **spec: Any) -> dict[str, Any]:
    usual = {"scaleTargetRef": {"name": "chat"}, "minReplicaCount": 1, "maxReplicaCount": 8}
    return {
        "apiVersion": "keda.sh/v1alpha1",
        "kind": "ScaledObject",
        "metadata": {"name": "chat"},
        "spec": {**usual, **spec, "triggers": list(triggers) or [trigger()]},
    }


def hpa(metric: str = "vllm_num_requests_running", target: object = "16", **spec: Any) -> dict[str, Any]:
    pods = {"metric": {"name": metric}, "target": {"type": "AverageValue", "averageValue": target}}
    usual = {
        "scaleTargetRef": {"apiVersion": "apps/v1", "kind": "Deployment", "name": "chat"},
        "minReplicas": 1,
        "maxReplicas": 8,
        "metrics": [{"type": "Pods", "pods": pods}],
    }
    return {
        "apiVersion": "autoscaling/v2",
        "kind": "HorizontalPodAutoscaler",
        "metadata": {"name": "chat"},
        "spec": usual | spec,
    }


def found(tmp_path: Path, *documents: object) -> list[Any]:
    file = tmp_path / "scaler.yaml"
    file.write_text(yaml.safe_dump_all(documents, sort_keys=False))
    return lint(file)


BAD = [
    # A target that the metric can never reach.
    (hpa("vllm_kv_cache_usage_perc", "80"), "metrics[0].pods.target.averageValue", "never more than 1"),
    (hpa("vllm:kv_cache_usage_perc", "950m"), "averageValue", "replicas are added only above 1.045"),
    (hpa("DCGM_FI_DEV_GPU_UTIL", "95"), "averageValue", "never more than 100"),
    (keda(trigger("sum(DCGM_FI_PROF_SM_ACTIVE)", "70")), "metadata.threshold", "never more than 1"),
    (keda(trigger("sum(vllm:kv_cache_usage_perc) * 100", "95")), "metadata.threshold", "never more than 100"),
    (hpa("DCGM_FI_DEV_FB_USED", "60000"), "averageValue", "take their KV cache at start"),
    (hpa(target="lots"), "averageValue", "not a target"),
    (hpa(metrics=[RESOURCE]), "resource.target.averageUtilization", "knows only cpu and memory"),
    # A query that gives several elements, or one that means something else.
    (keda(trigger('vllm:num_requests_running{model_name="chat"}')), "metadata.query", "one for each pod"),
    (keda(trigger("sum by (pod) (vllm:num_requests_running)")), "metadata.query", "one for each pod"),
    (keda(trigger("avg(vllm:num_requests_running)")), "metadata.query", "divides it by the replicas once more"),
    (keda(trigger(metricType="Value")), "metadata.query", "a sum grows with the replicas"),
    (keda(trigger("sum(vllm:request_success_total)")), "metadata.query", "is a counter and only rises"),
    (keda(trigger(ignoreNullValues="true")), "ignoreNullValues", "counts as 0"),
    # A cool-down that does not do what its owner thinks.
    (keda(cooldownPeriod=600), "spec.cooldownPeriod", "before the step to zero alone"),
    (keda(cooldownPeriod=600, minReplicaCount=0), "spec.cooldownPeriod", "for the last replica alone"),
    (keda(pollingInterval=5), "spec.pollingInterval", "for the step from zero alone"),
    (keda(trigger(activationThreshold="3")), "activationThreshold", "between zero and one replica alone"),
    (hpa(behavior={"scaleDown": {"stabilizationWindowSeconds": 0}}), "stabilizationWindowSeconds", "a moment's lull"),
    (hpa(behavior={"scaleDown": {"selectPolicy": "Disabled"}}), "selectPolicy", "no replica is ever removed"),
    (hpa(behavior={"scaleUp": {"selectPolicy": "Disabled"}}), "selectPolicy", "no replica is ever added"),
    (hpa(behavior={"scaleUp": {"stabilizationWindowSeconds": 600}}), "stabilizationWindowSeconds", "so many seconds"),
    (
        hpa(
            behavior={
                "scaleDown": {
                    "policies": [
                        {"type": "Pods", "value": 1, "periodSeconds": 600},
                        {"type": "Percent", "value": 100, "periodSeconds": 15},
                    ]
                }
            }
        ),
        "scaleDown.selectPolicy",
        "the one that removes most counts",
    ),
    # Thresholds that make N replicas and N-1 take turns.
    (hpa("vllm_num_requests_waiting", "5", minReplicas=2), "averageValue", "3 replicas go to 2 when no more than 10"),
    (hpa("nv_inference_pending_request_count", "5"), "averageValue", "2 replicas go to 1"),
    (keda(trigger("sum(vllm:num_requests_waiting)", "5")), "metadata.threshold", "2.5 each"),
    (
        keda(trigger(activationThreshold="20"), minReplicaCount=0),
        "activationThreshold",
        "KEDA removes what the HPA needs",
    ),
    # What the API server refuses, or never uses.
    (hpa() | {"apiVersion": "autoscaling/v2beta2"}, "apiVersion", "no longer served"),
    (hpa(minReplicas=4, maxReplicas=2), "spec.maxReplicas", "less than spec.minReplicas"),
    (hpa(minReplicas=2, maxReplicas=2), "spec.maxReplicas", "nothing is ever scaled"),
    (hpa(metrics=[]), "spec.metrics", "nothing says when"),
    (hpa(behavior={"scaleDown": {"stabilizationWindowSeconds": 7200}}), "stabilizationWindowSeconds", "refuses"),
    (keda(idleReplicaCount=1, minReplicaCount=2), "spec.idleReplicaCount", "only 0"),
]


@pytest.mark.parametrize(("document", "key", "why"), BAD, ids=[f"{i}-{b[2][:30]}" for i, b in enumerate(BAD)])
def test_each_gets_its_one_finding(document: dict[str, Any], key: str, why: str, tmp_path: Path) -> None:
    (finding,) = found(tmp_path, document)
    assert finding.key.endswith(key) and why in finding.why
    assert finding.line and finding.do
    assert str(finding).startswith(f"{tmp_path}/scaler.yaml:{finding.line}: ") and "\n" not in str(finding)


GOOD = [
    hpa(),
    hpa(behavior=DOWN),
    hpa("vllm_kv_cache_usage_perc", "700m"),
    keda(),
    keda(minReplicaCount=0, cooldownPeriod=300),
    keda(trigger("sum(vllm:num_requests_waiting)", "5"), trigger()),  # the second falls only with the load
    keda(trigger("avg(vllm:kv_cache_usage_perc)", "0.7", metricType="Value")),
    keda(trigger("sum(rate(vllm:request_success_total[1m]))", "3")),
    keda({"type": "cpu", "metricType": "Utilization", "metadata": {"value": "60"}}),
    keda({"type": "redis", "metadata": {"listName": "jobs", "listLength": "5"}}),
    keda(trigger("{{ what is this }}")),
    keda(  # a formula with a target of its own
        trigger("sum(vllm:num_requests_waiting)", "1"),
        trigger("avg(vllm:kv_cache_usage_perc)", "100"),
        advanced={"scalingModifiers": {"formula": "a + b", "target": "5"}},
    ),
    hpa(minReplicas=None),
    hpa() | {"apiVersion": "autoscaling/v1", "spec": {"scaleTargetRef": {"name": "x"}, "maxReplicas": 3}},
]


@pytest.mark.parametrize("document", GOOD, ids=range(len(GOOD)))
def test_sound_files_get_none(document: dict[str, Any], tmp_path: Path) -> None:
    assert found(tmp_path, document) == []


def test_two_scalers_of_one_deployment(tmp_path: Path) -> None:
    (finding,) = found(tmp_path, {"kind": "Service"}, keda(), hpa())
    assert "ScaledObject/chat scales it too" in finding.why
    assert len(found(tmp_path, {"kind": "List", "items": [keda(), hpa()]})) == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("kind: Service", "nothing to look at"),
        ("", "nothing to look at"),
        ("query: {{ .Values.q }}", "a template and no YAML"),
        ("kind: ScaledObject\nspec: {triggers: [3]}", "a part of it is of another type"),
        ("kind: ScaledObject\nspec: 7", "a part of it is of another type"),
        ("kind: HorizontalPodAutoscaler\nspec: {maxReplicas: many}", "a part of it is of another type"),
        ("kind: HorizontalPodAutoscaler\nspec: {maxReplicas: 3, behavior: {scaleDown: 3}}", "another type"),
        ("kind: ScaledObject\nspec: {triggers: [{type: prometheus, metadata: 3}]}", "another type"),
    ],
)
def test_what_is_no_such_file_gets_one_error(text: str, said: str, tmp_path: Path) -> None:
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(InputError, match=said):
        lint(file)


_PLAIN = st.none() | st.booleans() | st.integers(-9, 9) | st.floats() | st.sampled_from(["", "5m", "x", "sum(x)", "{{"])
_KEYS = st.sampled_from(
    "metadata spec triggers metrics behavior scaleDown scaleUp policies advanced horizontalPodAutoscalerConfig type name "
    "query threshold pods external resource target metric averageValue minReplicas maxReplicas minReplicaCount kind "
    "scaleTargetRef stabilizationWindowSeconds periodSeconds selectPolicy tolerance items cooldownPeriod".split()
)
_ANY = st.recursive(_PLAIN, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYS, inner, max_size=5))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    kind=st.sampled_from(["ScaledObject", "HorizontalPodAutoscaler", "List"]),
    data=st.dictionaries(_KEYS, _ANY, max_size=4),
)
def test_whatever_the_file_says_it_is_a_finding_or_an_error(kind: str, data: dict[str, Any], tmp_path: Path) -> None:
    with contextlib.suppress(InputError):
        for finding in found(tmp_path, data | {"kind": kind}):
            assert "\n" not in str(finding)
