"""Says whether two mathematical expressions are equal, by math-verify; as a program, the worker of `math.MathPool`.

A supervisor that has everything imported forks a judge, which answers pair after pair. One that runs out of CPU time or
memory costs 10 ms, for the supervisor forks the next; what was asked is `compare_budget`. math-verify's own time limits
are off: they count whole seconds of wall time, and take running out of them for a difference. The text is parsed as
LaTeX and never evaluated as Python.
"""

import ctypes
import gc
import json
import logging
import os
import re
import resource
import signal
import sys
import warnings
from multiprocessing import get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any, Literal

from fastdistill.data.execution.worker_process import Channel, confine_process, line

Finding = Literal["match", "mismatch", "unreadable", "compare_budget"]
"""`unreadable`: one of the two is no expression."""


def main() -> None:
    limits = json.loads(sys.argv[1])
    confine_process(limits["memory_bytes"])
    logging.disable()
    warnings.simplefilter("ignore")
    _equal(r"\frac{1}{\sqrt{2}}", r"\left(1, \frac{\sqrt{2}}{2}\right]")  # warms the grammar up
    gc.freeze()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # the grammar tells it there of every text that is none
    judge = _Judge(limits["cpu_s"], limits["memory_bytes"])
    Channel().serve(lambda pair: [judge.ask(pair)])


class _Judge:
    """The forked process, and another one whenever it has died."""

    def __init__(self, cpu_s: float, memory_bytes: int) -> None:
        self._limits = cpu_s, memory_bytes
        self._process: ForkProcess | None = None

    def ask(self, pair: list[str]) -> Finding:
        if self._process is None:
            self._answers, theirs = _FORK.Pipe()
            self._process = _FORK.Process(target=_serve, args=(self._answers, theirs, *self._limits), daemon=True)
            self._process.start()
            theirs.close()
        self._answers.send_bytes(line(pair))
        try:
            return "match" if json.loads(self._answers.recv_bytes()) else "mismatch"
        except (EOFError, OSError):
            self._process.join()
            raised = self._process.exitcode == _RAISED
            self._process = None
            self._answers.close()
            return "unreadable" if raised else "compare_budget"


_FORK = get_context("fork")
_RAISED = 1  # the exit status of a process that an exception ends: whatever math-verify raises
_PR_SET_PDEATHSIG = 1


def _serve(supervisors: Connection, questions: Connection, cpu_s: float, memory_bytes: int) -> None:
    for descriptor in (0, 1, supervisors.fileno()):  # whoever waits for the supervisor's end waits for no judge
        os.dup2(2, descriptor)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        while True:
            gold, candidate = json.loads(questions.recv_bytes())
            peak = _peak_bytes()
            signal.setitimer(signal.ITIMER_PROF, cpu_s)  # kills with SIGPROF
            equal = _equal(gold, candidate)
            signal.setitimer(signal.ITIMER_PROF, 0)
            if not equal and _peak_bytes() > max(peak, memory_bytes // 2):
                raise MemoryError  # which sympy takes for a difference
            questions.send_bytes(line(equal))
    except (MemoryError, RecursionError):
        os._exit(3)


def _peak_bytes() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _equal(gold: str, candidate: str) -> bool:
    from math_verify import verify
    from sympy import Tuple, zoo

    is_complex = any(re.search(r"\bi\b|\\sqrt\{?-", text) for text in (gold, candidate))
    letters = [set(re.sub(r"\\[A-Za-z]+", "", text)) for text in (gold, candidate)]
    # M is m, but where a text has both.
    one_case = all(len(each) == len({letter.lower() for letter in each}) for each in letters)
    wanted, given = (_expression(text, is_complex, one_case) for text in (gold, candidate))
    if wanted.has(zoo) and given.has(zoo):
        raise ValueError("one 1/0 is equal to another")
    if _is_vector(wanted) != _is_vector(given):  # a column is a tuple
        wanted, given = (Tuple(*side) if _is_vector(side) else side for side in (wanted, given))
    options: dict[str, Any] = {"numeric_precision": 50, "timeout_seconds": None, "raise_on_error": True}
    return bool(verify(wanted, given, allow_set_relation_comp=True, **options))


def _is_vector(value: Any) -> bool:
    return hasattr(value, "shape") and 1 in value.shape


def _expression(text: str, is_complex: bool, one_case: bool) -> Any:
    """A sympy object. Decimals are exact: a rounded one equals neither 1/3 nor pi."""
    from latex2sympy2_extended import NormalizationConfig, latex2sympy, normalize_latex
    from latex2sympy2_extended.latex2sympy2 import ConversionConfig
    from sympy import I

    for pattern, latex in _TO_LATEX:
        text = pattern.sub(latex, text)
    text = _DECIMAL.sub(lambda found: rf"\frac{{{int(found[1] + found[2])}}}{{{10 ** len(found[2])}}}", text)
    plain = NormalizationConfig(basic_latex=True, malformed_operators=True, nits=True, boxed="none")
    how = ConversionConfig(lowercase_symbols=one_case)
    found = latex2sympy(normalize_latex(text, config=plain), is_real=not is_complex, conversion_config=how)
    if _THROWN_AWAY.search(text):
        raise ValueError(text)
    return found.xreplace({symbol: I for symbol in found.free_symbols if is_complex and symbol.name == "i"})


# By latex2sympy: dots, a base, a prime, what a set is of.
_THROWN_AWAY = re.compile(r"\\ldots|\d_|[A-Za-z}]'|\\\{[^}]*:")
_DECIMAL = re.compile(r"(\d*)\.(\d+)")
_TO_LATEX = [
    (re.compile(pattern), latex)
    for pattern, latex in (
        (r"(?<![\\\w])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\\w])oo\b", r"\\infty"),
        (r"(?<![\\A-Za-z])(sqrt|pi|sin|cos|tan|log|ln|exp|infty)(?![A-Za-z])", r"\\\1 "),
        (r"(?<=\d)[eE]([-+]?\d+)(?!\d)", r"\\cdot 10^{\1}"),
        (r"\\varnothing", r"\\emptyset"),
        (r"\*\*", "^"),
        (r"\^\s*(-\d+)", r"^{\1}"),
        (r"\*", r"\\cdot "),
    )
]


if __name__ == "__main__":
    main()
