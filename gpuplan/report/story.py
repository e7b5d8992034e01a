"""One request's story in words, for the console and as data. Takes a `record.moments.Story`; computes nothing.

A line for each moment, its time first; what took a while rather than happened has no time of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from gpuplan.record import moments
from gpuplan.report import words

OTHERS_SHOWN = 8

REFUSED = {
    "queue_full": "the model's queue was full",
    "class_full": "as many of its class waited as may",
    "rate_limited": "its class or key had used up what it may ask for",
    "deadline": "by the estimate its answer would have come after its deadline",
    "circuit_open": "the model, or every replica that could hold it, had failed too often and was left alone",
    "draining": "the server was shutting down",
    "no_replica": "no replica of the model was up",
    "too_long": "it needs more KV cache than any replica has",
}
FAILED = {
    "timeout": "its deadline passed",
    "replica_lost": "its replica was lost, and it was not tried again",
    "no_replica": "no replica was left to wait for",
    "out_of_memory": "its replica had no memory for it, even alone",
    "nan_output": "the model's output was not a number",
    "too_long": "its prompt is longer than the model takes",
    "bad_token": "one of its tokens is not in the model's vocabulary",
}
CAUSES = {
    "stolen": "taken over by {new}, no longer waiting for {old}",
    "lost": "moved to {new}, as {old} is down",
    "swapped": "moved to {new}, which replaces {old}",
    "stopped": "moved to {new}, as {old} is to stop",
    "left_alone": "moved to {new}, as {old} is left alone",
}
MISSING = {
    "no_log": "there is no decision log: the server told nothing of its decisions",
    "no_arrival": "the decision log has no arrival of it: it was refused at the door, or never reached the server",
    "no_end": "the decision log ends before it does",
}
PARTS = {
    "on_the_way": "on the way",
    "waiting": "waiting",
    "prompt": "prompt",
    "decoding": "decoding",
    "running": "running",
    "lost": "lost",
}


def lines(told: moments.Story) -> Iterator[str]:
    """The story for a terminal."""
    yield _safe(_head(told))
    for moment in told.moments:
        timed = moment.at_s is not None and not isinstance(moment, moments.Steps)
        time = f"{moment.at_s:8.3f} s" if timed else " " * 10
        yield _safe(f"{time}  {_text(moment)}")


def as_data(told: moments.Story) -> list[dict[str, Any]]:
    """The story as data: what was asked, then each moment with its time, its kind, its words and its facts."""
    asked = {f.name: getattr(told, f.name) for f in dataclasses.fields(told) if f.name != "moments"}
    head = {"at_s": None, "kind": "request", "text": _head(told), **asked}
    return [
        head,
        *(
            {"at_s": moment.at_s, "kind": moment.kind, "text": _text(moment), **dataclasses.asdict(moment)}
            for moment in told.moments
        ),
    ]


def _head(told: moments.Story) -> str:
    asked = f"request {told.request_id} ({told.traffic_class}): {_count(told.prompt_tokens, 'prompt token')}"
    return asked + (f", {words.count(told.output_tokens)} to generate" if told.output_tokens else "")


def _text(moment: moments.Moment) -> str:
    match moment:
        case moments.Scheduled(sent_after_s=None):
            return "scheduled; never sent"
        case moments.Scheduled(sent_after_s=after_s):
            return f"scheduled; sent {_span(after_s)} later" if after_s else "scheduled and sent"
        case moments.Note(missing=missing):
            return MISSING[missing]
        case moments.Arrived():
            return "arrived"
        case moments.Waits():
            return _waits(moment)
        case moments.Starts(step_id=None):
            return f"first step on {moment.replica}"
        case moments.Starts():
            prompt = f"{words.count(moment.tokens)} of {_count(moment.prompt_tokens, 'prompt token')}"
            return f"first step on {moment.replica} (#{moment.step_id}): {prompt}, {_batch(moment.batch_size)}"
        case moments.Steps():
            return _steps(moment)
        case moments.StepFails():
            failed = f"step #{moment.step_id} on {moment.replica} failed after {_span(moment.took_s)} ({moment.reason})"
            if not moment.others:
                return f"{failed}, and it was alone in it"
            return f"{failed}, with {_others(moment.others)}; all run again in halves"
        case moments.RunsAgain(others=()):
            return f"runs again alone (#{moment.step_id})"
        case moments.RunsAgain():
            return f"runs again with {_others(moment.others)} (#{moment.step_id})"
        case moments.ReplicaLost():
            return _replica_lost(moment)
        case moments.LeftAlone():
            return f"{moment.replica} is left alone from here on: {moment.reason}"
        case moments.FirstToken(ttft_ms=None):
            return "first token at the server; its client tells of none"
        case moments.FirstToken():
            return f"first token, TTFT {words.ms(moment.ttft_ms)} ms"
        case moments.Ended():
            return _ended(moment)
        case moments.Answered():
            return _answered(moment)


def _waits(moment: moments.Waits) -> str:
    expected = f"expected after {_span(moment.expected_s)}"
    if moment.cause == "stolen":
        return f"{CAUSES['stolen'].format(new=moment.replica, old=moment.taken_from)}; {expected}"
    behind = f"behind {_count(moment.ahead, 'other')}" if moment.ahead else "first in line"
    if not moment.taken_from:
        again = "" if moment.cause == "arrival" else "again "
        return f"waits {again}for {moment.replica}, {behind}; answer {expected}"
    moved = CAUSES[moment.cause].format(new=moment.replica, old=moment.taken_from)
    return f"{moved}, {behind}; answer {expected}"


def _steps(moment: moments.Steps) -> str:
    least, most = moment.batch_size_min, moment.batch_size_max
    median = words.general(moment.batch_size_median)
    sizes = f"in batches of {least} to {most} (median {median})" if least < most else _batch(most)
    of_prompt = " of its prompt" if moment.phase == "prompt" else ""
    if moment.steps == 1:
        size, took = _batch(most), _span(moment.longest_s)
        text = f"1 more step{of_prompt} (#{moment.longest_step_id}), {size}, {took}"
    else:
        prefilling = ", prefilling others" if moment.longest_prefills else ""
        longest = f"the longest {_span(moment.longest_s)} (#{moment.longest_step_id}{prefilling})"
        count = f"{words.count(moment.steps)} more steps{of_prompt}"
        text = f"{count}, {sizes}, {_span(moment.mean_s)} each on average, {longest}"
    return text + (f"; {_count(moment.sat_out, 'step')} meanwhile without it" if moment.sat_out else "")


def _replica_lost(moment: moments.ReplicaLost) -> str:
    down = f"{moment.replica} went down" + (f" ({moment.reason})" if moment.reason else "")
    if moment.step_id is not None:
        down += f", and step #{moment.step_id} with it"
    elif moment.started:
        down += ", between two steps of it"
    if moment.tokens:
        down += f", {_count(moment.tokens, 'token')} into its answer"
    return down + ("; it is started again" if moment.returns else "")


def _ended(moment: moments.Ended) -> str:
    after = f"after {_span(moment.total_s)}"
    match moment.outcome:
        case "refused":
            again = f"; to be tried again after {_span(moment.retry_after_s)}" if moment.retry_after_s else ""
            return f"refused: {REFUSED.get(moment.reason, moment.reason)}{again}"
        case "completed":
            how = f"complete {after}"
        case "cancelled":
            how = f"cancelled {after}: its client is gone"
        case "failed":
            how = f"failed {after}: {FAILED.get(moment.reason, moment.reason)}"
    parts = ", ".join(f"{PARTS[p.name]} {_span(p.seconds)} ({p.share:.0%})".replace("%", " %") for p in moment.parts)
    return f"{how}{': ' if moment.outcome == 'completed' else '; '}{parts}" if parts else how


def _answered(moment: moments.Answered) -> str:
    status = "" if moment.http_status is None else f" HTTP {moment.http_status}"
    after = f" after {_span(moment.total_s)}" if moment.total_s is not None else ""
    tokens = f", {_count(moment.tokens, 'token')}" if moment.tokens else ""
    if moment.status == "completed":
        return f"answered{after}{tokens}"
    why = ": ".join(part for part in (moment.error, moment.message) if part)
    return f"its client:{status} {moment.status}{after}{tokens}" + (f" ({why})" if why else "")


def _batch(size: int | None) -> str:
    return "alone" if size == 1 else f"in a batch of {size}"


def _others(ids: tuple[str, ...]) -> str:
    shown = ", ".join(ids[:OTHERS_SHOWN])
    return shown + (f" and {len(ids) - OTHERS_SHOWN} more" if len(ids) > OTHERS_SHOWN else "")


def _count(count: int, what: str) -> str:
    return f"{words.count(count)} {what}{'' if count == 1 else 's'}"


def _span(seconds: float) -> str:
    if seconds == 0:
        return "0 ms"
    return f"{words.number(seconds)} s" if seconds >= 1 else f"{words.ms(seconds * 1e3)} ms"


def _safe(line: str) -> str:
    """Names and messages of others: no control characters, which a terminal would obey."""
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in line)
