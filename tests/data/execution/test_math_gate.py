"""The gate for mathematics: wanted verdicts, what is known to fool others, and answers that would run for hours."""

import asyncio
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import ValidationError

from fastdistill.core.types import Outcome, Sample, Verdict
from fastdistill.data.execution.math import MathExecEval, MathLimits, MathPool, MathReason
from tests.context import TestContext, candidate


def judge(folder: Path, pairs: "list[tuple[object, str]]", **options: Any) -> list[Verdict]:
    gate = MathExecEval(**options)
    context = TestContext(folder)

    async def run() -> list[Verdict]:
        async with gate.opened(context):
            tasks = [
                gate.judge(candidate(text), Sample(0, f"r:{at}", {"answer": gold}), context)
                for at, (gold, text) in enumerate(pairs)
            ]
            return list(await asyncio.gather(*tasks))

    try:
        return asyncio.run(run())
    finally:
        context.close()


def boxed(text: str) -> str:
    return rf"So it is \boxed{{{text}}}."


class Case(NamedTuple):
    wanted: str
    """P: pass, F: fail, E: error, N: anything but a pass"""
    gold: str
    text: str
    """Put into a box where it does not say itself where its answer is."""


CASES = [
    Case(*case)
    for case in [
# numbers
        ("P", "18", "18"), ("P", "18", "18.0"), ("P", "18", "$18"), ("P", "18", r"\$18.00"), ("P", "18", "18."),
        ("F", "18", "81"), ("F", "18", "-18"), ("P", "-3", "−3"), ("P", "1200", "1,200"), ("P", "1,200", "1{,}200"),
        ("P", "1200", "1 200"), ("P", "1200", r"1\,200"), ("F", "1200", "1.200"), ("P", "0.5", ".5"),
        ("P", "12", "１２"), ("P", "1000000", "1e6"), ("P", "1000000", r"10^6"), ("P", "1500000", r"1.5 \times 10^{6}"),
        ("F", "6", "1e6"), ("P", "1/3", r"\frac{1}{3}"), ("P", "1/3", r"\dfrac13"), ("P", "0.75", "3/4"),
        ("P", "1/3", r"0.\overline{3}"), ("F", "1/3", "0.3333333333"), ("F", "1/3", "0.333"), ("P", "7/2", "3 1/2"),
        ("P", "7/2", r"3\frac{1}{2}"), ("P", "5/2", "2½"), ("F", "7/2", "31/2"), ("P", "-3/4", r"-\frac{3}{4}"),
        ("P", "-3/4", r"\frac{-3}{4}"), ("F", r"\pi", "3.14159265358979"), ("F", "2", "1/0"),
        ("P", r"\frac{2}{4}", "0.5"), ("P", "42", "**42**"),
        ("P", "1", "0.99999999999999999999999/0.99999999999999999999999"), ("F", "234", "2**3**4"), ("P", "8", "2**3"),
        # percent and units
        ("P", "18%", r"18\%"), ("P", "18%", "18"), ("P", "18%", "0.18"), ("E", "18", r"18\%"), ("E", "10", r"10\%"),
        ("F", "18%", "19%"), ("P", "0.18", "18%"), ("P", "10 cm", "10 cm"), ("F", "10 cm", "10 m"),
        ("P", "10 cm", "100 mm"), ("P", "10 cm", r"10\text{ cm}"), ("P", "10 cm", "10"), ("P", "10", "10 cm"),
        ("P", "5 hours", "300 minutes"), ("F", "5 hours", "5 minutes"), ("F", "5 kg", "5 cm"), ("P", "5", "5 apples"),
        ("E", "5 apples", "5 oranges"), ("P", r"90^\circ", "90"), ("P", r"90^\circ", "90°"), ("P", "$5", "5 dollars"),
        ("P", "$5", "500 cents"), ("E", "$5", "€5"), ("N", "10m", "10"), ("N", "2x", "2"), ("F", "300", "5 minutes"),
        ("P", r"5\sqrt{2} cm", r"5\sqrt{2}"), ("N", r"5\sqrt{2} cm", r"5\sqrt{2} m"),
        ("P", "3 cm^2", r"3\text{ cm}^2"),
        ("N", "5", "5 million"), ("N", "5 million", "5"), ("N", "5ab", "5"), ("N", "5 xy", "5"),
        ("N", "25", "5 squared"),
        ("N", "5", "5 squared"), ("P", "10", "10 km/h"), ("P", "10", "10 ft"), ("P", "1 ft", "12 inches"),
        ("P", "5", "--5"),
        ("P", "5", "5 eggs"), ("N", "-5", "--5"), ("E", "5", "five"), ("E", "2", "Two"), ("N", "3", "3 times"),
        # several values
        ("P", "(1, 2)", "(1,2)"), ("F", "(1, 2)", "(2, 1)"), ("F", "(1, 2)", "[1, 2]"), ("P", "1, 2", "2, 1"),
        ("P", r"\{1, 2\}", "2 and 1"), ("F", "1, 2", "1, 2, 3"), ("F", "2", "2 or 3 or 4"), ("P", "2 or 3", "3, 2"),
        ("P", r"\{5\}", "5"), ("P", r"\{1, \frac{1}{2}\}", r"\{0.5, 1\}"), ("N", "1, 2", "1"),
        ("P", "(1,2)", r"\left(1,2\right)"), ("P", r"\begin{pmatrix}1\\2\end{pmatrix}", "(1, 2)"),
        ("N", r"\begin{pmatrix}1\\2\end{pmatrix}", "(2, 1)"),
        # choices and words
        ("P", "B", r"\text{B}"), ("P", "B", "(B)"), ("P", "(B)", r"\textbf{(B)}"), ("F", "B", "C"),
        ("P", "B", "B) 12"), ("P", "(B)", "(B) 12"), ("N", "B", "Both A and B"), ("N", "A", "(A) and (B)"),
        ("P", "Tuesday", r"\text{tuesday}"), ("F", "Tuesday", "Monday"), ("F", "5", "no solution"), ("N", "B", "12"),
        ("P", "Alan Turing", "Alan Turing"),
        # algebra
        ("P", r"\frac{\sqrt{2}}{2}", r"\frac{1}{\sqrt{2}}"), ("P", "2", r"\sqrt{4}"), ("F", "2", r"\sqrt{5}"),
        ("P", "(x+1)^2", "x^2+2x+1"), ("F", "(x+1)^2", "x^2+1"), ("P", "x^2", "x²"), ("P", r"2\pi", "2π"),
        ("P", r"2\pi", "2*pi"), ("P", r"\frac{\sqrt{3}}{2}", "sqrt(3)/2"), ("P", "3", "x = 3"), ("P", "x = 3", "3"),
        ("F", "x = 3", "y = 3"), ("P", r"(-\infty, 2]", r"(-\infty, 2]"), ("P", r"(-\infty, 2]", "(-oo, 2]"),
        ("P", r"(-\infty, 2]", r"x \le 2"), ("P", r"x \le 2", r"(-\infty, 2]"),
        ("F", r"(-\infty, 2]", r"(-\infty, 2)"), ("P", r"[0,1) \cup (2,3]", r"(2,3] \cup [0,1)"),
        ("P", "x > 2", "2 < x"), ("F", "x > 2", r"x \ge 2"),
        ("P", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix}1&2\\3&4\end{bmatrix}"),
        ("F", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&2\\4&3\end{pmatrix}"),
        ("P", "i", r"\sqrt{-1}"), ("P", "3+4i", "4i+3"), ("P", r"\binom{5}{2}", "10"), ("P", "120", "5!"),
        ("F", r"\sqrt{2}", "1.41421356237309504880"), ("F", r"\sqrt{2}", r"\sqrt{2}+10^{-20}"),
        ("P", r"\log_2 8", "3"), ("P", r"\{\sqrt{2}, -\sqrt{2}\}", r"\pm\sqrt{2}"), ("E", "5", r"\frac{1}{}"),
        ("E", "5", "5 because 2 + 3 is 5"),
        # what is thrown away or taken apart must not make equal, nor different, what is not
        ("N", r"4210_5", r"4210_6"), ("P", "4210_5", "4210_{5}"), ("F", "4210_5", "4211_5"), ("P", "4210_5", "4210"),
        ("N", "f'(x)", "f(x)"), ("N", "f''(x)", "f'(x)"), ("N", "8:00", "9:00"), ("N", "2:40", "1:20"),
        ("P", "3:20", r"\frac{3}{20}"), ("F", r"\frac{m}{M+m}", r"\frac{M}{M+m}"), ("P", "2x", "2X"),
        ("F", r"\frac{4}{3}\pi abc", r"\frac{4}{3}\pi"), ("P", r"\frac{4}{3}\pi abc", r"\frac43\pi a b c"),
        ("P", "xy", "yx"), ("F", "xy", "xz"), ("P", r"\emptyset", r"\varnothing"), ("E", "1/3", "0.333..."),
        ("P", "10^{-3}", "10^-3"), ("N", r"\{x : x > 2\}", r"\{x : x > 3\}"), ("P", "10^{-3}", "1e-3"),
        ("P", "1e-3", "10^{-3}"), ("N", r"\sin 20^\circ", r"\sin 20"),
        *(("N", "6", f"6 {word}") for word in ("tenths", "hundredths", "halves", "trillion", "M", "below 0")),
        ("P", "6", "6 months"), ("P", "10 cm", r"0.1\,\text{m}"), ("P", r"25\pi", r"25\pi\text{ cm}^2"),
        ("P", "8", "8 AM"), ("F", "8 am", "8 p.m."), ("E", "3 hours and 20 minutes", "200 minutes"),
        ("P", "5 apples and 3 oranges", "3 oranges and 5 apples"), ("P", "45", "(C) 45"), ("F", "45", "(C) 46"),
        ("P", "(C) 45", "C"), ("P", "(C) 45", "45"), ("F", "(C) 45", "(D) 45"), ("P", "x+1", "(A) x+1"),
        ("P", "C", r"\text{Option C}"), ("F", "C", "option D"),
        # where the answer stands
        ("P", "72", "48 + 24 = 72\n#### 72"), ("P", "72", "#### Step 1: add\n48 + 24\n#### $72"),
        ("P", "5", "The answer is 5."), ("P", "5", "Final answer: **5**"),
        ("P", "5", "**Final Answer**\n\n$5$"), ("P", "5", "### Answer\n5 cm"), ("P", "2, 3", "Answers are 2 and 3."),
        ("P", "5", "His answer is 4. The answer is 5!"), ("P", "5", "The answer is 5, since the answer is odd."),
        ("P", "5", "The answer is $5$. I hope this helps!"), ("P", "2,125", "#### 2125\n"),
        ("F", "2", "The answer is 2 or 3 or 4."), ("F", "5", r"<think>\boxed{5}</think> I do not know"),
        ("F", "5", ""), ("F", "5", "It is 5."), ("F", "5", "\0\x01\ufffd" * 99),
        ("E", "2", r"first \boxed{1}, then \boxed{2}"), ("P", "2", "x: \\boxed{1}\n\nSo, last:\n\n\\boxed{2}"),
        ("P", "2", r"\boxed{2} and again \boxed{2}"), ("P", "2", r"\boxed{2} \boxed{2.0}"),
        ("P", "2", r"\boxed{2} but \boxed{3"), ("P", r"\frac{1}{2}", r"\boxed{\boxed{\frac12}}"),
        ("F", "5", r"\boxed{}"), ("P", "5", r"<think>\boxed{4}</think>\boxed{5}"), ("P", r"\{1\}", r"\boxed{\{1\}}"),
    ]
]  # fmt: skip


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[Case, Verdict]:
    marked = ("boxed", "####", "nswer", "think", "\0", "It is")
    pairs: list[tuple[object, str]] = [
        (case.gold, case.text if not case.text or any(mark in case.text for mark in marked) else boxed(case.text))
        for case in CASES
    ]
    return dict(zip(CASES, judge(tmp_path_factory.mktemp("math"), pairs), strict=True))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.wanted}: {case.gold} || {case.text[:40]}")
