"""The gate over samples: three forms of tests, broken records, gold, and what a verdict says."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from fastdistill.core.errors import EnvironmentFault
from fastdistill.core.types import Outcome, Sample, Verdict
from fastdistill.data.execution.python import PythonExecEval
from fastdistill.data.execution.python_pool import PythonLimits
from fastdistill.data.execution.sandbox import Isolation, IsolationLevel, available_isolation, wrapped
from tests.context import TestContext, candidate

AVAILABLE = available_isolation()
needs_sandbox = pytest.mark.skipif(AVAILABLE.level is None, reason=str(AVAILABLE))

ADD = "def add(a, b):\n    return a + b"
MBPP = {"tests": ["assert add(1, 2) == 3", "assert add('a', 'b') == 'ab'"], "code": ADD}
HUMAN_EVAL = {
    "prompt": "import math\n\ndef root(n):\n    '''The integer part of the square root.'''\n",
    "test": "def check(candidate):\n    assert candidate(17) == math.isqrt(17)\n    assert root(9) == 3\n",
    "entry_point": "root",
    "canonical_solution": "    return math.isqrt(n)\n",
}
STDIO = {"tests": [{"input": "3 4\n", "output": "7\n"}, {"input": "1 1", "output": "2"}]}


def judged(gate: PythonExecEval, record: Mapping[str, Any], answers: Sequence[str], folder: Path) -> list[Verdict]:
    sample = Sample(0, "test.jsonl:1", record, candidates=tuple(candidate(a, i) for i, a in enumerate(answers)))

    async def run() -> Sample:
        context = TestContext(folder)
        try:
            async with gate.opened(context):
                return await gate.run(sample, context)
        finally:
            context.close()

    return [c.verdicts[0] for c in asyncio.run(run()).candidates]


def reasons(gate: PythonExecEval, record: Mapping[str, Any], answers: Sequence[str], folder: Path) -> list[str]:
    return [verdict.reason for verdict in judged(gate, record, answers, folder)]


@needs_sandbox
def test_a_list_of_asserts(tmp_path: Path) -> None:
    answers = [ADD, "def add(a, b): return 3", "def add(a, b): return {}[a]", "I can't."]
    found = judged(PythonExecEval(gold_field="code"), MBPP, answers, tmp_path)
    assert [v.reason for v in found] == ["passed", "assertion", "exception", "syntax_error"]
    assert [v.outcome for v in found] == [Outcome.PASS, *[Outcome.FAIL] * 3]
    assert found[0].detail == {"isolation": AVAILABLE.level}
    assert found[2].detail["detail"] == "test 1: KeyError: 1"


@needs_sandbox
def test_a_check_function_and_a_prompt_to_continue(tmp_path: Path) -> None:
    gate = PythonExecEval(
        tests_field="test", entry_point_field="entry_point", setup_field="prompt", gold_field="canonical_solution"
    )
    whole = "def root(n):\n    return int(n ** 0.5)"
    answers = ["    return int(n ** 0.5)", whole, "    return n", "def other(n): return 4"]
    assert reasons(gate, HUMAN_EVAL, answers, tmp_path) == ["passed", "passed", "assertion", "assertion"]
    assert reasons(gate, HUMAN_EVAL | {"entry_point": "roots"}, answers[:1], tmp_path) == ["gold_invalid"]


@needs_sandbox
def test_pairs_of_input_and_output(tmp_path: Path) -> None:
    right = "print(sum(map(int, input().split())))"
    at_exit = f"import atexit\n@atexit.register\ndef late(): {right}"
    answers = [right, f"{right}; exit()", at_exit, "print(7)", "print("]
    assert reasons(PythonExecEval(), STDIO, answers, tmp_path) == [*["passed"] * 3, "mismatch", "syntax_error"]


@needs_sandbox
def test_a_gold_that_fails_its_own_tests_is_an_error_for_every_candidate(tmp_path: Path) -> None:
    record = MBPP | {"code": "def add(a, b): return 0"}
    (found, other) = judged(PythonExecEval(gold_field="code"), record, [ADD, "x"], tmp_path)
    assert found == other
    assert (found.outcome, found.reason) == (Outcome.ERROR, "gold_invalid")
    assert found.detail["detail"].startswith("gold: assertion: test 1")


SLEEP, SPIN = "__import__('time').sleep(1000)", "while True: pass"


@needs_sandbox
@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"code": f"def add(a, b):\n    {SPIN}"}, "gold_invalid"),
        ({"code": f"def add(a, b):\n    {SLEEP}"}, "wall_timeout"),
        ({"tests": [SPIN]}, "tests_limit"),
        ({"tests": [SLEEP]}, "wall_timeout"),
    ],
)
def test_gold_or_tests_that_hang_are_an_error_within_the_limits(
    record: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    sleeps = reason == "wall_timeout"  # as soon as the wall clock says so; for the others it has all the time
    gate = PythonExecEval(gold_field="code", limits=PythonLimits(cpu_s=1, wall_s=1.0 if sleeps else 90.0))
    (found,) = judged(gate, MBPP | record, [ADD], tmp_path)
    assert (found.outcome, found.reason) == (Outcome.ERROR, reason)
    assert found.detail["detail"].startswith("gold: ")


@needs_sandbox
def test_a_sample_that_comes_again_is_judged_by_the_same_gold(tmp_path: Path) -> None:
    broken = MBPP | {"code": "def add(a, b): return 0"}
    gate = PythonExecEval(gold_field="code")
    samples = [Sample(n, "test.jsonl:1", r, candidates=(candidate(ADD, 0),)) for n, r in enumerate([MBPP, broken] * 2)]

    async def run() -> list[str]:
        context = TestContext(tmp_path)
        try:
            async with gate.opened(context):
                return [(await gate.run(sample, context)).candidates[0].verdicts[0].reason for sample in samples]
        finally:
            context.close()

    assert asyncio.run(run()) == ["passed", "gold_invalid"] * 2


@needs_sandbox
@pytest.mark.parametrize(
    "record",
    [
        {},
        {"tests": None},
        {"tests": []},
        {"tests": " "},
        {"tests": ["assert f(1)", 2]},
        {"tests": [{"input": "1"}]},
        {"tests": [{"input": "1", "output": "1"}, "assert f(1)"]},
        {"tests": {"input": "1", "output": "1"}},
        {"tests": ["assert ("]},
    ],
)
def test_a_record_without_usable_tests_is_an_error(record: dict[str, Any], tmp_path: Path) -> None:
    (found,) = judged(PythonExecEval(), record, ["def f(x): return 1"], tmp_path)
    assert (found.outcome, found.reason) == (Outcome.ERROR, "tests_invalid")


@needs_sandbox
def test_a_record_without_gold_is_an_error_where_gold_is_wanted(tmp_path: Path) -> None:
    assert reasons(PythonExecEval(gold_field="none"), MBPP, ["x"], tmp_path) == ["gold_invalid"]
    assert reasons(PythonExecEval(setup_field="none"), MBPP, ["x"], tmp_path) == ["tests_invalid"]


@needs_sandbox
def test_a_sandbox_that_cannot_start_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "full"))
    with pytest.raises(EnvironmentFault, match=r"can't start: .*full"):
        judged(PythonExecEval(), MBPP, [ADD, ADD], tmp_path)


@needs_sandbox
def test_a_verdict_of_one_process_is_marked(tmp_path: Path) -> None:
    (found,) = judged(PythonExecEval(mode="solo"), MBPP, [ADD], tmp_path)
    assert found.outcome is Outcome.PASS
    assert found.detail["forgeable"] is True


@needs_sandbox
def test_an_interpreter_that_is_installed_behind_a_link_finds_its_library(tmp_path: Path) -> None:
    (tmp_path / "python").symlink_to(sys.base_prefix)
    (tmp_path / "venv" / "bin").mkdir(parents=True)
    (tmp_path / "venv" / "pyvenv.cfg").write_text(f"home = {tmp_path / 'python' / 'bin'}\n")
    python = tmp_path / "venv" / "bin" / "python"
    python.symlink_to(tmp_path / "python" / "bin" / Path(sys.executable).resolve().name)
    program = "from fastdistill.data.execution.sandbox import available_isolation as a; print(*a().levels)"
    environment = {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = subprocess.run([python, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert found.stdout.split() == list(AVAILABLE.levels)


@pytest.mark.skipif(IsolationLevel.BUBBLEWRAP in AVAILABLE.levels, reason="bubblewrap works here")
def test_less_isolation_than_asked_for_is_refused_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"needs isolation bubblewrap.*bubblewrap"):
        judged(PythonExecEval(name="exec", min_isolation=IsolationLevel.BUBBLEWRAP), MBPP, ["x"], tmp_path)


def test_the_manifest_is_told_what_is_in_force() -> None:
    assert PythonExecEval().environment() == {"isolation": AVAILABLE.level, "mechanism": str(AVAILABLE)}


def test_levels_are_ordered_and_described() -> None:
    assert IsolationLevel.BUBBLEWRAP.reaches(IsolationLevel.LANDLOCK)
    assert not IsolationLevel.LANDLOCK.reaches(IsolationLevel.BUBBLEWRAP)
    assert str(Isolation((), 0, ("no Landlock", "no bubblewrap"))) == "none; no Landlock; no bubblewrap"
    assert str(Isolation((IsolationLevel.LANDLOCK,), 4, ())) == "landlock, Landlock 4, seccomp"
    assert wrapped(["python"], IsolationLevel.LANDLOCK, ["/usr"]) == ["python"]


@pytest.mark.parametrize(
    "options", [{"min_isolation": "none"}, {"limits": {"memory_bytes": -1}}, {"limits": {"cpu_s": 0}}]
)
def test_a_level_that_does_not_exist_and_a_limit_that_is_none_are_refused_when_the_config_is_read(
    options: dict[str, Any],
) -> None:
    with pytest.raises(ValidationError):
        PythonExecEval.model_validate(options)


def test_limits_and_mode_change_the_fingerprint() -> None:
    prints = {
        PythonExecEval.model_validate(options).fingerprint
        for options in ({}, {"mode": "solo"}, {"limits": {"cpu_s": 9}})
    }
    assert len(prints) == 3
