"""GSM8K as records: what is drawn, from which file, and lines that are none."""

import json
from pathlib import Path
from typing import Any

import pytest

from fastdistill.core.errors import InputError
from fastdistill.data.gsm8k import prepare_gsm8k
from fastdistill.data.prepared import Drawn


def write(path: Path, count: int, first: int = 0) -> Path:
    lines = [
        {"question": f" What is {n} + 1? ", "answer": f"It is {n}+1 = <<{n}+1={n + 1}>>{n + 1}.\n#### {n + 1:,}"}
        for n in range(first, first + count)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def records(prepared: Drawn, split: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (prepared.folder / f"{split}.jsonl").read_text().splitlines()]


def test_a_record_has_the_question_the_final_answer_and_the_solution(tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", 1, 1999)
    write(tmp_path / "test.jsonl", 1)
    prepared = prepare_gsm8k(tmp_path, 10, 13, tmp_path / "out")
    assert records(prepared, "train") == [
        {
            "task_id": "gsm8k-train-00000",
            "question": "What is 1999 + 1?",
            "answer": "2,000",
            "solution": "It is 1999+1 = 2000.",
        }
    ]
    assert [record["task_id"] for record in records(prepared, "eval")] == ["gsm8k-test-00000"]


def test_a_draw_repeats_and_a_smaller_one_begins_a_larger_one(tmp_path: Path) -> None:
    file = write(tmp_path / "train.jsonl", 60)
    draws = [prepare_gsm8k(file, n, seed, tmp_path / f"{n}-{seed}") for n, seed in ((20, 1), (40, 1), (20, 2))]
    small, large, other = [[record["task_id"] for record in records(draw, "train")] for draw in draws]
    assert (small, len(large)) == (large[:20], 40)
    assert small != other
    again = prepare_gsm8k(file, 20, 1, tmp_path / "again")
    assert (again.folder / "train.jsonl").read_bytes() == (draws[0].folder / "train.jsonl").read_bytes()


def test_no_record_is_in_both_parts_of_one_file(tmp_path: Path) -> None:
    prepared = prepare_gsm8k(write(tmp_path / "train.jsonl", 60), 1000, 13, tmp_path / "out")
    train, held_out = ({record["task_id"] for record in records(prepared, split)} for split in ("train", "eval"))
    assert (prepared.train, prepared.eval) == (len(train), len(held_out)) == (50, 10)
    assert not train & held_out


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not a line of GSM8K"),
        ('{"question": "Q"}', "answer"),
        ('{"question": "Q", "answer": "It is 5."}', "has no final"),
        ('{"question": "Q", "answer": "It is 5. #### "}', "has no final"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = write(tmp_path / "train.jsonl", 1)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InputError, match=rf"train\.jsonl:2: .*{problem}"):
        prepare_gsm8k(file, 10, 13, tmp_path / "out")


def test_a_file_that_is_missing_or_empty_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl: No such file.*grade-school-math"):
        prepare_gsm8k(tmp_path, 10, 13)
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(InputError, match=r"train\.jsonl: empty"):
        prepare_gsm8k(tmp_path, 10, 13)
