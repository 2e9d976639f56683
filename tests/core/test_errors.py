"""The boundary: what breaks in a step costs its sample, and nothing else is swallowed."""

import asyncio

import pytest

from fastdistill.core.errors import (
    ConfigError,
    EnvironmentFault,
    ExitCode,
    FatalError,
    InputError,
    SampleError,
    TeacherError,
    TooManyErrors,
    boundary,
)


def test_an_unforeseen_exception_becomes_a_sample_error_that_names_the_step_and_keeps_the_cause() -> None:
    with pytest.raises(SampleError) as caught, boundary("MyStep"):
        raise KeyError("gold")
    assert caught.value.reason == "unexpected"
    assert str(caught.value) == "MyStep: KeyError: 'gold'"
    assert isinstance(caught.value.__cause__, KeyError)


@pytest.mark.parametrize("error", [SampleError("no_gold", "there is none"), TeacherError("401"), FatalError("full")])
def test_our_own_errors_pass_as_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, boundary("MyStep"):
        raise error
    assert caught.value is error


@pytest.mark.parametrize("kind", [KeyboardInterrupt, SystemExit, asyncio.CancelledError])
def test_the_end_of_the_process_is_not_an_error_of_a_sample(kind: type[BaseException]) -> None:
    with pytest.raises(kind), boundary("MyStep"):
        raise kind


def test_a_step_that_works_passes() -> None:
    with boundary("MyStep"):
        done = True
    assert done


def test_a_config_error_tells_all_its_problems() -> None:
    error = ConfigError(["steps[0]: a", "models: b"])
    assert error.problems == ["steps[0]: a", "models: b"]
    assert str(error) == "steps[0]: a\nmodels: b"
    assert ConfigError("one").problems == ["one"]


def test_every_kind_of_fatal_error_has_an_exit_code_of_its_own() -> None:
    kinds: list[type[FatalError]] = [ConfigError, InputError, TeacherError, TooManyErrors, EnvironmentFault, FatalError]
    codes = [kind.exit_code for kind in kinds]
    assert len(set(codes)) == len(codes)
    assert ExitCode.OK not in codes