def test_case(case: Case, verdicts: dict[Case, Verdict]) -> None:
    verdict = verdicts[case]
    if case.wanted == "N":
        assert verdict.outcome is not Outcome.PASS, verdict
    else:
        assert verdict.outcome is {"P": Outcome.PASS, "F": Outcome.FAIL, "E": Outcome.ERROR}[case.wanted], verdict


BOMBS = [
    r"9^{9^{9^9}}", r"10^{10^{10}}", r"7^{999999999} \bmod 10", "1000000000!", "((20!)!)!",
    r"\prod_{k=1}^{1000000} k", r"\sum_{k=1}^{10000000} \frac{1}{k}", r"\binom{1000000000}{500000000}",
    r"\int_0^1 \frac{\sin(x^{x})}{\log(1+x^{3})+e^{x^{2}}} dx", r"2^{9999}!", "(" * 2000 + "1" + ")" * 2000,
    r"\frac{1}{1+" * 30 + "1" + "}" * 30, "9" * 5_000, r"(1+\sqrt{2}+\sqrt{3}+\sqrt{5}+\sqrt{7}+\sqrt{11})^{999}",
]  # fmt: skip


def test_what_would_run_for_hours_is_an_error_within_its_limits_and_costs_the_next_nothing(tmp_path: Path) -> None:
    pairs: list[tuple[object, str]] = [(r"\frac{\pi}{7}", boxed(bomb)) for bomb in BOMBS]
    fine: list[tuple[object, str]] = [("2", boxed(r"\sqrt{4}"))]
    mixed = [pair for bomb in pairs for pair in (bomb, *fine)]
    found = judge(tmp_path, mixed, limits={"cpu_s": 0.3}, workers=1)
    assert {verdict.outcome for verdict in found[1::2]} == {Outcome.PASS}
    assert {verdict.reason for verdict in found[::2]} == {MathReason.COMPARE_BUDGET}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("x" * 50_000_000, MathReason.NO_ANSWER),
        (r"\boxed{" * 200_000, MathReason.NO_ANSWER),
        (r"\boxed{5}" * 200_000, MathReason.MATCH),
        ("#### 5\n" * 200_000, MathReason.MATCH),
        ("{" * 1_000_000 + r"\boxed{5}", MathReason.MATCH),
        (boxed("5" + " " * 700 + "7"), MathReason.COMPARE_BUDGET),
        (boxed("9" * 5_000), MathReason.COMPARE_BUDGET),
        ("y" * 50_000_000 + "\n#### 5", MathReason.MATCH),
        (bytes(range(256)).decode("latin-1") * 1000, MathReason.NO_ANSWER),
        (boxed("\ud800"), MathReason.UNREADABLE),
        (boxed("\0" * 50), MathReason.NO_ANSWER),
    ],
    ids=range(11),
)
def test_an_answer_of_any_size_and_kind_is_judged(tmp_path: Path, text: str, reason: MathReason) -> None:
    (verdict,) = judge(tmp_path, [("5", text)])
    assert verdict.reason is reason


