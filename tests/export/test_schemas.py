"""The tools' own schemas, where they can be had: `pip install gpuplan[schemas]`. Triton's is also held in its main parts
against a copy of the fields that are used, so that every machine reads the file as protobuf text."""

from __future__ import annotations

from typing import Any

import pytest
import yaml

from gpuplan.export import EXPORTS
from gpuplan.export.triton import files

from .plans import MANY, QUICKSTART

PLANS = {"quickstart": QUICKSTART, "hostile": MANY}


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("version", ["1.27", "1.34"])
def test_kubernetes_accepts_them(plan: dict[str, Any], version: str) -> None:
    validator = pytest.importorskip("kubernetes_validate", reason="needs gpuplan[schemas]")
    texts = [EXPORTS["hpa"].write(plan, "vllm"), EXPORTS["gpu-operator"].write(plan)]
    for document in (document for text in texts for document in yaml.safe_load_all(text)):
        validator.validate(document, version, strict=True)


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_triton_s_client_parses_its_configuration(plan: dict[str, Any]) -> None:
    pytest.importorskip("tritonclient.grpc", reason="needs gpuplan[schemas]")
    from google.protobuf import text_format
    from tritonclient.grpc import model_config_pb2

    for path, text in files(plan).items():
        if path.endswith(".pbtxt"):
            text_format.Parse(text, model_config_pb2.ModelConfig())


def test_prometheus_parses_every_query() -> None:
    parser = pytest.importorskip("promql_parser", reason="needs gpuplan[schemas]")
    for source in ("gpuplan", "vllm", "triton"):
        for document in yaml.safe_load_all(EXPORTS["keda"].write(MANY, source)):
            for trigger in document["spec"]["triggers"]:
                parser.parse(trigger["metadata"]["query"])


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
def test_ray_serve_accepts_its_file(plan: dict[str, Any]) -> None:
    schema = pytest.importorskip("ray.serve.schema", reason="needs ray[serve]")
    schema.ServeDeploySchema.model_validate(yaml.safe_load(EXPORTS["ray-serve"].write(plan)))


# Field: (number, type), of triton-inference-server/common, protobuf/model_config.proto.
_MODEL_CONFIG: dict[str, dict[str, tuple[int, str]]] = {
    "QueuePolicy": {"timeout_action": (1, "TimeoutAction"), "max_queue_size": (4, "uint32")},
    "DynamicBatching": {"max_queue_delay_microseconds": (2, "uint64"), "default_queue_policy": (6, "QueuePolicy")},
    "InstanceGroup": {"count": (2, "int32"), "gpus": (3, "int32[]"), "kind": (4, "Kind")},
    "Decoupled": {"decoupled": (1, "bool")},
    "ModelConfig": {
        "name": (1, "string"),
        "max_batch_size": (4, "int32"),
        "instance_group": (7, "InstanceGroup[]"),
        "dynamic_batching": (11, "DynamicBatching"),
        "backend": (17, "string"),
        "model_transaction_policy": (19, "Decoupled"),
    },
}
_ENUMS = {"TimeoutAction": ("REJECT", "DELAY"), "Kind": ("KIND_AUTO", "KIND_GPU", "KIND_CPU", "KIND_MODEL")}


def _message() -> Any:
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    kinds = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="triton.proto", package="t", syntax="proto3")
    for name, values in _ENUMS.items():
        enum = file.enum_type.add(name=name)
        for number, value in enumerate(values):
            enum.value.add(name=value, number=number)
    for name, fields in _MODEL_CONFIG.items():
        message = file.message_type.add(name=name)
        for field, (number, kind) in fields.items():
            plain = kind.removesuffix("[]")
            label = kinds.LABEL_REPEATED if kind != plain else kinds.LABEL_OPTIONAL
            told = message.field.add(name=field, number=number, label=label)
            if plain in _MODEL_CONFIG or plain in _ENUMS:
                told.type = kinds.TYPE_MESSAGE if plain in _MODEL_CONFIG else kinds.TYPE_ENUM
                told.type_name = f".t.{plain}"
            else:
                told.type = getattr(kinds, f"TYPE_{plain.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.ModelConfig"))


def test_triton_s_configuration_is_protobuf_text() -> None:
    from google.protobuf import text_format

    kind = _message()
    found = {path: text_format.Parse(text, kind()) for path, text in files(QUICKSTART).items() if "pbtxt" in path}
    mood, chat = found["moderator/config.pbtxt"], found["assistant/config.pbtxt"]
    assert (mood.max_batch_size, mood.dynamic_batching.max_queue_delay_microseconds) == (2, 2000)
    assert mood.dynamic_batching.default_queue_policy.max_queue_size == 41
    assert (chat.backend, chat.max_batch_size, chat.model_transaction_policy.decoupled) == ("vllm", 0, True)
    for path, text in files(MANY).items():
        if path.endswith(".pbtxt"):
            assert text_format.Parse(text, kind()).name == path.split("/")[0], "Triton wants the folder's name"
