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
from gpuplan.hardware.roofline import StepLoad
from gpuplan.policy.vocabulary import Prefill, RunStep
from gpuplan.scenario import deployment
from gpuplan.scenario.build import build
from gpuplan.scenario.demand import Scenario
from gpuplan.serve.engines import Engine, Prompt
from gpuplan.serve.engines.session import CUDA_PROVIDER, EngineSpec
from gpuplan.serve.engines.single_step import SingleStepEngine
from gpuplan.serve.models import engine_for
from gpuplan.telemetry.nvml import discover

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
    return engine_for(supply.replicas[0], supply, card_present=False, **options)


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
        asyncio.run(wants_cuda.load())


def test_a_slice_of_a_present_card_is_never_passed_off_as_the_whole(tmp_path: Path) -> None:
    """CUDA would run on all of it: a built-in is emulated at the slice's speed, an ONNX file is refused."""
    cut = {"gpu": "a100-80gb", "mig": ["3g.40gb"]}
    model = model_folder(tmp_path, [[0.0, 0.0]] * len(WORDS))
    for source in ({"builtin": "sentiment"}, {"onnx": str(model)}):
        supply = deployment.resolve(build({"name": "m", "models": {"m": source}, "deployment": cut}, Scenario))
        if "onnx" in source:
            with pytest.raises(GpuplanError, match="single MIG slices"):
                engine_for(supply.replicas[0], supply, card_present=True)
        else:
            assert engine_for(supply.replicas[0], supply, card_present=True).provenance == "emulated"
