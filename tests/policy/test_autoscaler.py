"""Each rule of scaling by a table of looks: when, what was seen, how many are wanted, and why."""

from __future__ import annotations

from collections.abc import Iterable

import pytest

from gpuplan.policy.autoscaler import Autoscaler, Observation
from gpuplan.scenario.demand import AutoscaleRule

Look = tuple[float, Observation, int, str]


def scaler(cold_start_s: float = 10.0, /, **rule: float) -> Autoscaler:
    """Short windows: up 3 s, down 10 s, cooldown 4 s. A load is that of the last second."""
    keys = {"max_replicas": 8, "scale_up_window": 3.0, "stabilization_window": 10.0, "cooldown": 4.0, **rule}
    return Autoscaler(AutoscaleRule(**keys), cold_start_s)  # type: ignore[arg-type]


def seen(
    ready: int = 1,
    waiting: int = 0,
    load: float = 0.0,
    *,
    starting: int = 0,
    running: int = 1,
    kv: float = 0.0,
    served: float | None = None,
    free: int = 8,
) -> Observation:
    """`load` seconds of work came, and unless `served` says otherwise as much was done."""
    return Observation(ready, starting, waiting, waiting + running, kv, load, load if served is None else served, free)


IDLE = seen(running=0)


def follow(subject: Autoscaler, table: Iterable[Look]) -> None:
    """Every look gives the number, and a reason that contains the words."""
    for row, (now_s, look, wanted, why) in enumerate(table):
        said = subject.look(look, now_s=now_s)
        assert said.replicas == wanted and why in said.reason, f"row {row}: {look} at {now_s} s: {said}"


# --- up -----------------------------------------------------------------------------------------------------------


def test_load_asks_for_what_keeps_it_below_the_threshold() -> None:
    follow(
        scaler(),
        [
            (0, seen(2, load=3.0), 2, "nothing"),  # since when it came nobody knows
            (1, seen(2, load=3.0), 2, "load 1.50 per replica, more than 0.9, but not yet for 3 s"),
            (2, seen(2, load=3.0), 2, "not yet"),
            (3, seen(2, load=3.0), 2, "not yet"),
            (4, seen(2, load=3.0), 4, "load 1.50 per replica, more than 0.9"),  # 3.0 / 0.9, rounded up
            (5, seen(2, load=3.0, starting=2), 4, "nothing"),  # they are on their way
        ],
    )


def test_the_least_that_the_whole_window_asked_for() -> None:
    follow(
        scaler(),
        [
            (0, seen(load=1.0), 1, ""),
            (1, seen(load=4.0), 1, ""),
            (2, seen(load=2.0), 1, ""),  # 3 would do for this one
            (3, seen(load=4.0), 1, ""),
            (4, seen(load=3.5), 3, "load"),
        ],
    )


def test_one_look_below_starts_the_window_anew() -> None:
    follow(
        scaler(),
        [
            (0, IDLE, 1, ""),
            (1, seen(load=2.0), 1, "not yet"),
            (2, seen(load=2.0), 1, "not yet"),
            (3, seen(load=0.5), 1, "nothing"),
            (4, seen(load=2.0), 1, "not yet"),
            (5, seen(load=2.0), 1, "not yet"),
            (6, seen(load=4.0), 1, "not yet"),
            (7, seen(load=2.0), 3, "load"),
        ],
    )


@pytest.mark.parametrize(("load", "wanted"), [(1.97, 2), (1.99, 3)])  # 0.9 and a tenth of it, of two: 1.98
def test_a_ratio_within_the_tolerance_is_none(load: float, wanted: int) -> None:
    follow(
        scaler(),
        [(0, IDLE, 1, ""), *[(t, seen(2, load=load), 2, "") for t in (1, 2, 3)], (4, seen(2, load=load), wanted, "")],
    )


def test_the_error_of_a_float_is_not_a_replica() -> None:
    load = 0.1 * 63  # 6.300000000000001, and a little more than seven times 0.9
    follow(scaler(scale_up_window=0.0), [(0, seen(6), 6, ""), (1, seen(6, load=load), 7, "load 1.05 per replica")])


