"""How many streamed requests a second one process of the load generator can make, beside plain httpx, in one run.

Both drive the same minimal server (a process of its own: 16 tokens a response, no waiting) with the same number of
connections, one after the other and twice over, so that a noisy machine hits both. Prints rates and their ratio.

    python benchmarks/load_generator.py [--seconds 3] [--connections 32]
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable
from typing import Any

import httpx
import uvloop

from gpuplan.load.wire import Exchange, Pool, Target

TOKENS = 16
EVENT = b'data: {"id":"x","object":"text_completion","choices":[{"index":0,"text":"word ","finish_reason":null}]}\n\n'
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
CHUNK = b"%x\r\n%b\r\n" % (len(EVENT), EVENT)
ANSWER = [HEAD, *[CHUNK] * TOKENS, b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"]

Client = Callable[[str, int, float], Awaitable[int]]


class Minimal(asyncio.Protocol):
    """Answers whatever comes with ANSWER, a write for each token."""

    def connection_made(self, transport: Any) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        for piece in ANSWER:
            self._transport.write(piece)


async def serve() -> None:
    server = await asyncio.get_running_loop().create_server(Minimal, "127.0.0.1", 0)
    sys.stdout.write(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await server.serve_forever()


async def with_gpuplan(url: str, connections: int, seconds: float) -> int:
    target = Target.parse(url)
    pool = Pool(target, timeout_s=30)
    payload = target.request("POST", "/v1/completions", b'{"prompt":"x"}')
    end_s = time.monotonic() + seconds

    async def loop() -> int:
        done = 0
        while time.monotonic() < end_s:
            exchange = Exchange()
            await pool.send(payload, exchange)
            assert exchange.error is None and len(b"".join(p for _, p in exchange.pieces)) > TOKENS * len(EVENT)
            done += 1
        return done

    total = sum(await asyncio.gather(*(loop() for _ in range(connections))))
    pool.close()
    return total


async def with_httpx(url: str, connections: int, seconds: float) -> int:
    end_s = time.monotonic() + seconds
    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=connections), timeout=30) as client:

        async def loop() -> int:
            done = 0
            while time.monotonic() < end_s:
                async with client.stream("POST", f"{url}/v1/completions", content=b'{"prompt":"x"}') as response:
                    assert sum([len(piece) async for piece in response.aiter_bytes()]) > TOKENS * len(EVENT)
                done += 1
            return done

        return sum(await asyncio.gather(*(loop() for _ in range(connections))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--connections", type=int, default=32)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve:
        uvloop.run(serve())
        return
    server = subprocess.Popen([sys.executable, __file__, "--serve"], stdout=subprocess.PIPE, text=True)
    try:
        assert server.stdout is not None
        url = server.stdout.readline().strip()
        clients: dict[str, Client] = {"gpuplan": with_gpuplan, "httpx": with_httpx}
        best: dict[str, float] = {}
        for _ in range(2):
            for name, client in clients.items():
                made = uvloop.run(client(url, options.connections, options.seconds))
                best[name] = max(best.get(name, 0.0), made / options.seconds)
        for name, rate in best.items():
            print(f"{name:8} {rate:8.0f} streamed requests/s")
        print(f"gpuplan makes {best['gpuplan'] / best['httpx']:.1f} x the requests of httpx, {TOKENS} tokens each")
    finally:
        server.kill()


if __name__ == "__main__":
    main()
