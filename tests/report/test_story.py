"""Moments in words: one row a kind, and every reason of the vocabulary has its sentence."""

from __future__ import annotations

import typing

import pytest

from gpuplan.policy.vocabulary import RejectReason
from gpuplan.record import moments
from gpuplan.record.moments import Moment, Part, Story
from gpuplan.report.story import CAUSES, MISSING, PARTS, REFUSED, as_data, lines


def told(*moments: Moment) -> Story:
    return Story(17, "chat", "assistant", 213, 120, moments)


ROWS: list[tuple[Moment, str]] = [
    (moments.Scheduled(1.204, None), "   1.204 s  scheduled; never sent"),
    (moments.Scheduled(1.204, 0.0002), "   1.204 s  scheduled; sent 0.20 ms later"),
    (moments.Waits(1.205, "chat-1", 3, 1.42, "", "arrival"), "   1.205 s  waits for chat-1, behind 3 others; answer expected after 1.42 s"),
    (moments.Waits(1.205, "chat-1", 1, 1.42, "", "lost"), "   1.205 s  waits again for chat-1, behind 1 other; answer expected after 1.42 s"),
    (moments.Waits(1.39, "chat-0", 0, 0.8, "chat-1", "stolen"), "   1.390 s  taken over by chat-0, no longer waiting for chat-1; expected after 800 ms"),
    (moments.Waits(1.39, "chat-0#2", 0, 0.8, "chat-0", "swapped"), "   1.390 s  moved to chat-0#2, which replaces chat-0, first in line; answer expected after 800 ms"),
    (moments.Waits(1.39, "chat-0", 2, 0.8, "chat-1", "lost"), "   1.390 s  moved to chat-0, as chat-1 is down, behind 2 others; answer expected after 800 ms"),
    (moments.Starts(1.391, "chat-0", 88, 213, 213, 9), "   1.391 s  first step on chat-0 (#88): 213 of 213 prompt tokens, in a batch of 9"),
    (moments.Starts(1.391, "chat-0", 88, 100, 213, 1), "   1.391 s  first step on chat-0 (#88): 100 of 213 prompt tokens, alone"),
    (moments.Steps(1.455, "decode", "chat-0", 119, 7, 12, 9.0, 0.0142, 0.031, 102, 1, 0), "            119 more steps, in batches of 7 to 12 (median 9), 14.2 ms each on average, the longest 31.0 ms (#102, prefilling others)"),
    (moments.Steps(1.455, "decode", "chat-0", 2, 7, 7, 7.0, 0.0142, 0.031, 102, 0, 3), "            2 more steps, in a batch of 7, 14.2 ms each on average, the longest 31.0 ms (#102); 3 steps meanwhile without it"),
    (moments.Steps(1.455, "prompt", "chat-0", 1, 7, 7, 7.0, 0.031, 0.031, 102, 1, 0), "            1 more step of its prompt (#102), in a batch of 7, 31.0 ms"),
    (moments.StepFails(1.4, "chat-0", 90, "engine_error", 0.012, ("3", "5")), "   1.400 s  step #90 on chat-0 failed after 12.0 ms (engine_error), with 3, 5; all run again in halves"),
    (moments.StepFails(1.4, "chat-0", 90, "engine_error", 0.0, ()), "   1.400 s  step #90 on chat-0 failed after 0 ms (engine_error), and it was alone in it"),
    (moments.RunsAgain(1.4, "chat-0", 91, tuple(map(str, range(10)))), "   1.400 s  runs again with 0, 1, 2, 3, 4, 5, 6, 7 and 2 more (#91)"),
    (moments.RunsAgain(1.4, "chat-0", 91, ()), "   1.400 s  runs again alone (#91)"),
    (moments.ReplicaLost(1.4, "chat-0", "killed", True, True, 91, 2), "   1.400 s  chat-0 went down (killed), and step #91 with it, 2 tokens into its answer; it is started again"),
    (moments.ReplicaLost(1.4, "chat-0", "", False, False, None, 0), "   1.400 s  chat-0 went down"),
    (moments.LeftAlone(1.4, "chat-0", "5 failures"), "   1.400 s  chat-0 is left alone from here on: 5 failures"),
    (moments.FirstToken(1.455, 1.45, 251.0), "   1.455 s  first token, TTFT 251 ms"),
    (moments.FirstToken(1.45, 1.45, None), "   1.450 s  first token at the server; its client tells of none"),
    (moments.Ended(3.15, "completed", "", 0.0, 1.95, (Part("waiting", 0.186, 0.095), Part("decoding", 1.69, 0.87))), "   3.150 s  complete after 1.95 s: waiting 186 ms (10 %), decoding 1.69 s (87 %)"),
    (moments.Ended(1.3, "refused", "queue_full", 2.0, 0.1, (Part("on_the_way", 0.1, 1.0),)), "   1.300 s  refused: the model's queue was full; to be tried again after 2.00 s"),
    (moments.Ended(1.3, "refused", "too_long", 0.0, 0.1, ()), "   1.300 s  refused: it needs more KV cache than any replica has"),
    (moments.Ended(1.3, "failed", "engine_error: Boom", 0.0, 0.1, (Part("lost", 0.1, 1.0),)), "   1.300 s  failed after 100 ms: engine_error: Boom; lost 100 ms (100 %)"),
    (moments.Ended(1.3, "failed", "timeout", 0.0, 0.1, ()), "   1.300 s  failed after 100 ms: its deadline passed"),
    (moments.Ended(1.3, "cancelled", "", 0.0, 0.1, ()), "   1.300 s  cancelled after 100 ms: its client is gone"),
    (moments.Answered(1.3, "rejected", "class_full", "too many", 429, 0, 0.1), "   1.300 s  its client: HTTP 429 rejected after 100 ms (class_full: too many)"),
    (moments.Answered(None, "interrupted", "", "", None, 1, None), "            its client: interrupted, 1 token"),
    (moments.Answered(1.3, "completed", "", "", 200, 3, 0.1), "   1.300 s  answered after 100 ms, 3 tokens"),
]  # fmt: skip