def test_a_queue_asks_for_no_more_than_drain_it() -> None:
    """200 that cost 0.1 s each: the ratio alone would make 50 replicas of them."""
    steady = seen(waiting=199, load=0.9, served=0.9)
    follow(
        scaler(),
        [
            (0, IDLE, 1, "nothing"),
            (1, seen(waiting=199, load=20.0, served=0.0), 1, "not yet"),
            *[(t, steady, 1, "not yet") for t in (2, 3)],
            # 190 of them after 10 s, in 10 s more: 1.9 replicas, and 0.9 for what comes.
            (4, steady, 3, "199.0 waiting per replica, more than 4"),
        ],
    )


def test_replicas_that_start_are_for_the_queue_that_is_there() -> None:
    table: list[Look] = [(t, seen(waiting=20 + 10 * t, load=2.0, served=1.0), 1, "") for t in range(4)]
    follow(
        scaler(tolerance=0.0),
        [
            *table,
            (4, seen(waiting=60, load=2.0, served=1.0), 4, "waiting"),  # 2 that come and 1.x for what waits
            *[(t, seen(1, 20 + 10 * t, 2.0, served=1.0, starting=3), 4, "") for t in range(5, 14)],
            (14, seen(4, 160, 2.0, served=1.0), 4, ""),  # two of them are free for the queue: it will be gone
        ],
    )


def test_a_queue_of_unknown_cost_goes_by_the_ratio() -> None:
    follow(
        scaler(), [(0, seen(waiting=9), 1, "waiting"), (3, seen(waiting=9), 3, "9.0 waiting per replica, more than 4")]
    )


def test_a_queue_that_will_be_gone_before_a_replica_serves_is_none() -> None:
    """20 s of work at once: a replica that serves after 30 s would find none of it, one that serves after 10 s half."""
    spike: list[Look] = [(0, IDLE, 1, ""), (1, seen(waiting=19, load=20.0, served=0.0), 1, "not yet")]
    spike += [(t, seen(waiting=20 - t, served=1.0), 1, "") for t in (2, 3)]
    follow(scaler(30.0), [*spike, *[(t, seen(waiting=20 - t, served=1.0), 1, "nothing") for t in range(4, 20)]])
    follow(scaler(10.0), [*spike, (4, seen(waiting=16, served=1.0), 2, "16.0 waiting per replica, more than 4")])


def test_what_would_wait_then_is_what_counts() -> None:
    """Of 0.1 s each, another replica would find 200 fewer after 20 s; 40 and a tenth are within the tolerance."""
    for waiting, wanted in ((242, 1), (246, 2)):
        subject = scaler(20.0, scale_up_window=0.0, scale_up_at=40.0)
        follow(subject, [(0, seen(waiting=waiting, load=0.1 * (waiting + 1), served=0.0), wanted, "")])


def test_a_queue_that_will_grow_waits_until_it_is_one() -> None:
    growing = [(t, seen(waiting=t, load=1.2, served=1.0), 1, "nothing") for t in range(5)]
    follow(scaler(load_scale_up_at=2.0), [*growing, (5, seen(waiting=5, load=1.2, served=1.0), 1, "5.0 waiting")])


def test_the_signal_that_asks_for_most_wins() -> None:
    both = seen(waiting=9, load=4.0, served=4.0)
    waits = [(t, both, 1, "not yet") for t in (1, 2, 3)]
    follow(scaler(), [(0, IDLE, 1, ""), *waits, (4, both, 5, "load 4.00 per replica")])  # the queue: 3


def test_what_was_cancelled_is_not_owed() -> None:
    gone = seen(load=50.0, served=0.0, running=0)
    follow(scaler(), [(0, gone, 1, ""), (1, seen(waiting=9, load=0.9, served=0.0), 1, "nothing")])


def test_a_full_cache_asks_for_another() -> None:
    """Within the tolerance, half of what is left above 0.9, it does not."""
    for kv, wanted, why in ((0.94, 2, "nothing"), (0.97, 3, "KV cache 97% full, more than 90%")):
        full = seen(2, 1, load=0.5, running=40, kv=kv)
        waits = [(t, full, 2, why) for t in (1, 2, 3)]
        follow(scaler(), [(0, seen(2, load=60.0, served=0.0), 2, ""), *waits, (4, full, wanted, why)])


