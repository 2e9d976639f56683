"""Makes records that `PythonExecEval` takes from MBPP and HumanEval, as they are published. Runs no code.

MBPP (Austin et al. 2021, arXiv:2108.07732) asks in words and tests with asserts: `sanitized-mbpp.json` or `mbpp.jsonl`
of github.com/google-research/google-research/tree/master/mbpp. HumanEval (Chen et al. 2021, arXiv:2107.03374) has
functions to complete, tested with `check(candidate)`: `HumanEval.jsonl.gz` of github.com/openai/human-eval. MBPP in
that form, as CodeT (arXiv:2207.10397) has it, is read as well.
"""

import ast
import gzip
import zlib
from pathlib import Path
from typing import Any

import msgspec

from fastdistill.core.errors import InputError
from fastdistill.data.prepared import Drawn, draw


class _Asserted(msgspec.Struct, frozen=True):
    """A problem of MBPP; the sanitized edition says `prompt` and `test_imports`."""

    task_id: int | str
    code: str
    test_list: list[str]
    prompt: str = ""
    text: str = ""
    test_imports: list[str] = []
    test_setup_code: str = ""

    def record(self) -> dict[str, Any]:
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

    def record(self) -> dict[str, Any]:
        return {
            "task_id": str(self.task_id),
            "instruction": f"Complete this function:\n\n```python\n{self.prompt.strip()}\n```\n",
            "entry_point": self.entry_point.strip(),
            "setup": self.prompt,
            "tests": [self.test],
            "gold_code": self.canonical_solution,
        }


def prepare_mbpp(source: Path, samples: int, seed: int, output: Path | None = None) -> Drawn:
    """Draws records from any edition of MBPP; see `draw`.

    Raises:
        InputError: the file can't be read, or is no such edition.
        EnvironmentFault: the files can't be written.
    """
    return draw("mbpp", _records(source, "MBPP"), samples, seed, output)


def prepare_humaneval(source: Path, samples: int, seed: int, output: Path | None = None) -> Drawn:
    """Draws records from HumanEval; raises as `prepare_mbpp` does."""
    return draw("humaneval", _records(source, "HumanEval"), samples, seed, output)


def _records(source: Path, name: str) -> list[dict[str, Any]]:
    try:
        content = source.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        is_list = content.lstrip()[:1] == b"["
        lines = msgspec.json.decode(content, type=list[msgspec.Raw]) if is_list else content.splitlines()
    except (OSError, EOFError, ValueError, zlib.error) as error:
        raise InputError(f"{source}: can't be read ({error}); give {name}'s file as --source") from error
    records = []
    for number, line in enumerate(map(bytes, lines), 1):
        checked = name == "HumanEval" or b'"canonical_solution"' in line
        form: type[_Asserted | _Checked] = _Checked if checked else _Asserted
        try:
            if line.strip():
                records.append(msgspec.json.decode(line, type=form).record())
        except ValueError as error:
            raise InputError(f"{source}:{number}: not a problem of {name} ({error}); fetch the file again") from error
    if not records:
        raise InputError(f"{source}: holds no problem; give {name}'s file as --source")
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