@pytest.mark.parametrize(("moment", "said"), ROWS, ids=[f"{m.kind}-{i}" for i, (m, _) in enumerate(ROWS)])
def test_every_moment_has_its_line(moment: Moment, said: str) -> None:
    assert list(lines(told(moment))) == ["request 17 (chat): 213 prompt tokens, 120 to generate", said]


def test_every_kind_is_in_the_table() -> None:
    shown = {type(moment) for moment, _ in ROWS} | {moments.Note, moments.Arrived}
    assert shown == set(typing.get_args(Moment))


def test_every_word_of_the_vocabulary_has_one_here() -> None:
    assert set(REFUSED) == set(typing.get_args(RejectReason))
    assert set(CAUSES) == set(typing.get_args(moments.Cause)) - {"arrival"}
    assert set(MISSING) == set(typing.get_args(moments.Missing))
    assert set(PARTS) == set(typing.get_args(typing.get_type_hints(Part)["name"]))


def test_what_others_wrote_is_no_command_to_a_terminal() -> None:
    hostile = moments.Answered(1.3, "error", "in_stream", "\x1b]0;title\x07no", 200, 0, 0.1)
    (_, line) = lines(told(hostile))
    assert "\x1b" not in line and "\x07" not in line and "no)" in line


def test_data_has_the_facts_beside_the_words() -> None:
    head, one = as_data(told(moments.LeftAlone(1.4, "chat-0", "5 failures")))
    assert (head["kind"], head["request_id"], head["output_tokens"]) == ("request", 17, 120)
    text = "chat-0 is left alone from here on: 5 failures"
    assert one == {"at_s": 1.4, "kind": "left_alone", "text": text, "replica": "chat-0", "reason": "5 failures"}