def test_a_cache_that_will_be_empty_before_a_replica_serves_asks_for_none() -> None:
    follow(
        scaler(),
        [
            (0, seen(load=9.0, served=0.0, kv=1.0), 1, ""),
            *[(t, seen(served=1.0, kv=1.0), 1, "nothing") for t in range(1, 8)],
        ],
    )


def test_what_is_served_counts_when_replicas_have_been_full_for_a_cold_start() -> None:
    """A cache that holds so few that a replica does half of what it could: by the estimate all would soon be done."""
    held = seen(1, 0, load=0.5, running=10, kv=0.98)
    follow(
        scaler(),
        [
            (0, seen(1, load=4.0, served=0.0, running=10, kv=0.98), 1, "nothing"),
            *[(t, held, 1, "nothing") for t in range(1, 10)],
            *[(t, held, 1, "KV cache") for t in range(10, 13)],
            (13, held, 2, "KV cache 98% full"),
        ],
    )


@pytest.mark.parametrize(
    ("load", "wanted"),
    [
        (0.5, 3),  # half of what it should: 100 of 0.1 s each in 10 s, and 0.5 for what comes, all of it at that pace
        (0.0, 5),  # nothing at all is a fault, and no reason to buy more than for a tenth: 9, but a step is 4
    ],
)
def test_a_queue_is_drained_at_the_measured_pace(load: float, wanted: int) -> None:
    first = seen(waiting=100, load=10.1, served=0.0, free=0)
    later = [(t, seen(waiting=100, load=load, served=load, free=0), 1, "") for t in range(1, 13)]
    last = seen(waiting=100, load=load, served=load)
    follow(scaler(), [(0, first, 1, ""), *later, (13, last, wanted, "100.0 waiting")])


def test_the_pace_of_one_replica_is_not_that_of_two() -> None:
    """They are measured anew: the estimate says that two will have done what is there."""
    subject = scaler()
    subject.look(seen(1, load=8.0, served=0.0, running=10, kv=0.98, free=0), now_s=0)
    for t in range(1, 15):
        subject.look(seen(1, load=0.5, running=10, kv=0.98, free=0), now_s=t)
    follow(subject, [(15, seen(2, load=0.5, running=10, kv=0.98), 2, "nothing")])


def test_so_many_come_at_most_within_a_window() -> None:
    follow(
        scaler(step_up_max=2),
        [
            *[(t, seen(load=9.0), 1, "") for t in range(4)],
            (4, seen(load=9.0), 3, "load"),
            *[(t, seen(load=9.0, starting=2), 3, "but 2 in 3 s is the most") for t in (5, 6)],
            (7, seen(load=9.0, starting=2), 5, "load"),  # no cooldown between two ways up
            *[(t, seen(load=9.0, starting=4), 5, "the most") for t in (8, 9)],
            (10, seen(load=9.0, starting=4), 7, "load"),
            *[(t, seen(load=9.0, starting=6), 7, "the most") for t in (11, 12)],
            (13, seen(load=9.0, starting=6), 8, "load"),  # max_replicas
            (14, seen(load=9.0, starting=7), 8, "but 8 is the most"),
        ],
    )


def test_no_more_than_there_are_slices() -> None:
    follow(
        scaler(),
        [
            *[(t, seen(load=9.0, free=1), 1, "") for t in range(4)],
            (4, seen(load=9.0, free=1), 2, "load"),
            (5, seen(load=9.0, starting=1, free=0), 2, "load 4.50 per replica, more than 0.9, but no slice is free"),
        ],
    )


@pytest.mark.parametrize(("cold_start_s", "window_s"), [(5.0, 3.0), (45.0, 9.0)])  # a fifth, or three looks
def test_the_default_window(cold_start_s: float, window_s: float) -> None:
    subject = Autoscaler(AutoscaleRule(max_replicas=8), cold_start_s)
    first = next(t for t in range(60) if subject.look(seen(load=5.0), now_s=t).replicas > 1)
    assert first == 1 + window_s