@pytest.mark.parametrize("gold", [None, True, "", " ", "#### ", [5], {"a": 1}, r"\boxed{1} or \boxed{2}", "9" * 301])
def test_gold_without_an_answer_is_no_fault_of_the_candidate(tmp_path: Path, gold: object) -> None:
    (verdict,) = judge(tmp_path, [(gold, boxed("5"))])
    assert (verdict.outcome, verdict.reason) == (Outcome.ERROR, MathReason.GOLD_INVALID)
    assert "r:0: no final answer in field 'answer'" in verdict.detail["detail"]


@pytest.mark.parametrize("gold", [5, 5.0, "5", "2 + 3 = 5\n#### 5", r"so \boxed{5}", "$5.00"])
def test_gold_may_be_a_number_an_answer_or_a_whole_solution(tmp_path: Path, gold: object) -> None:
    right, wrong = judge(tmp_path, [(gold, boxed("5")), (gold, boxed("6"))])
    assert (right.outcome, wrong.outcome) == (Outcome.PASS, Outcome.FAIL)
    assert right.detail == {"answer": "5", "extracted": "boxed", "compared": "exact"}


SPELLINGS = [
    ["1200", "1,200", r"\$1{,}200.00", "1.2 \\times 10^{3}", "1200 euros"],
    ["3/2", "1.5", r"\frac{6}{4}", r"1\frac12", "x = 1.5", "1.50 km"],
    [r"\{2, 3\}", "3, 2", "2 or 3", r"\{3,2\}"],
    ["(2, 3)", r"\left(2,3\right)"],
    ["B", r"\text{(B)}"],
    ["Tuesday", r"\textbf{tuesday}"],
    [r"\sqrt{2}", r"\sqrt{ 2 }"],
    [r"\sqrt{8}", r"\sqrt{8}."],
]


