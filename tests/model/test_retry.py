"""The table of retries."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistill.model.provider import ErrorKind, ProviderError
from fastdistill.model.retry import GiveUp, Retry, Stop, decide


def decided(
    kind: ErrorKind,
    failures: list[ErrorKind] | None = None,
    *,
    max_retries: int = 8,
    uniform: float = 0.5,
    retry_after: float | None = None,
) -> Retry | GiveUp | Stop:
    return decide(ProviderError(kind, "x", retry_after=retry_after), failures or [], max_retries, uniform)


PASSING = [
    ErrorKind.REFUSED,
    ErrorKind.RESET,
    ErrorKind.TIMEOUT,
    ErrorKind.GARBLED,
    ErrorKind.RATE_LIMITED,
    ErrorKind.OVERLOADED,
]


@pytest.mark.parametrize("kind", [*PASSING, ErrorKind.SERVER])
def test_faults_that_pass_are_tried_again(kind: ErrorKind) -> None:
    assert isinstance(decided(kind), Retry)


@pytest.mark.parametrize("kind", [ErrorKind.AUTH, ErrorKind.NO_MODEL, ErrorKind.UNSUPPORTED])
def test_what_every_request_would_meet_stops_the_run(kind: ErrorKind) -> None:
    assert decided(kind) == Stop()


@pytest.mark.parametrize("kind", [ErrorKind.TOO_LONG, ErrorKind.BAD_REQUEST, ErrorKind.NOT_RECORDED])
def test_what_is_wrong_with_the_sample_costs_the_sample(kind: ErrorKind) -> None:
    assert decided(kind) == GiveUp(kind.value)


def test_a_second_500_gives_the_sample_up() -> None:
    assert decided(ErrorKind.SERVER, [ErrorKind.RESET, ErrorKind.SERVER]) == GiveUp("server_error")
    assert isinstance(decided(ErrorKind.SERVER, [ErrorKind.RESET]), Retry)


def test_after_an_outage_a_server_that_works_is_asked_again_soon() -> None:
    away = [ErrorKind.REFUSED, ErrorKind.RESET, ErrorKind.TIMEOUT, ErrorKind.REFUSED]
    assert decided(ErrorKind.SERVER, away) == decided(ErrorKind.SERVER) == decided(ErrorKind.RATE_LIMITED, away)
    assert decided(ErrorKind.OVERLOADED, away) == decided(ErrorKind.REFUSED, [ErrorKind.REFUSED] * 4)


def test_while_a_server_answers_nobody_a_500_is_no_prompts_fault_for_some_seconds() -> None:
    sick = ProviderError(ErrorKind.SERVER, "x")
    sick.others_answered = False
    assert isinstance(decide(sick, [ErrorKind.SERVER] * 3, 8, 0.5), Retry)
    assert decide(sick, [ErrorKind.SERVER] * 4, 8, 0.5) == GiveUp("server_error")


def test_what_an_endpoint_does_to_all_says_nothing_of_the_prompt() -> None:
    sick = ProviderError(ErrorKind.SERVER, "x")
    sick.elsewhere = True
    assert isinstance(decide(sick, [ErrorKind.SERVER], 8, 0.5), Retry)
    assert decide(sick, [ErrorKind.SERVER] * 8, 8, 0.5) == GiveUp("server_error")


def test_used_up_retries_cost_the_sample_but_a_silent_endpoint_the_run() -> None:
    failures = [ErrorKind.TIMEOUT] * 8
    assert decided(ErrorKind.TIMEOUT, failures) == GiveUp("timeout")
    assert decided(ErrorKind.REFUSED, failures) == Stop()
    assert isinstance(decided(ErrorKind.TIMEOUT, failures[1:]), Retry)


@pytest.mark.parametrize("kind", PASSING)
def test_no_retries_means_none(kind: ErrorKind) -> None:
    assert not isinstance(decided(kind, max_retries=0), Retry)


def test_backoff_doubles_up_to_its_cap() -> None:
    delays = [decided(ErrorKind.RESET, [ErrorKind.RESET] * k, max_retries=99, uniform=1.0) for k in range(8)]
    assert delays == [Retry(delay) for delay in (0.5, 1, 2, 4, 8, 16, 30, 30)]
    assert decided(ErrorKind.RESET, uniform=0.0) == Retry(0.25), "an outage is waited out, not run against"
    assert isinstance(decided(ErrorKind.RESET, [ErrorKind.RESET] * 5000, max_retries=9999), Retry)


def test_retry_after_wins_up_to_its_cap() -> None:
    assert decided(ErrorKind.RATE_LIMITED, retry_after=7.0, uniform=0.0) == Retry(7.0)
    assert decided(ErrorKind.OVERLOADED, retry_after=9999.0, uniform=0.0) == Retry(120.0)
    assert decided(ErrorKind.SERVER, retry_after=3.0, uniform=0.0) == Retry(3.0)


@pytest.mark.parametrize("kind", [ErrorKind.RATE_LIMITED, ErrorKind.OVERLOADED])
@pytest.mark.parametrize("retry_after", [None, 0.0, 1.0, 60.0])
def test_an_outage_is_waited_out_for_two_minutes_at_least(kind: ErrorKind, retry_after: float | None) -> None:
    waited, failures = 0.0, list[ErrorKind]()
    while isinstance(step := decided(kind, failures, uniform=0.0, retry_after=retry_after), Retry):
        waited += step.delay
        failures.append(kind)
    assert step == GiveUp(kind.value)
    assert waited >= 120


@given(
    kind=st.sampled_from(PASSING),
    failures=st.lists(st.sampled_from(PASSING), max_size=40),
    max_retries=st.integers(0, 20),
    uniform=st.floats(0, 1, exclude_max=True),
    retry_after=st.none() | st.floats(0, 1e6),
)
def test_a_delay_is_bounded_and_retries_end(
    kind: ErrorKind, failures: list[ErrorKind], max_retries: int, uniform: float, retry_after: float | None
) -> None:
    step = decided(kind, failures, max_retries=max_retries, uniform=uniform, retry_after=retry_after)
    if isinstance(step, Retry):
        assert 0 <= step.delay <= 121
        assert len(failures) < 2 * max_retries
