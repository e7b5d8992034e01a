"""Every answer that is an error: which status, and in which words.

400 for what is wrong with a request, 401 without the key, 404 for a model or route that is not here, 405 for a wrong
method, 408 and 413 for a body too slow or too large, 429 when the client's class or key has asked for more than it may,
503 when the server is overloaded, draining or without a replica, 504 when the time that a request had is over, 500 when
an engine failed. 429 and 503 say when to come back; where that is of no use, OpenAI's client is told not to try again.
No internal name is ever told.
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
    "queue_full": (503, "overloaded: the model's queue is full"),
    "class_full": (429, "as many requests of this traffic class wait as may"),
    "rate_limited": (429, "this traffic class or key has asked for as much as it may"),
    "deadline": (503, "overloaded: the answer would come after the request's deadline"),
    "circuit_open": (503, "the model fails again and again, and is left alone for a while"),
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
    "timeout": (504, "the request was not answered within its deadline"),
    "too_long": (400, "the prompt is longer than the model takes"),
    "bad_token": (400, "a token id is not in the model's vocabulary"),
}


_CLOSE = ((b"connection", b"close"),)
_NO_RETRY = ((b"x-should-retry", b"false"),)


def refusal_of(error: RequestRefused | RequestFailed) -> Refusal:
    """The answer to a request that the server would not take, or took and lost."""
    if isinstance(error, RequestFailed):
        status, message = failure(error)
        return Refusal(status, message, headers=_NO_RETRY if status == 504 else ())
    status, message = _REFUSED[error.reason]
    headers = _CLOSE if error.reason == "draining" else _NO_RETRY if error.reason == "deadline" else ()
    return Refusal(status, message, retry_after_s=error.retry_after_s if status != 400 else None, headers=headers)


def failure(error: RequestRefused | RequestFailed) -> tuple[int, str]:
    """Status and words of a request that was lost after it was taken."""
    return _FAILED.get(str(error), (500, f"the request failed: {error}"))
