"""Makes records of GSM8K's official files (`question`, and `answer` ending in `#### N`). Never asks a model.

GSM8K (Cobbe et al. 2021, arXiv:2110.14168; MIT licence) has 7,473 training and 1,319 test problems.
"""

import re
from pathlib import Path

import msgspec

from fastdistill.core.errors import InputError
from fastdistill.data.answer_math import extract
from fastdistill.data.prepared import Drawn, draw

URL = "https://github.com/openai/grade-school-math/tree/master/grade_school_math/data"


class _Problem(msgspec.Struct, frozen=True):
    question: str
    answer: str


def prepare_gsm8k(source: Path, samples: int, seed: int, output: Path | None = None) -> Drawn:
    """Draws `samples` problems for training, and a fifth as many to evaluate.

    `source` is a folder with `train.jsonl` and `test.jsonl`, or one file, a sixth of which is set apart to evaluate.
    The same arguments give the same bytes; with the same seed, a smaller draw begins a larger one.

    Raises:
        InputError: a file can't be read, or has a line that is none of GSM8K's.
        EnvironmentFault: the records can't be written.
    """
    path = source.expanduser().absolute()
    if path.is_dir():
        return draw("gsm8k", _records(path / "train.jsonl"), samples, seed, output, _records(path / "test.jsonl"))
    return draw("gsm8k", _records(path), samples, seed, output)


def _records(path: Path) -> list[dict[str, str]]:
    decoder = msgspec.json.Decoder(_Problem)
    records = []
    try:
        for number, line in enumerate(path.read_bytes().splitlines()):
            problem = decoder.decode(line)
            solution, marked, _ = problem.answer.rpartition("####")
            final = extract(problem.answer)
            if not marked or final is None:
                raise ValueError("the answer has no final `#### N`")
            record = {"task_id": f"gsm8k-{path.stem}-{number:05d}", "question": problem.question.strip()}
            records.append(record | {"answer": final.answers[0], "solution": _ANNOTATION.sub("", solution).strip()})
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; fetch train.jsonl and test.jsonl from {URL}") from error
    except ValueError as error:
        raise InputError(f"{path}:{len(records) + 1}: not a line of GSM8K ({error}); see {URL}") from error
    if not records:
        raise InputError(f"{path}: empty; fetch it again from {URL}")
    return records


_ANNOTATION = re.compile(r"<<[^<>]*>>")  # what a calculator was told: `<<48/2=24>>`
