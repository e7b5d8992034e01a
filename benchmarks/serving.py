"""How fast `gpuplan serve` answers, beside mosec and beside a bare loop around the same inference, in one run.

The model is a classifier: an embedding mean-pooled over the tokens and an MLP of 4 x 2048, made here from a seed. Every
server gets the same JSON (token ids) over HTTP, runs the same ONNX file with as many ONNX Runtime threads, batches up
to 64 and waits 2 ms for company. The load is gpuplan's own generator, in this process: 64 connections, then 1, each
sending its next request when it has its answer. The servers take turns, several times over, so that a noisy
machine hits all of them; rates and latencies are medians over the turns, ratios the medians of each turn's ratio.

mosec is the peer (a Rust front, Python workers); install it by hand, `pip install mosec==0.9.8`, or it is left out.

`decoding` is another benchmark: the built-in tiny-chat, its tokens streamed to 16 sequences at once and to one, beside
a bare loop around the same session at batch 16, which feeds the cache that a step gave to the next by IO binding and
takes the likeliest token of each row. Prompts are of 8 token ids, 64 tokens are generated, greedily. Sequences start
together, wave upon wave; what counts is the steady part of a wave, from the moment when all have their first token to
the moment when the first one has its last, and of the loop the steps after the prompt. Server and loop take turns, each
in a process of its own that is idle meanwhile.

    python benchmarks/serving.py [classifying] [decoding] [--seconds 3] [--rounds 3] [--connections 64] [--threads 1]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.util
import json
import os
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

TREE = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(TREE))

import httptools  # noqa: E402
import msgspec  # noqa: E402
import numpy as np  # noqa: E402
import uvloop  # noqa: E402

from gpuplan.load.wire import Exchange, Pool, Target  # noqa: E402

VOCABULARY = 4096
TOKENS = 8
BATCH = 64
SEQUENCES, ANSWER = 16, 64
DELAY_MS = 2
WARM_S = 0.5
START_S_MAX = 60.0

# What the bare server and mosec's worker are told: where the model is, and with how many threads it runs.
FOLDER, THREADS = "SERVING_BENCHMARK_FOLDER", "SERVING_BENCHMARK_THREADS"


class Load(NamedTuple):
    """What one turn of load measured; latencies in ms."""

    rate_per_s: float
    p50_ms: float
    p99_ms: float


class Asked(msgspec.Struct):
    """The body that every server gets."""

    model: str
    input: list[int]


# --- the benchmarks -----------------------------------------------------------------------------------------------


def classifying(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="gpuplan-serving-") as name:
        folder = Path(name)
        write_model(folder, options)
        print(f"MLP {options.layers} x {options.width}, {options.threads} ONNX Runtime thread(s), {TOKENS} tokens")
        for size in (BATCH, 1):
            batch_s = offline_s(folder, options.threads, size)
            print(f"  offline, batch {size:2}: {size / batch_s:6.0f} inferences/s, {batch_s * 1e3:.2f} ms")
        with contextlib.ExitStack() as stack:
            urls = {"gpuplan": stack.enter_context(gpuplan(folder, "/v1/classify"))}
            if importlib.util.find_spec("mosec"):
                urls["mosec"] = stack.enter_context(mosec(folder, options.threads))
            else:
                print("  mosec is not installed: left out (pip install mosec==0.9.8)")
            compare(urls, options.connections, options)
            urls["bare"] = stack.enter_context(bare(folder, options.threads))
            compare(urls, 1, options)


def decoding(options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="gpuplan-serving-") as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        write_decoder(folder, options)
        print(f"tiny-chat, {options.threads} ONNX Runtime thread(s), {TOKENS} prompt tokens, {ANSWER} generated")
        url = stack.enter_context(gpuplan(folder, "/v1/completions"))
        loop = stack.enter_context(bare_loop(options.threads))
        turns: dict[str, Callable[[], float]] = {
            "loop16": lambda: loop(SEQUENCES, options.seconds),
            "served16": lambda: uvloop.run(stream(url, SEQUENCES, options.seconds)),
            "loop1": lambda: loop(1, options.seconds),
            "served1": lambda: uvloop.run(stream(url, 1, options.seconds)),
        }
        rates: dict[str, list[float]] = {turn: [] for turn in turns}
        for _ in range(options.rounds):
            for turn, rate in turns.items():
                rates[turn].append(rate())
    for size, served, looped in ((SEQUENCES, "served16", "loop16"), (1, "served1", "loop1")):
        rate, bare_rate = (statistics.median(rates[turn]) for turn in (served, looped))
        share = ratio(rates[served], rates[looped])
        print(f"  {size:2} sequence(s): gpuplan {rate:5.0f} tokens/s, bare loop {bare_rate:5.0f}: {share:.1%} of it")
    print(f"  {SEQUENCES} sequences / 1: x {ratio(rates['served16'], rates['served1']):.2f}")


def ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    """The median of each turn's ratio."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


