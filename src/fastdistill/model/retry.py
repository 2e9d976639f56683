"""What follows a failed request. Pure: the client does the sleeping and the counting.

| the request failed with | what follows |
|---|---|
| refused, reset, timeout, garbled | again, after half to all of a backoff: 0.5 s, doubled each time up to 30 s; |
| | the default of 8 retries waits out an outage of 45 seconds |
| 408, 502, 503, 429 | again, after half to all of that backoff and no less than Retry-After (up to 120 s) |
| 500 and other 5xx | again once, or four times while the server answers nobody else; then the sample is given up: |
| | a poisoned prompt can break a server. Where other endpoints answer: again, as above |
| context too long, any other 4xx, not recorded | the sample is given up |
| wrong key, redirect, unknown model, unsupported parameter | the run stops: every request would end like this; |
| | but a model unknown at one endpoint that is known at others: again, there |
| retries used up | the sample is given up; but the run stops if nobody listens any more |

A 504 is a timeout. A 408, 429, 502 or 503 costs half a retry: with the default of 8 retries an outage of 2 minutes is
waited out.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from fastdistill.model.provider import ErrorKind, ProviderError

BACKOFF_BASE = 0.5  # seconds
BACKOFF_CAP = 30.0
RETRY_AFTER_CAP = 120.0

_FATAL = {ErrorKind.AUTH, ErrorKind.NO_MODEL, ErrorKind.UNSUPPORTED}
_HOPELESS = {ErrorKind.TOO_LONG, ErrorKind.BAD_REQUEST, ErrorKind.NOT_RECORDED}
_THROTTLED = {ErrorKind.RATE_LIMITED, ErrorKind.OVERLOADED}
_AWAY = {ErrorKind.REFUSED, ErrorKind.RESET, ErrorKind.TIMEOUT, ErrorKind.GARBLED, ErrorKind.OVERLOADED}
"""As in an outage; the others are said by a server that works, which makes a wait for an outage a thing of the past."""


@dataclass(frozen=True, slots=True)
class Retry:
    delay: float  # seconds


@dataclass(frozen=True, slots=True)
class GiveUp:
    """The sample is lost, the run goes on. `reason` is a code for the reports."""

    reason: str


@dataclass(frozen=True, slots=True)
class Stop:
    """No request will succeed: the run ends with the error's own message."""


def decide(
    error: ProviderError, failures: Sequence[ErrorKind], max_retries: int, uniform: float
) -> Retry | GiveUp | Stop:
    """What follows `error`, by the table above.

    Args:
        failures: kinds of the earlier failures of this request, oldest first, without `error`.
        max_retries: of the model's config; 0 tries nothing again.
        uniform: a random number in [0, 1), which spreads the retries.
    """
    reason = error.kind.value
    moves = error.kind is ErrorKind.NO_MODEL and error.elsewhere
    if error.kind in _FATAL and not moves:
        return Stop()
    poisoned = failures.count(ErrorKind.SERVER) >= (1 if error.others_answered else 4) and not error.elsewhere
    if error.kind in _HOPELESS or (error.kind is ErrorKind.SERVER and poisoned):
        return GiveUp(reason)
    spent = sum(0.5 if kind in _THROTTLED else 1.0 for kind in (*failures, error.kind))
    if spent > max_retries:
        return Stop() if moves or error.kind is ErrorKind.REFUSED else GiveUp(reason)
    alike = sum((kind in _AWAY) == (error.kind in _AWAY) for kind in failures)
    # The exponent is bounded only so that a long list of failures can't overflow the power.
    backoff = min(BACKOFF_CAP, BACKOFF_BASE * 2 ** min(alike, 16))
    asked = min(error.retry_after or 0.0, RETRY_AFTER_CAP)
    # Jitter on top of what was asked, lest all that were turned away come back in the same instant.
    return Retry(max(backoff / 2 * (1 + uniform), asked + BACKOFF_BASE * uniform if asked else 0.0))
