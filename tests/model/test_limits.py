"""How many requests are in flight: an adaptive limit against simulated servers in virtual time, and the pace."""

import math
import random
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.limits import SIGMA, TRIED, Case, Work, adaptive, lognormal, queues, simulate
from fastdistill.model.limits import BURST, AdaptiveLimit, Limit, Pace
from fastdistill.model.provider import Load

# --- as good as the best fixed setting ---


@pytest.mark.parametrize(
    ("slots", "requests", "seeds"), [(1, 2_000, 3), (8, 10_000, 3), (64, 10_000, 3), (512, 50_000, 1)]
)
def test_it_comes_within_a_twentieth_of_the_best_fixed_setting(slots: int, requests: int, seeds: int) -> None:
    assert max(queues(slots).over_the_best(requests, seed) for seed in range(seeds)) < 1.05


@pytest.mark.parametrize(
    ("slots", "requests", "seeds"),
    [
        (8, 10_000, range(3)),
        (64, 10_000, range(3)),
        (512, 10_000, (9, 12)),  # it doubles just as a trial of less begins
        (512, 50_000, range(1)),
    ],
)
def test_it_follows_a_capacity_that_halves_and_then_doubles(slots: int, requests: int, seeds: Sequence[int]) -> None:
    changing = Case("", slots, changes=True, fixed=(20 * slots,))
    assert max(changing.over_the_best(requests, seed) for seed in seeds) < 1.10


