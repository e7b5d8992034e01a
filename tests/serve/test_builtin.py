"""The models that the package makes: small, real, and of some sense."""

from __future__ import annotations

import subprocess
import sys
import typing

import numpy as np
import onnx
import pytest

from gpuplan.hardware import shapes
from gpuplan.scenario import deployment
from gpuplan.scenario.demand import ModelSource
from gpuplan.serve import inspection, model_files
from gpuplan.serve.builtin import embed
from gpuplan.serve.engines.single_step import SingleStepEngine

from .engines.graphs import answered, loaded

# Pairs that say the same with mostly the same words, one a line.
PARAPHRASES = [
    ("how do I restart the database server", "restarting the database servers"),
    ("the cat sat on a warm mat", "a cat is sitting on the mat, and it is warm"),
    ("quarterly revenue grew strongly in Europe", "Europe's quarterly revenues were growing"),
    ("my order arrived late and broken", "the order that arrived was late, and broken too"),
    ("book a flight from Paris to Berlin", "I would like to book flights to Berlin from Paris"),
    ("the battery of this phone lasts two days", "this phone has a battery lasting for two days"),
]


@pytest.fixture(scope="module")
def embedder() -> SingleStepEngine:
    return loaded("builtin:embed", "embedder")


def vectors(engine: SingleStepEngine, *texts: str) -> np.ndarray:
    return np.array([np.frombuffer(output.embedding or b"", dtype="<f4") for output in answered(engine, *texts)])


def test_paraphrases_are_nearer_than_anything_else(embedder: SingleStepEngine) -> None:
    left, right = (vectors(embedder, *texts) for texts in zip(*PARAPHRASES, strict=True))
    near = left @ right.T
    unrelated = near[~np.eye(len(near), dtype=bool)]
    assert near.diagonal().min() > 0.5
    assert near.diagonal().min() > unrelated.max() + 0.2


def test_the_order_of_words_is_felt_and_no_more(embedder: SingleStepEngine) -> None:
    one, other = vectors(embedder, "the dog chased the man", "the man chased the dog")
    assert 0.9 < one @ other < 1.0 - 1e-6


def test_embed_is_small_seeded_and_what_its_shape_says() -> None:
    graph = onnx.load_from_string(embed.model()).graph
    onnx.checker.check_model(embed.model())
    shape = shapes.shape("embed")
    rows = next(w for w in graph.initializer if w.name == "embedding").dims
    assert list(rows) == [shape.vocabulary, shape.hidden]
    assert (shape.layers, shape.heads, shape.ffn) == (embed.LAYERS, embed.HEADS, embed.HIDDEN)
    assert shape.context_tokens_max == embed.TOKENS_MAX
    assert len(embed.model()) < 30e6
    assert len(embed.model()) == pytest.approx(shape.weights_bytes, rel=0.05)
    assert sum(node.op_type == "Softmax" for node in graph.node) == embed.LAYERS
    assert all(0 < i < embed.ROWS for i in embed.token_ids("the Quick brown fox's 2nd jump"))


def test_another_process_makes_the_same_graph() -> None:
    made = "import zlib; from gpuplan.serve.builtin import embed; print(zlib.crc32(embed.model()))"
    import zlib

    done = subprocess.run([sys.executable, "-c", made], capture_output=True, text=True, check=True)
    assert int(done.stdout) == zlib.crc32(embed.model())


def test_every_builtin_has_a_shape_a_graph_and_a_place_in_the_list() -> None:
    kinds = typing.get_args(typing.get_type_hints(ModelSource)["builtin"])
    names = typing.get_args(kinds[0])
    assert [one.name for one in inspection.builtins()] == list(names)
    for one in inspection.builtins():
        source = ModelSource(builtin=typing.cast(typing.Any, one.name))
        assert deployment.role(source) == shapes.shape(one.name).role == one.role
        assert deployment.window_of(source) == one.context_tokens_max
        assert model_files.read(f"builtin:{one.name}").model
        assert one.about and one.parameters > 1000