def test_without_gold_equal_plain_answers_are_one_answer_and_different_ones_are_not(tmp_path: Path) -> None:
    pairs: list[tuple[object, str]] = [(None, boxed(text)) for spellings in SPELLINGS for text in spellings]
    found = judge(tmp_path, pairs, gold_field=None)
    assert {(v.outcome, v.reason) for v in found} == {(Outcome.PASS, MathReason.EXTRACTED)}
    answers = [v.detail["answer"] for v in found]
    assert answers == [answers[sum(map(len, SPELLINGS[:n]))] for n, same in enumerate(SPELLINGS) for _ in same]
    assert len(set(answers)) == len(SPELLINGS)


@pytest.mark.parametrize(
    ("text", "outcome", "reason"),
    [
        ("I can't tell.", Outcome.FAIL, MathReason.NO_ANSWER),
        (r"\boxed{1} or \boxed{2}", Outcome.ERROR, MathReason.AMBIGUOUS),
        (r"\boxed{1} or \boxed{1.0}", Outcome.PASS, MathReason.EXTRACTED),
        (boxed("9" * 301), Outcome.ERROR, MathReason.UNREADABLE),
        (boxed(r"9^{9^{9^9}}"), Outcome.PASS, MathReason.EXTRACTED),
    ],
    ids=range(5),
)
def test_without_gold_a_final_answer_is_all_that_is_asked_for(
    tmp_path: Path, text: str, outcome: Outcome, reason: MathReason
) -> None:
    (verdict,) = judge(tmp_path, [("5", text)], gold_field=None)
    assert (verdict.outcome, verdict.reason) == (outcome, reason)