@pytest.mark.parametrize(
    ("slowed", "slots", "within"),
    [
        (lambda batch: 1 + batch / 32, 256, 1.1),  # a batch of 256 still answers the most
        (lambda batch: 1 + batch / 128, 256, 1.1),
        (lambda batch: 1 + (batch / 32) ** 2, 100_000, 1.1),  # 32 at a time are best, 64 answer a fifth less
        (lambda batch: 1 + (batch / 128) ** 2, 100_000, 1.1),
        (lambda batch: max(1, (batch / 64) ** 2), 100_000, 1.3),  # and what has been sent must come home
    ],
    ids=["saturates at 32", "saturates at 128", "best at 32", "best at 128", "collapses beyond 64"],
)
def test_where_answers_slow_down_as_the_batch_grows_it_finds_a_good_batch(
    slowed: Callable[[int], float], slots: int, within: float
) -> None:
    work = lognormal(10_000, 0)
    times = {tried: simulate(Limit(tried), work, slots, slowed=slowed).seconds for tried in TRIED}
    own = simulate(adaptive(), work, slots, slowed=slowed).seconds
    assert own < within * min(times.values())
    assert own < sorted(times.values())[len(times) // 2], "better than half of the settings that one might have chosen"


def test_longer_answers_are_not_taken_for_a_queue() -> None:
    dice = random.Random(0)
    lengths = [dice.lognormvariate(math.log(50 + 500 * at / 10_000), SIGMA) for at in range(10_000)]
    work = [Work(tokens * 0.002, round(tokens) or 1) for tokens in lengths]
    outcome = simulate(adaptive(), work, 64)
    assert outcome.seconds < 1.05 * simulate(Limit(640), work, 64).seconds
    grown = next(at for at, capacity in enumerate(outcome.capacities) if capacity >= 64)
    assert min(outcome.capacities[grown:]) >= 48


@pytest.mark.parametrize("slots", [8, 64])
def test_a_small_server_is_not_buried_however_long_the_run(slots: int) -> None:
    outcome = simulate(adaptive(), lognormal(40_000, 1), slots)
    assert max(outcome.capacities) <= 20 * slots
    assert sum(outcome.capacities) / len(outcome.capacities) <= 10 * slots


def test_the_ramp_to_many_slots_is_short() -> None:
    assert sum(queues(512).over_the_best(10_000, seed) for seed in range(4)) / 4 < 1.05, (
        "with 20 requests for each slot"
    )


def test_chance_does_not_end_the_ramp_too_soon() -> None:
    assert max(queues(1000).over_the_best(10_000, seed) for seed in range(16)) < 1.12


def test_a_limit_that_is_not_used_hardly_grows() -> None:
    limit = adaptive()
    for at in range(10_000):
        limit.answered(at / 10, at / 10 + 0.2, 100, busy=False)
    assert limit.capacity <= 6 * 24


# --- servers that refuse, break, or are slow ---


@pytest.mark.parametrize("allowed", [10, 20, 100, 300])
def test_a_server_that_refuses_beyond_a_number_costs_few_refusals_and_little_time(allowed: int) -> None:
    work = lognormal(10_000, 0)
    best = simulate(Limit(allowed), work, 100_000).seconds
    outcome = simulate(adaptive(), work, 100_000, refuses_beyond=allowed)
    assert outcome.seconds < 1.05 * best
    assert outcome.refused < 200, "in 10,000 requests"
    assert max(outcome.capacities[len(work) // 2 :]) <= 1.1 * allowed


def test_a_burst_of_refusals_is_one_cut() -> None:
    limit = AdaptiveLimit(start=100)
    for at in range(40):
        limit.rate_limited(begun=1.0, now=1.1 + at / 1000)
    assert limit.capacity == 95
    limit.rate_limited(begun=1.2, now=1.3)
    assert limit.capacity == 86, "sent after the cut: another burst, and a deeper cut"
    for at in range(2, 12):
        limit.rate_limited(at, at)
    assert limit.capacity < 5, "until there are few, whatever the server's reason"


def test_after_a_refusal_that_does_not_come_again_the_limit_recovers() -> None:
    limit = adaptive()
    limit.rate_limited(0.0, 0.0)
    outcome = simulate(limit, lognormal(20_000, 1), 64)
    assert max(outcome.capacities) >= 64, "a 429 in the first moment does not hold it down"
    again = limit.capacity
    for burst in range(1, 7):
        limit.rate_limited(1e4 + burst, 1e4 + burst)
    assert limit.capacity < 0.5 * again
    outcome = simulate(limit, lognormal(20_000, 2), 64)
    assert max(outcome.capacities) >= 64


@pytest.mark.parametrize("share", [0.02, 0.05])
def test_broken_connections_say_nothing_of_the_capacity(share: float) -> None:
    work = lognormal(10_000, 0)
    dice = random.Random(0)
    broken = {number for number in range(1, 12_000) if dice.random() < share}
    best = simulate(Limit(640), work, 64, breaks=broken.__contains__).seconds
    outcome = simulate(adaptive(), work, 64, breaks=broken.__contains__)
    assert outcome.seconds < 1.05 * best
    assert max(outcome.capacities) <= 10 * 64, "the ramp ends all the same"


def test_while_much_breaks_the_limit_neither_grows_nor_shrinks() -> None:
    limit = adaptive()
    limit.answered(0.0, 0.2, 100, busy=True)
    held = limit.capacity
    for at in range(1000):
        limit.broke()
        limit.answered(0.2 + at / 1000, 0.4 + at / 1000, 100, busy=True)
    assert limit.capacity == held
    outcome = simulate(limit, lognormal(10_000, 0), 64)
    assert outcome.capacities[-1] >= 64, "and it grows again afterwards"


def test_a_trial_that_breaks_off_is_taken_back() -> None:
    limit = adaptive()
    outcome = simulate(limit, lognormal(20_000, 0), 64, breaks=lambda number: number > 10_000 and number % 3 == 0)
    assert min(outcome.capacities[len(outcome.capacities) // 2 :]) >= 48
    assert len(set(outcome.capacities[-5_000:])) == 1


def test_a_slow_server_is_not_buried_in_requests_that_would_time_out() -> None:
    patience = 60.0
    for seed in range(3):
        work = lognormal(60, seed, median=20.0, sigma=0.3)
        limit = AdaptiveLimit(start=4, patience=patience)
        outcome = simulate(limit, work, 1)
        assert max(outcome.capacities) <= 8
        assert outcome.seconds == pytest.approx(sum(each.seconds for each in work))


# --- servers that tell, and users who say ---


@pytest.mark.parametrize("slots", [8, 64])
def test_a_server_that_tells_how_busy_it_is_gets_what_it_needs_and_a_quarter_more(slots: int) -> None:
    work = lognormal(10_000, 0)
    outcome = simulate(adaptive(), work, slots, tells=True)
    assert outcome.seconds < 1.03 * simulate(Limit(10 * slots), work, slots).seconds
    settled = outcome.capacities[len(work) // 4 : -2 * slots]
    assert set(settled) == {round(1.25 * slots)}


def test_a_moment_in_which_nothing_is_worked_on_says_nothing() -> None:
    limit = AdaptiveLimit(100)
    limit.measured(Load(0, 80), busy=True)  # between two batches, or while only prompts are read
    assert limit.capacity == 100
    limit.measured(Load(40, 80), busy=True)
    assert limit.capacity == 50


def test_where_most_requests_time_out_fewer_are_sent_and_where_some_do_as_many() -> None:
    limit = AdaptiveLimit(64)
    for at in range(64):
        limit.timed_out(0, 60 + at / 100)
    assert limit.capacity == 32, "one cut for all that were sent together"
    for at in range(1, 200):
        limit.answered(100, 100 + at, 10, busy=True)
        limit.timed_out(100, 100 + at)
    assert limit.capacity == 32


def test_a_server_that_has_only_some_of_what_is_in_flight_is_not_believed() -> None:
    # A gateway answers with the metrics of one of its servers; and what it queues itself no server tells of.
    limit = AdaptiveLimit(48)
    limit.measured(Load(16, 0), busy=True)
    limit.measured(Load(16, 8), busy=True)
    assert limit.capacity == 48
    limit.measured(Load(48, 0), busy=True)
    assert limit.capacity == 96


@given(st.lists(st.sampled_from(["answered", "rate_limited", "broke", "measured"]), max_size=50))
def test_a_fixed_limit_never_moves(events: list[str]) -> None:
    limit = Limit(7)
    for at, event in enumerate(events):
        match event:
            case "answered":
                limit.answered(at, at + 1, 10, busy=True)
            case "rate_limited":
                limit.rate_limited(at, at + 1)
            case "broke":
                limit.broke()
            case _:
                limit.measured(Load(1, 100), busy=True)
    assert limit.capacity == 7


_events = st.tuples(
    st.sampled_from(["answered", "rate_limited", "broke", "measured"]),
    st.floats(0, 5),
    st.integers(0, 5000),
    st.booleans(),
)


@given(st.integers(1, 50), st.integers(50, 300), st.lists(_events, max_size=300))
def test_whatever_happens_the_limit_stays_between_one_and_its_ceiling(
    start: int, ceiling: int, events: list[tuple[str, float, int, bool]]
) -> None:
    limit = AdaptiveLimit(start, ceiling)
    now = 0.0
    for kind, seconds, number, busy in events:
        begun, now = now, now + seconds
        match kind:
            case "answered":
                limit.answered(begun, now, number, busy=busy)
            case "rate_limited":
                limit.rate_limited(begun, now)
            case "broke":
                limit.broke()
            case _:
                limit.measured(Load(number % 100, number), busy=busy)
        assert 1 <= limit.capacity <= ceiling


# --- the pace ---

_requests = st.lists(
    st.tuples(st.floats(0, 20), st.integers(1, 2000), st.floats(0, 1)), min_size=1, max_size=150
)  # (seconds since the last, tokens at most, share of them that it took)


@settings(deadline=None)
@given(_requests, st.integers(1, 600), st.integers(2000, 100_000))
def test_no_minute_has_more_requests_or_tokens_than_the_allowance(
    requests: list[tuple[float, int, float]], rpm: int, tpm: int
) -> None:
    pace = Pace(rpm, tpm)
    now, sent = 0.0, list[tuple[float, int]]()
    for gap, most, share in requests:
        now += gap
        now += pace.delay(now, most)
        took = round(most * share)
        pace.correct(pace.take(now, most), took)
        sent.append((now, took))
    for begun, _ in sent:
        within = [tokens for at, tokens in sent if begun <= at < begun + 60 - 1e-6]
        assert len(within) <= rpm
        assert sum(within) <= tpm


def test_what_is_allowed_goes_out_evenly() -> None:
    pace, now, sent = Pace(600, None), 0.0, list[float]()
    for _ in range(60):
        now += pace.delay(now, 0)
        pace.take(now, 0)
        sent.append(now)
    assert all(at >= 0.1 * place - BURST - 0.001 for place, at in enumerate(sent))
    assert sent[-1] > 5


def test_a_request_that_is_larger_than_the_allowance_goes_out_once_the_minute_is_empty() -> None:
    pace = Pace(None, 1000)
    pace.take(0.0, 100)
    assert pace.delay(10.0, 5000) == pytest.approx(50)


def test_an_answer_that_was_shorter_than_allowed_gives_the_rest_of_its_time_back() -> None:
    pace = Pace(None, 6000)
    sent = pace.take(0.0, 1000)
    assert pace.delay(0.0, 0) == pytest.approx(10 - BURST)
    pace.correct(sent, 40)
    assert pace.delay(0.0, 0) == 0


def test_the_allowance_is_used_up_by_a_client_that_always_has_more() -> None:
    pace, now = Pace(600, None), 0.0
    for _ in range(600):
        now += pace.delay(now, 0)
        pace.take(now, 0)
    assert 60 - 2 * BURST <= now <= 60


def test_without_an_allowance_nothing_waits() -> None:
    pace = Pace(None, None)
    for at in range(1000):
        assert pace.delay(0.0, 0) == 0
        pace.take(0.0, at)
    assert pace.unlimited