BENCHMARKS: dict[str, Callable[[argparse.Namespace], None]] = {"classifying": classifying, "decoding": decoding}


def compare(urls: dict[str, str], connections: int, options: argparse.Namespace) -> None:
    """Loads the servers in turns, prints each one's medians and gpuplan's ratio to each of the others."""
    turns: dict[str, list[Load]] = {name: [] for name in urls}
    for _ in range(options.rounds):
        for name, url in urls.items():
            turns[name].append(uvloop.run(load(url, connections, options.seconds)))
    print(f"{connections} connection(s)")
    for name, loads in turns.items():
        rate, p50, p99 = (statistics.median(values) for values in zip(*loads, strict=True))
        print(f"  {name:8} {rate:7.0f} requests/s   p50 {p50:7.2f} ms   p99 {p99:7.2f} ms")
    for name, loads in turns.items():
        if name != "gpuplan":
            pairs = zip(turns["gpuplan"], loads, strict=True)
            ratios = zip(*([a / b for a, b in zip(*pair, strict=True)] for pair in pairs), strict=True)
            rate, p50, p99 = (statistics.median(values) for values in ratios)
            print(f"  gpuplan / {name:6}: requests/s x {rate:.2f}, p50 x {p50:.2f}, p99 x {p99:.2f}")


async def load(url: str, connections: int, seconds: float) -> Load:
    """Closed loops over `connections` connections for `seconds`, after a short warm-up."""
    target = Target.parse(url)
    pool = Pool(target, timeout_s=30)
    ids = np.random.default_rng(7).integers(1, VOCABULARY, (512, TOKENS)).tolist()
    payloads = [target.request("POST", "", msgspec.json.encode(Asked("mlp", row))) for row in ids]
    begin_s = time.monotonic() + WARM_S
    end_s = begin_s + seconds
    waits_s: list[float] = []

    async def loop(turn: int) -> None:
        while time.monotonic() < end_s:
            exchange = Exchange()
            turn += connections
            await pool.send(payloads[turn % len(payloads)], exchange)
            if exchange.error or exchange.status != 200:
                raise SystemExit(f"{url} answered {exchange.error or exchange.status}: {exchange.pieces}")
            if exchange.sent_s >= begin_s and exchange.done_s < end_s:
                waits_s.append(exchange.done_s - exchange.sent_s)

    await pool.warm(connections)
    try:
        await asyncio.gather(*(loop(i) for i in range(connections)))
    finally:
        pool.close()
    p50, p99 = np.percentile(waits_s, [50, 99]) * 1e3
    return Load(len(waits_s) / seconds, p50, p99)


