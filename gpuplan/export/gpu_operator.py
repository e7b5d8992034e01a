"""The layout for NVIDIA's GPU Operator: a ConfigMap that its mig-manager reads (mig-parted's configuration, under the
key `config.yaml`), and in comments how to point the ClusterPolicy at it and label a node.

The plan does not know how many cards a node has, so every card of a labelled node is cut alike. `all-disabled` is the
operator's default for nodes without a label, and has to be there.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from gpuplan.export import names, reading, yaml_text
from gpuplan.export.reading import Plan
from gpuplan.hardware.mig import WHOLE

CONFIG_MAP = "gpuplan-mig-config"
NAMESPACE = "gpu-operator"


def write(plan: Plan) -> str:
    """The ConfigMap. Raises InputError for a plan without a GPU."""
    import yaml

    found = reading.layouts(plan)
    configs: dict[str, Any] = {"all-disabled": [{"devices": "all", "mig-enabled": False}]}
    named = []
    for i, layout in enumerate(found):
        name = "gpuplan" if len(found) == 1 else f"gpuplan-{i}"
        device: dict[str, Any] = {"devices": "all", "mig-enabled": layout["profiles"] != [WHOLE]}
        if device["mig-enabled"]:
            device["mig-devices"] = dict(Counter(layout["profiles"]))
        configs[name] = [device]
        how = " + ".join(layout["profiles"])
        named.append((name, f"{layout['count']} x {layout['gpu']} as {how}"))
    patch = f'{{"spec": {{"mig": {{"strategy": "mixed"}}, "migManager": {{"config": {{"name": "{CONFIG_MAP}"}}}}}}}}'
    comments = yaml_text.head(
        plan,
        "MIG layouts for NVIDIA's GPU Operator.",
        from_plan=[f"{name}: {how}." for name, how in named],
        fill_in=[f"the operator's namespace, where it is not {NAMESPACE}; NODE below."],
    )
    comments += [
        "# Point the operator at it, then label each node: its mig-manager ends what runs there and cuts every card.",
        f"#   kubectl patch clusterpolicies.nvidia.com/cluster-policy --type merge -p '{patch}'",
        *(f"#   kubectl label node NODE nvidia.com/mig.config={name} --overwrite" for name, _ in named),
        "# Undo: kubectl label node NODE nvidia.com/mig.config=all-disabled --overwrite",
    ]
    requests = sorted({reading.resource(s.slice) for s in reading.servers(plan)})
    comments.append(f"# Pods then request: {names.shown(', '.join(requests), 400)}")
    text = yaml.safe_dump({"version": "v1", "mig-configs": configs}, sort_keys=False)
    document = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": CONFIG_MAP, "namespace": NAMESPACE},
        "data": {"config.yaml": text},
    }
    return yaml_text.written(comments, ([], document))
