"""The mosec server of `serving.py`: the same session, a whole batch in one call, msgspec for JSON. Started by it.

A file of its own, because mosec reads the command line as soon as it is imported, and its workers import this again.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec
from mosec import Server, Worker
from serving import BATCH, DELAY_MS, FOLDER, THREADS, Asked, answers, session_of


class Classifier(Worker):
    def __init__(self) -> None:
        super().__init__()
        self._session = session_of(Path(os.environ[FOLDER]) / "model.onnx", int(os.environ[THREADS]))
        self._decode, self._encode = msgspec.json.Decoder(Asked).decode, msgspec.json.Encoder().encode

    def deserialize(self, data: bytes) -> list[int]:
        return self._decode(data).input

    def serialize(self, data: Any) -> bytes:
        return self._encode(data)

    def forward(self, data: list[list[int]]) -> list[dict[str, Any]]:
        return answers(self._session, data)


if __name__ == "__main__":
    server = Server()
    server.append_worker(Classifier, num=1, max_batch_size=BATCH, max_wait_time=DELAY_MS)
    server.run()
