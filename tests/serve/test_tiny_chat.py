"""The built-in decoder: what its shape says is what it is, and its text can be read."""

from __future__ import annotations

import string
import time

import onnx
import pytest

from gpuplan.hardware.shapes import shape
from gpuplan.serve import model_files
from gpuplan.serve.builtin import tiny_chat
from gpuplan.serve.engines import GREEDY, Sampling
from gpuplan.serve.engines.generation import GenerationEngine
from gpuplan.serve.engines.session import EngineSpec
from tests.serve.engines.conftest import SMALL, Driver

SIZES = shape(tiny_chat.NAME)


def test_it_is_as_large_as_its_shape_says() -> None:
    model = tiny_chat.model()
    graph = onnx.load_from_string(model).graph
    weights = sum(len(t.raw_data) for t in graph.initializer if t.name.split(".")[0] not in ("cos", "sin"))
    assert weights == pytest.approx(SIZES.weights_bytes, rel=0.01)
    assert len(model) < 60e6
    tokens = 2 * SIZES.layers
    assert len(graph.input) == 3 + tokens and len(graph.output) == 1 + tokens
    assert [value.name for value in graph.input][:4] == [
        "input_ids", "attention_mask", "position_ids", "past_key_values.0.key"
    ]  # fmt: skip


def test_the_graph_is_sound_and_the_same_every_time() -> None:
    graph = tiny_chat.graph(SMALL)
    onnx.checker.check_model(onnx.load_from_string(graph))
    assert graph == tiny_chat.graph(SMALL)
    assert graph != tiny_chat.graph(SMALL, seed=1)


def test_its_vocabulary_is_the_bytes_and_special_tokens() -> None:
    files = model_files.read("builtin:tiny-chat")
    assert files.encode("hé<|user|>") == [*"hé".encode(), 257]
    assert files.vocabulary.get_vocab_size() == SIZES.vocabulary == tiny_chat.VOCABULARY
    assert files.vocabulary.decode(list("hé🙂".encode())) == "hé🙂"
    assert files.end_ids == {files.vocabulary.token_to_id("<|end|>")}
    assert files.labels == ()


def test_it_says_something_that_can_be_read() -> None:
    driver = Driver(GenerationEngine(EngineSpec(source="builtin:tiny-chat", role="decoder", max_batch_size=2)))
    greedy, drawn = driver.begin("Hello, who are you?", 60, GREEDY), driver.begin("Hi", 60, Sampling(0.7, seed=1))
    driver.step(reads={greedy: 0, drawn: 0})
    for _ in range(59):
        driver.step([i for i in (greedy, drawn) if not driver.outputs[i][-1].end])
    for request in (greedy, drawn):
        text = driver.text(request)
        assert len(text) > 40 and set(text) <= set(string.printable)
        assert sum(c in string.ascii_lowercase + " .," for c in text) > 0.8 * len(text)
    assert driver.engine.kv_bytes_per_token == SIZES.kv_bytes_per_token
    driver.engine.close()


@pytest.mark.slow
def test_sixteen_together_are_worth_many_alone() -> None:
    """What makes batching worth planning for: the weights are read once for all."""
    driver = Driver(GenerationEngine(EngineSpec(source="builtin:tiny-chat", role="decoder", max_batch_size=16)))

    def tokens_per_s(requests: list[int]) -> float:
        driver.step(reads=dict.fromkeys(requests, 0))
        steps_s = []
        for _ in range(40):
            begun_s = time.perf_counter()
            driver.step(requests)
            steps_s.append(time.perf_counter() - begun_s)
        return len(requests) / sorted(steps_s)[10]

    alone = tokens_per_s([driver.begin("How fast are you?", 0, Sampling(ignore_eos=True))])
    together = tokens_per_s([driver.begin("How fast are you?", 0, Sampling(ignore_eos=True)) for _ in range(16)])
    assert together > 3 * alone
    driver.engine.close()
