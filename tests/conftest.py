"""What holds for all tests: one BLAS thread, no test that fails for being slow, and some that run alone."""

import os
from collections.abc import Generator
from fcntl import LOCK_EX, LOCK_SH, LOCK_UN, flock
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

for variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ.setdefault(variable, "1")  # before anything imports numpy: two threads are slower on small matrices

settings.register_profile("any machine", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("any machine")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Of the workers of `pytest -n`, one with a test marked `alone` waits for the others' tests, and they for its own.

    All go through the door one by one; who runs alone keeps it shut, so that the others can't go on without end.
    """
    with Path(__file__).open() as room, Path(__file__).with_name("__init__.py").open() as door:
        flock(door, LOCK_EX)
        alone = item.get_closest_marker("alone") is not None
        flock(room, LOCK_EX if alone else LOCK_SH)
        if not alone:
            flock(door, LOCK_UN)
        try:
            return (yield)
        finally:  # closing is not enough, as long as a process forked by the test lives
            flock(room, LOCK_UN)
            flock(door, LOCK_UN)