async def stream(url: str, sequences: int, seconds: float) -> float:
    """Tokens per second of the steady part of waves of sequences, the median over waves for `seconds`."""
    target = Target.parse(url)
    pool = Pool(target, timeout_s=30)
    rng = np.random.default_rng(7)
    asked = {"model": "chat", "max_tokens": ANSWER, "temperature": 0, "ignore_eos": True, "stream": True}
    rates: list[float] = []

    async def wave() -> float:
        exchanges = [Exchange() for _ in range(sequences)]
        payloads = []
        for _ in exchanges:
            body = {**asked, "prompt": rng.integers(97, 123, TOKENS).tolist()}
            payloads.append(target.request("POST", "", msgspec.json.encode(body)))
        await asyncio.gather(*(pool.send(*pair) for pair in zip(payloads, exchanges, strict=True)))
        times = [token_times_s(exchange, url) for exchange in exchanges]
        begin_s, end_s = max(t[0] for t in times), min(t[-1] for t in times)
        counted = sum(begin_s < at_s <= end_s for t in times for at_s in t)
        return counted / (end_s - begin_s)

    await pool.warm(sequences)
    try:
        await wave()
        end_s = time.monotonic() + seconds
        while time.monotonic() < end_s:
            rates.append(await wave())
    finally:
        pool.close()
    return statistics.median(rates)


def token_times_s(exchange: Exchange, url: str) -> list[float]:
    """When each token came. Greedy tokens of tiny-chat are letters, so each has an event of its own."""
    if exchange.error or exchange.status != 200:
        raise SystemExit(f"{url} answered {exchange.error or exchange.status}: {exchange.pieces}")
    times = [at_s for at_s, piece in exchange.pieces for _ in range(piece.count(b'"finish_reason":null'))]
    if len(times) != ANSWER:
        raise SystemExit(f"{url} streamed {len(times)} events for {ANSWER} tokens")
    return times


def offline_s(folder: Path, threads: int, size: int) -> float:
    """Median seconds of a `session.run` on a batch of that size."""
    session = session_of(str(folder / "model.onnx"), threads)
    ids = np.random.default_rng(7).integers(1, VOCABULARY, (size, TOKENS))
    times = []
    for _ in range(60):
        begun = time.perf_counter()
        session.run(None, {"input_ids": ids})
        times.append(time.perf_counter() - begun)
    return statistics.median(times[10:])


# --- the model ----------------------------------------------------------------------------------------------------


def write_model(folder: Path, options: argparse.Namespace) -> None:
    """`model.onnx`, `tokenizer.json`, `config.json` and a scenario that serves them on the CPU. Always the same."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper
    from tokenizers import Tokenizer, models, pre_tokenizers

    layers, width = options.layers, options.width
    rng = np.random.default_rng(0)

    def weights(name: str, rows: int, columns: int, scale: float) -> Any:
        return numpy_helper.from_array((rng.standard_normal((rows, columns)) * scale).astype(np.float32), name)

    constants = [weights("embedding", VOCABULARY, width, 1.0)]
    nodes = [
        helper.make_node("Gather", ["embedding", "input_ids"], ["embedded"]),
        helper.make_node("ReduceMean", ["embedded"], ["x0"], axes=[1], keepdims=0),
    ]
    for i in range(layers):
        constants.append(weights(f"w{i}", width, width, (2 / width) ** 0.5))
        nodes.append(helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"y{i}"]))
        nodes.append(helper.make_node("Relu", [f"y{i}"], [f"x{i + 1}"]))
    constants.append(weights("out", width, 2, width**-0.5))
    nodes.append(helper.make_node("MatMul", [f"x{layers}", "out"], ["logits"]))
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "tokens"])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", 2])],
        constants,
    )
    opset = [helper.make_opsetid("", 17)]
    onnx.save(helper.make_model(graph, opset_imports=opset, ir_version=9), str(folder / "model.onnx"))
    vocabulary = Tokenizer(models.WordLevel({"[UNK]": 0, **{f"w{i}": i for i in range(1, VOCABULARY)}}, "[UNK]"))
    vocabulary.pre_tokenizer = pre_tokenizers.Whitespace()
    vocabulary.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"id2label": {"0": "no", "1": "yes"}}))
    rule = {"max_batch_size": BATCH, "max_queue_delay": f"{DELAY_MS}ms", "max_queue_size": 1024}
    replica = {"model": "mlp", "slice": "cpu", "threads": options.threads, "worker": options.worker}
    scenario = {
        "name": "serving-benchmark",
        "models": {"mlp": {"onnx": str(folder / "model.onnx")}},
        "deployment": {"gpu": "cpu", "replicas": [replica], "batching": {"mlp": rule}},
    }
    (folder / "scenario.yaml").write_text(json.dumps(scenario))  # JSON is YAML


def write_decoder(folder: Path, options: argparse.Namespace) -> None:
    """A scenario that serves tiny-chat on the CPU."""
    replica = {"model": "chat", "slice": "cpu", "threads": options.threads, "worker": options.worker}
    scenario = {
        "name": "decoding-benchmark",
        "models": {"chat": {"builtin": "tiny-chat"}},
        "deployment": {"gpu": "cpu", "replicas": [replica], "batching": {"chat": {"max_batch_size": SEQUENCES}}},
    }
    (folder / "scenario.yaml").write_text(json.dumps(scenario))


def session_of(model: str | bytes, threads: int) -> Any:
    """The session as gpuplan's engine opens it: the same threads, no spinning."""
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def answers(session: Any, batch: Sequence[Sequence[int]]) -> list[dict[str, Any]]:
    """Labels and scores of equally long prompts."""
    (logits,) = session.run(None, {"input_ids": np.asarray(batch, dtype=np.int64)})
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares = (weights / weights.sum(axis=1, keepdims=True)).tolist()
    named = [{"no": no, "yes": yes} for no, yes in shares]
    return [{"label": max(s, key=s.__getitem__), "confidence": max(s.values()), "scores": s} for s in named]


