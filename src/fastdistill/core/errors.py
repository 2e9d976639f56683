"""What can go wrong, by the boundary that was crossed, and the exit code each kind ends a command with.

`SampleError` is data: it is recorded with its sample and the run goes on. `FatalError` ends the run at once,
keeps all that was paid for, and says what to do. Everything else is a bug of ours or of a plug-in.
"""

import asyncio
from collections.abc import Awaitable
from enum import IntEnum
from types import TracebackType
from typing import Self, TypeVar

T = TypeVar("T")


class ExitCode(IntEnum):
    """How a command ended; documented in docs/sections/fastdistill/cli.md."""

    OK = 0
    BUG = 1
    CONFIG = 2  # the command line or the config is wrong; nothing was spent
    INPUT = 3  # records or a database can't be read
    TEACHER = 4  # an endpoint refuses or is gone for good
    PARTIAL = 5  # the run finished, some samples ended in an error
    FLOOR = 6  # the run finished below `require:`
    BUDGET = 7  # a `budget:` is spent, the run's or a model's; the data set is complete with what was done by then
    ENVIRONMENT = 8  # disk full, folder in use, missing permission
    INTERRUPTED = 130
    UNREAD = 141  # who read the output has gone, as `| head` has: what a process ends with that SIGPIPE kills


class FatalError(Exception):
    """Ends the run. The message names the boundary, the place and the remedy."""

    exit_code = ExitCode.BUG


class ConfigError(FatalError):
    """The configuration can't be run; `problems` has one line for each error, with its path."""

    exit_code = ExitCode.CONFIG

    def __init__(self, problems: str | list[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else problems
        super().__init__("\n".join(self.problems))


class InputError(FatalError):
    """Records, a data set or a database can't be read."""

    exit_code = ExitCode.INPUT


class TeacherError(FatalError):
    """A model endpoint refuses every request: wrong key, unknown model, nobody listening."""

    exit_code = ExitCode.TEACHER


class Unreachable(TeacherError):
    """Nobody answers at a model's endpoint. Who can do without that model goes on without it."""


class TooManyErrors(FatalError):
    """More samples ended in an error than `max_error_rate` allows."""

    exit_code = ExitCode.PARTIAL


class EnvironmentFault(FatalError):
    """The machine under us: disk full, folder in use, permission missing."""

    exit_code = ExitCode.ENVIRONMENT


class SampleError(Exception):
    """One sample can't go on. `reason` is a short code for the reports; the message is for people.

    `attempt` is that of the draw which came to nothing, where it raced with others.
    """

    def __init__(self, reason: str, message: str) -> None:
        self.reason = reason
        self.attempt: int | None = None
        super().__init__(message)


class NotAsked(SampleError):
    """A sample is left out because the run has enough, or may spend no more: nothing is wrong with it."""


class TimeUp(NotAsked):
    """As `NotAsked`, and what is left where a later run finds it is not waited for."""


class BudgetSpent(NotAsked):
    """A model's own budget is used up: nothing more is asked of it, and the run goes on."""

    code = "budget_spent"


class boundary:
    """The one place that catches everything: a step that breaks costs its sample and no other.

    Raises:
        SampleError: `unexpected`, in place of any exception that is not one of ours.
    """

    __slots__ = ("step",)

    def __init__(self, step: str = "") -> None:
        self.step = step  # who is at work within it; it may change

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if isinstance(error, Exception) and not isinstance(error, SampleError | FatalError):
            raise SampleError("unexpected", f"{self.step}: {type(error).__name__}: {error}") from error


async def together(*work: Awaitable[T]) -> list[T]:
    """All results. What one raises is raised once all have ended, for those are paid for: what is fatal first."""
    tasks = [asyncio.ensure_future(each) for each in work]
    await asyncio.gather(*tasks, return_exceptions=True)
    if errors := [error for task in tasks if (error := task.exception())]:
        raise min(errors, key=lambda error: not isinstance(error, FatalError))
    return [task.result() for task in tasks]