# --- down ---------------------------------------------------------------------------------------------------------


def test_down_goes_what_was_not_needed_for_the_whole_window() -> None:
    follow(
        scaler(step_down_max=4),
        [
            (0, seen(4, load=3.5), 4, ""),
            (1, seen(4, load=3.0), 4, ""),  # not below 0.6 of four: all are needed
            (2, seen(4, load=0.9), 4, ""),  # the mean of 2 s: 1.95, which 3 would serve
            (3, seen(4, load=0.9), 4, ""),  # 2 would do
            *[(t, seen(4, load=0.9), 4, "nothing") for t in range(4, 12)],
            (11.5, seen(4, load=0.45), 4, "nothing"),
            (12, seen(4, load=0.45), 3, "no need of more than 3 for 10 s"),
            (13, seen(3, load=0.9), 3, "nothing"),  # cooldown
            (16, seen(3, load=0.9), 2, "no need of more than 2 for 10 s"),
        ],
    )


@pytest.mark.parametrize(
    ("look", "wanted"),
    [
        (seen(3, load=1.6), 2),  # below 0.6 each, and 0.8 on two of them
        (seen(3, load=1.7), 3),  # on two it would be 0.85, and 0.9 less a tenth is 0.81
        (seen(3, load=1.9), 3),  # not below 0.6 each
        (seen(3, waiting=1), 2),
        (seen(3, waiting=2), 3),  # not below 0.5 each
        (seen(3, kv=0.53), 2),
        (seen(3, kv=0.55), 3),  # 0.825 on two
        (seen(3, kv=0.61), 3),  # not below 0.6
    ],
)
def test_down_only_below_every_lower_threshold_and_not_to_come_straight_back(look: Observation, wanted: int) -> None:
    subject = scaler()
    assert [subject.look(look, now_s=t).replicas for t in range(12)] == [3] * 11 + [wanted]


def test_steps_down_are_limited_and_a_cooldown_apart() -> None:
    idle = [(float(t), seen(6, running=0), 6, "") for t in range(11)]
    follow(
        scaler(step_down_max=2),
        [
            *idle,
            (11, seen(6, running=0), 4, "no need of more than 1"),
            (12, seen(4, running=0), 4, "nothing"),
            (15, seen(4, running=0), 2, "no need of more than 1"),
            (19, seen(2, running=0), 1, "no need of more than 1"),
            (23, seen(1, running=0), 1, "nothing"),
        ],
    )


def test_what_has_just_come_stays_for_a_window() -> None:
    """Until it came, one would have done; that says nothing of now."""
    idle = [(float(t), IDLE, 1, "") for t in range(12)]
    busy = [
        (12.0, seen(load=2.0), 1, ""),
        (13.0, seen(load=2.0), 1, ""),
        (14.0, seen(load=2.0), 1, ""),
        (15.0, seen(load=2.0), 3, "load"),
    ]
    spare = [(float(t), seen(3, running=0), 3, "nothing") for t in range(16, 26)]
    follow(scaler(), [*idle, *busy, *spare, (26, seen(3, running=0), 2, "no need of more than 2 for 10 s")])


def test_up_after_down_only_when_it_has_cooled() -> None:
    follow(
        scaler(cooldown=6.0),
        [
            *[(float(t), seen(2, running=0), 2, "") for t in range(11)],
            (11, seen(2, running=0), 1, "no need"),
            *[(float(t), seen(load=2.0), 1, "but not yet") for t in (12, 13, 14)],
            (15, seen(load=2.0), 1, "load 2.00 per replica, more than 0.9, but 4 s after the last change"),
            (16, seen(load=2.0), 1, "but 5 s after the last change"),
            (17, seen(load=2.0), 3, "load"),
        ],
    )


# --- none, and within bounds --------------------------------------------------------------------------------------

NONE = seen(0, running=0)


