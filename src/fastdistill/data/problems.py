"""Makes records of problem sets, as they are published, for `MathExecEval` and `PythonExecEval`. Runs nothing.

GSM8K (Cobbe et al. 2021, arXiv:2110.14168; MIT licence) has 7,473 training and 1,319 test problems, whose answers end
in `#### N`. MBPP (Austin et al. 2021, arXiv:2108.07732) asks in words and tests with asserts, in `sanitized-mbpp.json`
or `mbpp.jsonl`. HumanEval (Chen et al. 2021, arXiv:2107.03374) has functions to complete, tested with
`check(candidate)`. MBPP in that form, as CodeT (arXiv:2207.10397) has it, is read as well.
"""

import ast
import gzip
import re
import zlib
from pathlib import Path
from typing import Any

import msgspec

from fastdistill.core.errors import InputError
from fastdistill.data.answer_math import extract
from fastdistill.data.prepared import Drawn, draw

_GITHUB = "https://github.com/"
_URLS = {
    "GSM8K": f"{_GITHUB}openai/grade-school-math/tree/master/grade_school_math/data",
    "MBPP": f"{_GITHUB}google-research/google-research/tree/master/mbpp",
    "HumanEval": f"{_GITHUB}openai/human-eval/tree/master/data",
}


class _Worded(msgspec.Struct, frozen=True):
    """A problem of GSM8K."""

    question: str
    answer: str

    def record(self, place: str) -> dict[str, Any]:
        solution, marked, _ = self.answer.rpartition("####")
        final = extract(self.answer)
        if not marked or final is None:
            raise ValueError("the answer has no final `#### N`")
        return {
            "task_id": f"gsm8k-{place}",
            "question": self.question.strip(),
            "answer": final.answers[0],
            "solution": re.sub("<<[^<>]*>>", "", solution).strip(),  # what a calculator was told: `<<48/2=24>>`
        }


class _Asserted(msgspec.Struct, frozen=True):
    """A problem of MBPP; the sanitized edition says `prompt` and `test_imports`."""

    task_id: int | str
    code: str
    test_list: list[str]
    prompt: str = ""
    text: str = ""
    test_imports: list[str] = []
    test_setup_code: str = ""

    def record(self, place: str) -> dict[str, Any]:
        tests = "\n".join(self.test_list)
        return {
            "task_id": f"mbpp-{self.task_id}",
            "instruction": f"{self.prompt or self.text}\n\nYour code should pass these tests:\n\n{tests}\n",
            "entry_point": _called(self.code, tests),
            "setup": "\n".join(filter(None, (*self.test_imports, self.test_setup_code))),
            "tests": self.test_list,
            "gold_code": self.code,
        }


class _Checked(msgspec.Struct, frozen=True):
    """A problem of HumanEval."""

    task_id: int | str
    prompt: str
    entry_point: str
    canonical_solution: str
    test: str

    def record(self, place: str) -> dict[str, Any]:
        return {
            "task_id": str(self.task_id),
            "instruction": f"Complete this function:\n\n```python\n{self.prompt.strip()}\n```\n",
            "entry_point": self.entry_point.strip(),
            "setup": self.prompt,
            "tests": [self.test],
            "gold_code": self.canonical_solution,
        }


def prepare_problems(name: str, source: Path, samples: int, seed: int, output: Path | None = None) -> Drawn:
    """Draws `samples` problems of GSM8K, MBPP or HumanEval for training, and a fifth as many to evaluate; see `draw`.

    `source` is a folder with `train.jsonl` and `test.jsonl`, or one file, a sixth of which is set apart to evaluate.

    Raises:
        InputError: a file can't be read, or has another problem than that set's.
        EnvironmentFault: the records can't be written.
    """
    path = source.expanduser().absolute()
    train = _records(path / "train.jsonl" if path.is_dir() else path, name)
    held_out = _records(path / "test.jsonl", name) if path.is_dir() else None
    return draw(name.lower(), train, samples, seed, output, held_out)


def _records(source: Path, name: str) -> list[dict[str, Any]]:
    remedy = f"give {name}'s file as --source, from {_URLS[name]}"
    try:
        content = source.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        is_list = content.lstrip()[:1] == b"["
        lines = msgspec.json.decode(content, type=list[msgspec.Raw]) if is_list else content.splitlines()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{source}: can't be read ({error}); {remedy}") from error
    records = []
    for number, line in enumerate(map(bytes, lines)):
        asserted = name == "MBPP" and b'"canonical_solution"' not in line
        form: Any = _Worded if name == "GSM8K" else _Asserted if asserted else _Checked
        try:
            if line.strip():
                records.append(msgspec.json.decode(line, type=form).record(f"{source.stem}-{number:05d}"))
        except ValueError as error:
            raise InputError(f"{source}:{number + 1}: not a problem of {name} ({error}); {remedy}") from error
    if not records:
        raise InputError(f"{source}: holds no problem; {remedy}")
    return records


def _called(code: str, tests: str) -> str:
    """The function of the code that the tests call first; none where either is no Python, or they call none."""
    try:
        defined = {node.name for node in ast.parse(code).body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        calls = [node.func for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Call)]
    except (SyntaxError, ValueError, RecursionError):
        return ""
    names = [(call.lineno, call.col_offset, call.id) for call in calls if isinstance(call, ast.Name)]
    return next((name for _, _, name in sorted(names) if name in defined), "")
