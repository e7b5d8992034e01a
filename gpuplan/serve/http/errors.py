"""Every answer that is an error: which status, and in which words.

400 for what is wrong with a request, 401 without the key, 404 for a model or route that is not here, 405 for a wrong
method, 408 and 413 for a body too slow or too large, 429 with Retry-After when a model's queue is full, 503 while
draining or without a replica, 500 when an engine failed. No internal name is ever told.
"""

from __future__ import annotations

import math

from gpuplan.serve.server import RequestFailed, RequestRefused


class Refusal(Exception):
    """An answer that is an error. `headers` are added to it."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        retry_after_s: float | None = None,
        headers: tuple[tuple[bytes, bytes], ...] = (),
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param = status, message, param
        if retry_after_s is not None:
            headers = (*headers, (b"retry-after", b"%d" % math.ceil(retry_after_s)))
        self.headers = headers


_REFUSED = {
    "queue_full": (429, "the model's queue is full"),
    "draining": (503, "the server is shutting down"),
    "no_replica": (503, "no replica of the model is up"),
    "too_long": (400, "the request needs more KV cache than any replica has"),
}
# What an admitted request may meet, in words; everything else is a 500 with its reason.
_FAILED = {
    "out_of_memory": (503, "model unavailable: out of GPU memory"),
    "replica_lost": (503, "the replica that ran the request was lost"),
    "no_replica": (503, "no replica of the model is up"),
    "nan_output": (500, "the model's output was not a number"),
    "too_long": (400, "the prompt is longer than the model takes"),
    "bad_token": (400, "a token id is not in the model's vocabulary"),
}


def refusal_of(error: RequestRefused | RequestFailed) -> Refusal:
    """The answer to a request that the server would not take, or took and lost."""
    if isinstance(error, RequestFailed):
        return Refusal(*failure(error))
    status, message = _REFUSED[error.reason]
    closing = ((b"connection", b"close"),) if error.reason == "draining" else ()
    return Refusal(status, message, retry_after_s=error.retry_after_s if status != 400 else None, headers=closing)


def failure(error: RequestRefused | RequestFailed) -> tuple[int, str]:
    """Status and words of a request that was lost after it was taken."""
    return _FAILED.get(str(error), (500, f"the request failed: {error}"))