def test_the_last_goes_after_a_time_without_a_request_and_the_first_comes_at_once() -> None:
    follow(
        scaler(min_replicas=0, scale_to_zero_after=20.0),
        [
            (0, IDLE, 1, ""),
            (5, seen(), 1, ""),
            (6, seen(load=0.1, running=0), 1, ""),  # it came and went between two looks
            (16, IDLE, 1, ""),  # down is not to none: the window is over, the time without a request is not
            (25, IDLE, 1, "nothing"),
            (26, IDLE, 0, "no request for 20 s"),
            (27, NONE, 0, "nothing"),
            (28, seen(0, 1, 0.1, served=0.0, running=0, free=0), 0, "1 in flight and no replica, but no slice is free"),
            (28.1, seen(0, 1, running=0), 1, "1 in flight and no replica"),  # no window, no cooldown
            (29, seen(0, 1, starting=1, running=0), 1, "nothing"),
        ],
    )


def test_before_the_first_look_nothing_was_idle() -> None:
    follow(
        scaler(min_replicas=0, scale_to_zero_after=5.0),
        [(1000, IDLE, 1, ""), (1004, IDLE, 1, ""), (1005, IDLE, 0, "5 s")],
    )


def test_the_last_stays_where_one_must() -> None:
    follow(scaler(scale_to_zero_after=1.0), [(float(t), IDLE, 1, "") for t in range(0, 100, 5)])


def test_several_without_a_request_go_one_by_one() -> None:
    subject, there, counts = scaler(min_replicas=0, scale_to_zero_after=5.0), 3, []
    for t in range(30):
        there = subject.look(seen(there, running=0), now_s=t).replicas
        counts.append(there)
    assert counts == [3] * 11 + [2] * 4 + [1] * 4 + [0] * 11


def test_outside_of_its_bounds_it_goes_there_step_by_step_without_a_window() -> None:
    follow(
        scaler(min_replicas=3, step_up_max=2),
        [(0, IDLE, 3, "1 there, 3 is the least"), (1, seen(0), 2, "0 there"), (2, seen(0, starting=2), 3, "2 there")],
    )
    follow(
        scaler(max_replicas=2),
        [(0, seen(4, load=9.0), 3, "4 there, 2 is the most"), (1, seen(3, load=9.0), 2, "3 there")],
    )


# --- clocks -------------------------------------------------------------------------------------------------------


def test_an_hour_without_a_look_decides_nothing() -> None:
    """What was seen before the hour holds until its end, and what came in it is spread over it."""
    follow(
        scaler(),
        [
            (0, seen(3, load=1.5), 3, ""),
            (1, seen(3, load=2.0), 3, ""),
            (3601, seen(3, load=3.0, running=0), 3, "nothing"),  # 3 s of work in an hour
            (3602, seen(3, load=5.0), 3, "but not yet for 3 s"),
        ],
    )


def test_after_an_hour_the_windows_run_on() -> None:
    follow(
        scaler(),
        [
            (0, seen(2, load=2.5), 2, ""),
            (1, seen(2, load=1.5), 2, "nothing"),
            (3601, seen(2, running=0), 2, "nothing"),
            (3610, seen(2, running=0), 2, "nothing"),
            (3611, seen(2, running=0), 1, "no need of more than 1 for 10 s"),
        ],
    )


def test_looks_at_equal_times() -> None:
    """They are one look: its work adds up, and it decides once."""
    follow(
        scaler(scale_up_window=0.0),
        [
            (0, seen(load=9.0), 1, "nothing"),
            (0, seen(load=9.0), 1, "nothing"),
            (1, seen(load=0.8), 1, "nothing"),
            (1, seen(load=1.2), 3, "load 2.00"),
            (1, seen(load=5.0, starting=2), 3, "but 0 s after the last change"),
            (2, seen(load=5.0, starting=2), 6, "load 1.67"),
        ],
    )


def test_looks_far_apart_need_two_of_them() -> None:
    """One look every minute: what it sees has lasted for the window only at the next."""
    follow(scaler(), [(0, IDLE, 1, ""), (60, seen(load=120.0), 1, "not yet"), (120, seen(load=120.0), 3, "load 2.00")])
