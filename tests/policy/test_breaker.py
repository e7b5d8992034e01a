"""A breaker opens for a reason that it names, tries with one request, and is patient with what does not get better."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gpuplan.policy.breaker import Breaker
from gpuplan.scenario.demand import BreakerSpec

SPEC = BreakerSpec(consecutive_failures=3, failure_rate=0.5, window=8, slow_factor=4.0, open=5.0, open_max=15.0)


def follow(breaker: Breaker, table: list[tuple[float, str, str]]) -> None:
    """Rows of (now_s, what happens, the Trip that follows). `ok` and `bad` are outcomes, `x4.2` a smoothed ratio."""
    for row, (now_s, what, expected) in enumerate(table):
        before, trip = breaker.state, None
        match what:
            case "ok" | "bad":
                trip = breaker.record(what == "ok", now_s=now_s)
            case "wake":
                trip = breaker.wake(now_s=now_s)
            case "sent":
                assert breaker.allows(), f"row {row}"
                breaker.probe_sent()
            case "lost":
                breaker.probe_lost()
            case "refused":
                assert not breaker.allows(), f"row {row}"
            case _:
                trip = breaker.slow(float(what[1:]), now_s=now_s)
        assert (f"{trip.state}: {trip.reason}" if trip else "") == expected, f"row {row}: {what} at {now_s} s"
        assert breaker.state == (trip.state if trip else before)
        assert trip is None or trip.name == breaker.name


def test_failures_in_a_row_and_the_way_back() -> None:
    table = [
        (0.0, "bad", ""),
        (0.0, "bad", ""),
        *[(0.5, "ok", "")] * 6,  # a success breaks the row
        (1.0, "bad", ""),
        (1.0, "bad", ""),
        (1.0, "sent", ""),  # while closed, whatever goes there is no probe
        (2.0, "bad", "open: 3 failures in a row; open for 5 s"),
        (2.0, "refused", ""),
        (3.0, "ok", ""),  # it ran before: it changes nothing
        (3.0, "bad", ""),
        (6.9, "wake", ""),  # early
        (6.9, "refused", ""),
        (7.0, "wake", "half_open: it was open for 5 s"),
        (7.0, "wake", ""),
        (7.1, "ok", ""),  # of what ran before: no probe is out
        (7.1, "bad", ""),
        (7.2, "sent", ""),
        (7.2, "refused", ""),  # one is enough
        (7.3, "lost", ""),  # its client is gone
        (7.3, "sent", ""),
        (8.0, "bad", "open: the probe failed; open for 10 s"),
        (17.9, "wake", ""),
        (99.0, "wake", "half_open: it was open for 10 s"),  # the clock has jumped
        (99.0, "sent", ""),
        (99.0, "bad", "open: the probe failed; open for 15 s"),  # no longer than open_max
        (114.0, "wake", "half_open: it was open for 15 s"),
        (114.0, "sent", ""),
        (114.0, "bad", "open: the probe failed; open for 15 s"),
        (129.0, "wake", "half_open: it was open for 15 s"),
        (129.0, "sent", ""),
        (130.0, "ok", "closed: the probe succeeded"),
        (130.0, "bad", ""),
        (130.0, "bad", ""),  # those before it closed are forgotten
        (130.0, "bad", "open: 3 failures in a row; open for 5 s"),  # and so is how long it was open
        (135.0, "wake", "half_open: it was open for 5 s"),
    ]
    follow(Breaker("mood-0", SPEC), table)


def test_a_share_of_the_last_outcomes() -> None:
    table = [
        (0.0, "bad", ""),
        (0.0, "ok", ""),
        (0.0, "bad", ""),  # two of three, but less than half of the window
        (0.0, "ok", ""),  # two of four: a success never opens it
        (0.0, "ok", ""),
        (0.0, "bad", "open: 3 of the last 6 failed; open for 5 s"),
        (5.0, "wake", "half_open: it was open for 5 s"),
        (5.0, "sent", ""),
        (5.0, "ok", "closed: the probe succeeded"),
        *[(5.0, "ok", "")] * 5,
        (5.0, "bad", ""),
        (5.0, "bad", ""),
        (5.0, "ok", ""),  # eight: the window is full
        (5.0, "bad", ""),  # three of eight
        (5.0, "bad", "open: 4 of the last 8 failed; open for 5 s"),  # the successes that came first have left it
    ]
    follow(Breaker("mood-0", SPEC), table)


def test_an_exact_share_is_enough() -> None:
    breaker = Breaker("mood-0", BreakerSpec(consecutive_failures=1000, failure_rate=0.56, window=25))
    outcomes = [True] * 11 + [False] * 13
    assert not any(breaker.record(ok, now_s=0.0) for ok in outcomes)
    assert breaker.record(False, now_s=0.0), "14 of 25, though 0.56 * 25 is more than 14 in floating point"


def test_slow_steps() -> None:
    table = [
        (0.0, "x3.9", ""),
        (0.0, "x4.0", "open: steps take 4.0 times as long as they should; open for 5 s"),
        (1.0, "x9.0", ""),  # it is open already
        (5.0, "wake", "half_open: it was open for 5 s"),
        (5.0, "x9.0", ""),  # of what ran before
        (5.0, "sent", ""),
        (5.1, "x3.9", ""),
        (5.2, "x4.2", "open: steps take 4.2 times as long as they should; open for 10 s"),  # a slow probe has failed
        (5.2, "ok", ""),
    ]
    follow(Breaker("mood-0", SPEC), table)


def test_one_failure_and_times_that_contradict() -> None:
    spec = BreakerSpec(consecutive_failures=1, window=1, open=20.0, open_max=1.0)
    table = [
        (0.0, "bad", "open: 1 failure in a row; open for 20 s"),
        (20.0, "wake", "half_open: it was open for 20 s"),
        (20.0, "sent", ""),
        (20.0, "bad", "open: the probe failed; open for 20 s"),  # never shorter than open
    ]
    follow(Breaker("mood-0", spec), table)


@given(
    st.lists(
        st.tuples(st.sampled_from(["ok", "bad", "wake", "send", "lost", "slow"]), st.sampled_from([0.0, 0.5, 4.0])),
        max_size=200,
    )
)
def test_whatever_happens(events: list[tuple[str, float]]) -> None:
    breaker, now_s, probes = Breaker("chat-0", SPEC), 0.0, 0
    for what, gap_s in events:
        now_s += gap_s
        before, due_s, trip = breaker.state, breaker.due_s(), None
        if what == "send":
            if breaker.allows():
                breaker.probe_sent()
                probes += before == "half_open"
                assert probes <= 1, "one probe at a time"
        elif what == "lost":
            breaker.probe_lost()
            probes = 0
        elif what == "wake":
            trip = breaker.wake(now_s=now_s)
        elif what == "slow":
            trip = breaker.slow(5.0, now_s=now_s)
        else:
            trip = breaker.record(what == "ok", now_s=now_s)
        assert (trip is not None) == (breaker.state != before)
        if trip:
            allowed = {("closed", "open"), ("open", "half_open"), ("half_open", "open"), ("half_open", "closed")}
            assert (before, trip.state) in allowed and trip.state == breaker.state
            assert trip.state != "open" or what in ("bad", "slow")
            assert trip.state != "closed" or (what == "ok" and probes == 1)
            assert trip.state != "half_open" or (due_s is not None and now_s >= due_s)
            probes = 0
        assert (breaker.due_s() is None) == (breaker.state != "open")
        if trip and trip.state == "open":
            assert SPEC.open <= (breaker.due_s() or 0.0) - now_s <= SPEC.open_max
        assert breaker.state != "closed" or breaker.allows()