# --- the servers --------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def gpuplan(folder: Path, path: str) -> Iterator[str]:
    """`gpuplan serve` of this tree."""
    arguments = ["serve", str(folder / "scenario.yaml"), "--port", "0", "--json", "--telemetry", "none"]
    with process([sys.executable, "-m", "gpuplan", *arguments], {}) as server:
        yield json.loads(server.stdout.readline())["url"] + path


@contextlib.contextmanager
def mosec(folder: Path, threads: int) -> Iterator[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    told = {"MOSEC_ADDRESS": "127.0.0.1", "MOSEC_PORT": str(port), "MOSEC_LOG_LEVEL": "error"}
    told |= {FOLDER: str(folder), THREADS: str(threads)}
    with process([sys.executable, str(Path(__file__).with_name("serving_mosec.py"))], told):
        until_answering(port)
        yield f"http://127.0.0.1:{port}/inference"


@contextlib.contextmanager
def bare(folder: Path, threads: int) -> Iterator[str]:
    told = {FOLDER: str(folder), THREADS: str(threads)}
    with process([sys.executable, __file__, "--serve-bare"], told) as server:
        yield f"http://127.0.0.1:{int(server.stdout.readline())}/v1/classify"


@contextlib.contextmanager
def bare_loop(threads: int) -> Iterator[Callable[[int, float], float]]:
    """The loop's process; the function runs it on a batch of that size for so many seconds and gives its tokens/s."""
    with process([sys.executable, __file__, "--loop-bare"], {THREADS: str(threads)}) as looping:

        def rate(rows: int, seconds: float) -> float:
            looping.stdin.write(f"{rows} {seconds}\n")
            looping.stdin.flush()
            return float(looping.stdout.readline())

        yield rate


@contextlib.contextmanager
def process(command: list[str], told: dict[str, str]) -> Iterator[Any]:
    environment = {**os.environ, "PYTHONPATH": str(TREE), "OMP_NUM_THREADS": "1", **told}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    server = subprocess.Popen(command, env=environment, text=True, start_new_session=True, **pipes)
    try:
        yield server
    finally:
        server.send_signal(signal.SIGTERM)
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            os.killpg(server.pid, signal.SIGKILL)


def until_answering(port: int) -> None:
    """Returns when the server gives a 200; its workers load the model after its port is open."""
    import httpx

    end_s = time.monotonic() + START_S_MAX
    body = msgspec.json.encode(Asked("mlp", [1] * TOKENS))
    while time.monotonic() < end_s:
        with contextlib.suppress(httpx.TransportError):
            if httpx.post(f"http://127.0.0.1:{port}/inference", content=body).status_code == 200:
                return
        time.sleep(0.2)
    raise SystemExit("mosec did not start")


class Bare(asyncio.Protocol):
    """The least that a server can do: it parses a request, runs the session where it stands, and writes."""

    session: Any
    decode = msgspec.json.Decoder(Asked).decode
    encode = msgspec.json.Encoder().encode

    def connection_made(self, transport: Any) -> None:
        self._transport = transport
        self._parser = httptools.HttpRequestParser(self)
        self._body = b""

    def data_received(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_body(self, body: bytes) -> None:
        self._body += body

    def on_message_complete(self) -> None:
        asked, self._body = Bare.decode(self._body), b""
        body = Bare.encode(answers(Bare.session, [asked.input])[0])
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body)
        self._transport.write(head + body)


async def serve_bare() -> None:
    Bare.session = session_of(str(Path(os.environ[FOLDER]) / "model.onnx"), int(os.environ[THREADS]))
    server = await asyncio.get_running_loop().create_server(Bare, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, server.close)
    with contextlib.suppress(asyncio.CancelledError):
        await server.serve_forever()


def loop_bare() -> None:
    """Runs waves as told by lines of rows and seconds, and answers each with the median wave's tokens/s."""
    from gpuplan.serve.builtin import tiny_chat

    session = session_of(tiny_chat.model(), int(os.environ[THREADS]))
    for line in sys.stdin:
        rows, seconds = line.split()
        end_s = time.monotonic() + float(seconds)
        rates = [wave(session, int(rows))]
        while time.monotonic() < end_s:
            rates.append(wave(session, int(rows)))
        print(statistics.median(rates[1:] or rates), flush=True)


def wave(session: Any, rows: int) -> float:
    """One prompt for each row, then a token a step from the cache of the step before: tokens/s after the prompts."""
    import onnxruntime as ort

    pasts = [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]
    heads, head = (session.get_inputs()[-1].shape[axis] for axis in (1, 3))
    cache = [ort.OrtValue.ortvalue_from_numpy(np.zeros((rows, heads, 0, head), np.float32)) for _ in pasts]
    ids = np.random.default_rng(7).integers(97, 123, (rows, TOKENS))
    begun_s = columns = 0
    for step in range(ANSWER):
        width = ids.shape[1]
        binding = session.io_binding()
        binding.bind_cpu_input("input_ids", ids)
        binding.bind_cpu_input("attention_mask", np.ones((rows, columns + width), np.int64))
        binding.bind_cpu_input("position_ids", np.tile(np.arange(columns, columns + width), (rows, 1)))
        for name, value in zip(pasts, cache, strict=True):
            binding.bind_ortvalue_input(name, value)
        binding.bind_output("logits", "cpu")
        for name in pasts:
            binding.bind_output(name.replace("past_key_values.", "present."), "cpu")
        session.run_with_iobinding(binding)
        logits, *cache = binding.get_outputs()
        ids = logits.numpy()[:, -1].argmax(axis=1)[:, None]
        columns += width
        if step == 0:
            begun_s = time.perf_counter()
    return rows * (ANSWER - 1) / (time.perf_counter() - begun_s)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("what", nargs="*", default=["classifying"], help=f"of {', '.join(BENCHMARKS)}")
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=1, help="ONNX Runtime's, in every server")
    parser.add_argument("--worker", choices=("process", "thread"), default="process", help="where gpuplan computes")
    parser.add_argument("--serve-bare", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--loop-bare", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_bare:
        uvloop.run(serve_bare())
    elif options.loop_bare:
        loop_bare()
    else:
        for name in options.what:
            BENCHMARKS[name](options)


if __name__ == "__main__":
    main()