def test_a_tolerance_holds_only_where_it_is_given(tmp_path: Path) -> None:
    pairs: list[tuple[object, str]] = [
        ("3.14", boxed("3.141")),
        ("3.14", boxed("3.2")),
        ("(1, 2)", boxed("(1.0001, 2)")),
    ]
    assert [v.outcome for v in judge(tmp_path, pairs)] == [Outcome.FAIL] * 3
    near = [Outcome.PASS, Outcome.FAIL, Outcome.PASS]
    assert [v.outcome for v in judge(tmp_path, pairs, tolerance=1e-3)] == near
    assert [v.outcome for v in judge(tmp_path, pairs, absolute_tolerance=0.0011)] == near


def test_a_limit_that_would_be_none_is_refused_when_the_config_is_read() -> None:
    with pytest.raises(ValidationError, match=r"limits\.cpu_s"):
        MathExecEval.model_validate({"limits": {"cpu_s": 0}})


def test_the_last_number_counts_only_where_it_is_wanted(tmp_path: Path) -> None:
    pairs: list[tuple[object, str]] = [("1,200", "2 of 600 are 1,200 apples.")]
    assert judge(tmp_path, pairs)[0].reason is MathReason.NO_ANSWER
    (found,) = judge(tmp_path, pairs, extract="last_number")
    assert (found.outcome, found.detail["extracted"]) == (Outcome.PASS, "last_number")
    whole: list[tuple[object, str]] = [("3/4", "It is 3/4."), ("3/4", r"it is \frac{3}{4}"), ("3", "pages 10-3")]
    assert all(verdict.outcome is Outcome.PASS for verdict in judge(tmp_path, whole, extract="last_number"))


def test_a_wall_clock_that_runs_out_blames_nobody_and_leaves_no_process() -> None:
    limits = MathLimits(cpu_s=60, wall_s=1 + os.getpid() / 1e8)
    # In the command line, so that a process is known from those of another run of the tests.
    mark = f'"wall_s": {limits.wall_s}'.encode()

    async def run() -> MathReason:
        async with MathPool(1, limits) as pool:
            pending = asyncio.ensure_future(pool.evaluate((r"\pi", r"\binom{1000000000}{500000000}")))
            alive = 0
            while not pending.done():
                await asyncio.sleep(0.1)
                alive = max(alive, _processes(mark))
            assert alive > 0
            return await pending

    late = asyncio.run(run())
    assert (late, late.outcome) == (MathReason.INFRA_TIMEOUT, "error")
    assert _processes(mark) == 0


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads /proc")
def test_a_judge_holds_nothing_that_outlives_its_supervisor() -> None:
    """Elsewhere than on Linux, only the end of what it reads tells it that the supervisor is gone."""

    async def held() -> list[int]:
        async with MathPool(1, MathLimits()) as pool:
            assert await pool.evaluate((r"\pi", r"\frac{2\pi}{2}")) is MathReason.MATCH
            return [_sockets(judge) for supervisor in _children(os.getpid()) for judge in _children(supervisor)]

    assert asyncio.run(held()) == [1]


def _sockets(process: int) -> int:
    return sum(file.readlink().name.startswith("socket:") for file in Path(f"/proc/{process}/fd").iterdir())


def _children(parent: int) -> list[int]:
    tasks = Path(f"/proc/{parent}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


def _processes(argument: bytes) -> int:
    """Processes with this in their arguments, wherever they hang."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        with suppress(OSError):  # it has gone
            found.append(process.read_bytes())
    return sum(argument in words for words in found)
