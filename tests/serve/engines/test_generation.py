"""The generation engine: whoever runs beside a request, and however its prompt is read, it gets what it gets alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import helper

from gpuplan.errors import RunError
from gpuplan.serve.engines import OutOfMemory, Output, Sampling
from gpuplan.serve.engines.generation import GenerationEngine
from tests.serve.engines.conftest import Driver, encode, small_model, spec, write

KINDS = ("append", "equal", "prefix", "half")
ALPHABET = "abcdefghijklmnopqrstuvwxyz ,.ABCDEF"


def prompt_text(dice: Random, longest: int) -> str:
    return "".join(dice.choice(ALPHABET) for _ in range(dice.randint(1, longest)))


def same(got: list[Output], expected: list[Output], tolerance: float = 1e-3) -> bool:
    """The same tokens with the same log-probabilities, but for rounding: where the two likeliest tokens are nearer to
    each other than that, either may be chosen, and the texts part."""
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        if a.logprob is None or b.logprob is None or abs(a.logprob.logprob - b.logprob.logprob) > tolerance:
            return False
        if a.logprob.token_bytes != b.logprob.token_bytes:
            return len(b.logprob.top) == 2 and b.logprob.top[0][1] - b.logprob.top[1][1] < tolerance
    return True


def rounding(kind: str) -> float:
    """Of a log-probability. A half-precision cache rounds what the same run reads in full."""
    return 5e-2 if kind == "half" else 1e-3


@pytest.mark.parametrize("kind", ["append", "equal", "prefix"])
def test_with_a_cache_it_says_what_it_says_without(drivers: Callable[[str], Driver], kind: str) -> None:
    driver = drivers(kind)
    got = driver.alone("Once upon a time", 20)
    session = ort.InferenceSession(small_model(kind).SerializeToString(), providers=["CPUExecutionProvider"])
    ids = list(encode("Once upon a time"))
    for output in got:
        row = np.array([ids])
        fed = {"input_ids": row, "attention_mask": np.ones_like(row), "position_ids": np.arange(len(ids))[None]}
        fed = {value.name: fed[value.name] for value in session.get_inputs() if value.name in fed}
        fed |= {v.name: np.zeros((1, v.shape[1], 0, v.shape[3]), np.float32) for v in session.get_inputs()[len(fed) :]}
        ids.append(int(session.run(["logits"], fed)[0][0, -1].argmax()))
        assert output.logprob is not None and output.logprob.token_bytes == driver.engine._vocabulary.token_bytes(
            ids[-1]
        )


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32))
def test_batched_is_alone(drivers: Callable[[str], Driver], kind: str, seed: int) -> None:
    """Joins and leaves at random, prompts read in random chunks, steps for random subsets."""
    driver, dice = drivers(kind), Random(seed)
    texts = [prompt_text(dice, dice.choice((6, 40, 90))) for _ in range(dice.randint(1, 7))]
    wanted = [dice.randint(1, 10) for _ in texts]
    expected = [driver.alone(text, tokens) for text, tokens in zip(texts, wanted, strict=True)]
    waiting, running = list(range(len(texts))), set[int]()
    ids: dict[int, int] = {}
    while waiting or running:
        while waiting and dice.random() < 0.5:
            at = waiting.pop(0)
            ids[at] = driver.begin(texts[at], 0)
            running.add(at)
        chosen = sorted(running) if dice.random() < 0.6 else [at for at in sorted(running) if dice.random() < 0.5]
        decodes = [ids[at] for at in chosen if not driver.left[ids[at]]]
        reads = {ids[at]: dice.choice((0, 1, 3, 20)) for at in chosen if driver.left[ids[at]]}
        driver.step(decodes, reads)
        over = [at for at in running if len(driver.outputs[ids[at]]) == wanted[at]]
        driver.engine.release([ids[at] for at in over])
        running.difference_update(over)
    for at, outputs in enumerate(expected):
        assert same(driver.outputs[ids[at]], outputs, rounding(kind)), texts[at]


@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_in_chunks_is_the_whole_prompt(drivers: Callable[[str], Driver], kind: str) -> None:
    driver = drivers(kind)
    text = "a prompt that is read in chunks of some tokens each, and then goes on"
    expected = driver.alone(text, 8)
    for chunk in (1, 7, 64, len(text)):
        request = driver.begin(text, 8)
        while driver.left[request]:
            assert not driver.outputs[request]
            driver.step(reads={request: chunk})
        for _ in range(7):
            driver.step([request])
        assert same(driver.outputs[request], expected, rounding(kind))


def test_a_run_never_makes_more_logits_than_it_may(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = driver.alone("nobody needs the logits of a prompt", 4)
    monkeypatch.setattr("gpuplan.serve.engines.decoder._LOGITS_BYTES_MAX", 4 * 260 * 10)
    assert driver.engine._decoder.run_tokens_max == 10
    assert same(driver.alone("nobody needs the logits of a prompt", 4), expected)


def test_the_same_members_need_no_surgery(driver: Driver) -> None:
    requests = [driver.begin(text) for text in ("one", "two", "six")]
    driver.step(reads=dict.fromkeys(requests, 0))
    before = driver.engine.surgeries
    for _ in range(5):
        driver.step(requests)
    assert driver.engine.surgeries == before
    driver.step(requests[:2])
    assert driver.engine.surgeries == before + 1, "one has not been asked for: the others get a block of their own"
    driver.step(requests[:2])
    assert driver.engine.surgeries == before + 1
    driver.engine.release(requests)


@pytest.mark.parametrize("kind", KINDS)
def test_any_number_of_blocks_become_one(drivers: Callable[[str], Driver], kind: str) -> None:
    """Each prompt read in a step of its own; then all decode together, more blocks than one run of the graph takes."""
    driver = drivers(kind)
    texts = [("many blocks " * 3)[: 20 + i % 5] for i in range(19)]
    expected = [driver.alone(text, 3) for text in texts]
    requests = [driver.begin(text) for text in texts]
    for request in requests:
        driver.step(reads={request: 0})
    driver.step(requests)
    driver.step(requests[::-1])
    for request, outputs in zip(requests, expected, strict=True):
        assert same(driver.outputs[request], outputs, rounding(kind))
    blocks = {id(driver.engine._sequences[request].block) for request in requests}
    assert len(blocks) == (5 if kind == "equal" else 1)
    driver.engine.release(requests)


def test_padding_is_bounded(driver: Driver) -> None:
    """Two very long rows do not make many short ones as wide as themselves."""
    requests = [driver.begin("short") for _ in range(10)] + [driver.begin("long" * 100) for _ in range(2)]
    driver.step(reads=dict.fromkeys(requests, 0))
    driver.step(requests)
    blocks = {id(b): b for b in (driver.engine._sequences[i].block for i in requests) if b is not None}.values()
    assert len(blocks) == 2
    for block in blocks:
        rows = len(block.request_ids)
        assert rows * block.columns <= max(1.5 * sum(block.lengths), sum(block.lengths) + 17 * rows)
    driver.engine.release(requests)


def test_on_the_cpu_a_short_row_does_not_run_alone_beside_a_long_one(driver: Driver) -> None:
    """A second run would read all weights again, which is dearer than 200 columns for nothing."""
    requests = [driver.begin("short"), driver.begin("long" * 50)]
    driver.step(reads=dict.fromkeys(requests, 0))
    driver.step(requests)
    assert len({id(driver.engine._sequences[request].block) for request in requests}) == 1
    driver.engine.release(requests)


class Failing:
    """A session that raises at its next runs."""

    def __init__(self, session: Any, *errors: Exception | None) -> None:
        self._session, self.errors = session, list(errors)

    def io_binding(self) -> Any:
        return self._session.io_binding()

    def run_with_iobinding(self, binding: Any) -> None:
        error = self.errors.pop(0) if self.errors else None
        self._session.run_with_iobinding(binding)
        if error is not None:
            raise error


def test_a_step_that_fails_leaves_everything_as_it_was(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    texts = ["first of them", "second", "a third one that joins and is read in two pieces"]
    expected = [driver.alone(text, 6) for text in texts]
    a, b, c = [driver.begin(text) for text in texts]
    driver.step(reads={a: 0, b: 0})
    driver.step([a, b], {c: 10})
    decoder = driver.engine._decoder
    # The decode runs, the prefill behind it fails: neither may have happened.
    failing = Failing(decoder.session, None, RuntimeError("a kernel has crashed"))
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "session", failing)
        with pytest.raises(RuntimeError, match="a kernel"):
            driver.step([a, b], {c: 0})
    short_of_memory = Failing(decoder.session, RuntimeError("Failed to allocate memory for requested buffer of size 9"))
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "session", short_of_memory)
        with pytest.raises(OutOfMemory):
            driver.step([a, b], {c: 0})
    new = driver.begin("never begun")
    with monkeypatch.context() as patched:
        patched.setattr(decoder, "session", Failing(decoder.session, None, RuntimeError("again")))
        with pytest.raises(RuntimeError, match="again"):
            driver.step([a], {new: 0})
    assert new not in driver.engine._sequences
    # Then in halves, as the core does it.
    driver.step([a])
    driver.step([b], {c: 0})
    for _ in range(3):
        driver.step([b, c, a])
    driver.step([c])
    driver.step([c])
    for request, outputs in zip((a, b, c), expected, strict=True):
        assert same(driver.outputs[request], outputs)
    driver.engine.release([a, b, c])


def test_a_decode_of_what_was_released_is_an_error_of_it_alone(driver: Driver) -> None:
    expected = driver.alone("stays", 3)
    stays, goes = driver.begin("stays"), driver.begin("goes")
    driver.step(reads={stays: 0, goes: 0})
    driver.engine.release([goes, 10**9])
    assert goes not in driver.engine._sequences
    assert driver.step([stays, goes])[goes].error == "not_running"
    driver.step([stays])
    assert same(driver.outputs[stays], expected)
    driver.engine.release([stays])


def test_what_has_ended_holds_no_cache(driver: Driver) -> None:
    ended = driver.begin("two tokens", 2)
    driver.step(reads={ended: 0})
    driver.step([ended])
    assert ended not in driver.engine._sequences


@pytest.mark.parametrize(("read", "last"), [(3, True), (4, False), (9, True)])
def test_a_step_that_miscounts_a_prompt_is_an_error(driver: Driver, read: int, last: bool) -> None:
    request = driver.begin("four")
    driver.left[request] = read if last else read + 1
    with pytest.raises(RunError, match="4 left"):
        driver.step(reads={request: read})


def test_a_nan_is_an_error_of_its_request_alone(tmp_path: Path) -> None:
    """The letter z is poison: its embedding is no number."""
    model = small_model()
    table = next(t for t in model.graph.initializer if t.name == "embedding")
    rows = onnx.numpy_helper.to_array(table).copy()
    rows[ord("z")] = np.nan
    table.CopyFrom(onnx.numpy_helper.from_array(rows, "embedding"))
    driver = Driver(GenerationEngine(spec(write(tmp_path, model))))
    expected = driver.alone("healthy", 4)
    good, bad = driver.begin("healthy"), driver.begin("hazards")
    answers = driver.step(reads={good: 0, bad: 0})
    assert answers[bad].error == "nan_output" and not answers[bad].text
    for _ in range(3):
        driver.step([good])
    assert same(driver.outputs[good], expected)
    driver.engine.close()


def test_log_probabilities_are_told(driver: Driver) -> None:
    request = driver.begin("tell me", 100, Sampling(logprobs=260))
    output = driver.step(reads={request: 0})[request]
    assert output.logprob is not None
    assert sum(np.exp(logprob) for _, logprob, _ in output.logprob.top) == pytest.approx(1.0)
    assert output.logprob.top[0] == (output.logprob.token, output.logprob.logprob, output.logprob.token_bytes)
    assert ("<|end|>", b"<|end|>") in {(token, written) for token, _, written in output.logprob.top}
    driver.engine.release([request])


def test_a_seed_is_a_text_whatever_runs_beside_it(driver: Driver) -> None:
    hot = Sampling(temperature=1.0, top_p=0.9, seed=11, ignore_eos=True, logprobs=0)
    expected = driver.alone("dice", 8, hot)
    assert not same(driver.alone("dice", 8, Sampling(temperature=1.0, seed=12, ignore_eos=True, logprobs=0)), expected)
    a, b = driver.begin("another prompt of some length"), driver.begin("dice", 8, hot)
    driver.step(reads={a: 0, b: 0})
    for _ in range(7):
        driver.step([a, b])
    assert same(driver.outputs[b], expected)
    driver.engine.release([a])


def test_a_stop_string_ends_the_text_before_it(driver: Driver) -> None:
    whole = "".join(output.text for output in driver.alone("what comes is known", 12))
    stop = whole[5:8]
    request = driver.begin("what comes is known", 100, Sampling(stop=(stop,), ignore_eos=True))
    output = driver.step(reads={request: 0})[request]
    while not output.end:
        output = driver.step([request])[request]
    assert driver.text(request) == whole[: whole.index(stop)]


# --- what is refused at load ----------------------------------------------------------------------------------------


def without_cache(model: onnx.ModelProto) -> None:
    kept = [value for value in model.graph.output if value.name == "logits"]
    del model.graph.output[:]
    model.graph.output.extend(kept)


def with_branch(model: onnx.ModelProto) -> None:
    model.graph.input.append(helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1]))


def with_free_heads(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.shape.dim[1].dim_param = "heads"


def with_other_logits(model: onnx.ModelProto) -> None:
    """Logits of all rows in one: a row count that does not match."""
    model.graph.node[-1].output[0] = "whole"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([1, -1, 260]), "one_row"))
    model.graph.node.append(helper.make_node("Reshape", ["whole", "one_row"], ["logits"]))


def with_broken_shape(model: onnx.ModelProto) -> None:
    model.graph.node[-1].output[0] = "whole"
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.array([7, 7, 7]), "wrong"))
    model.graph.node.append(helper.make_node("Reshape", ["whole", "wrong"], ["logits"]))


def with_double_cache(model: onnx.ModelProto) -> None:
    for value in model.graph.input:
        if value.name.startswith("past"):
            value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    for node in model.graph.node:
        node.input[:] = [f"float.{n}" if n.startswith("past") else n for n in node.input]
    for i, value in enumerate([v for v in model.graph.input if v.name.startswith("past")]):
        cast = helper.make_node("Cast", [value.name], [f"float.{value.name}"], to=onnx.TensorProto.FLOAT)
        model.graph.node.insert(i, cast)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (without_cache, "gives no present"),
        (with_branch, "does not feed: use_cache_branch"),
        (with_free_heads, "sizes fixed"),
        (with_other_logits, "logits are"),
        (with_broken_shape, "does not run: "),
        (with_double_cache, "caches of float and float16"),
    ],
)
def test_a_model_that_is_no_such_decoder_is_refused(
    tmp_path: Path, change: Callable[[onnx.ModelProto], None], words: str
) -> None:
    model = small_model()
    change(model)
    engine = GenerationEngine(spec(write(tmp_path, model)))
    with pytest.raises(RunError, match=words) as refused:
        engine.load()
    assert "\n" not in str(refused.value)
    engine.close()


def test_what_it_says_of_itself(drivers: Callable[[str], Driver]) -> None:
    engine = drivers("append").engine
    assert engine.description.startswith("ONNX Runtime")
    assert engine.kv_bytes_per_token == 2 * 2 * 2 * 16 * 4
    assert drivers("half").engine.kv_bytes_per_token == 2 * 2 * 2 * 16 * 2
    assert drivers("prefix").engine._decoder.layout == "prefix"
    assert engine.notes() == []
    assert "position_ids" in drivers("equal").engine.notes()[0]


def test_release_after_close_is_nothing(tmp_path: Path) -> None:
    driver = Driver(GenerationEngine(spec(write(tmp_path, small_model()))))
    driver.engine.close()
    driver.engine.release([1])
