"""Records of GSM8K, MBPP and HumanEval, from files as they are published, and draws that keep their promises."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from fastdistill.core.errors import InputError
from fastdistill.data.prepared import Drawn, draw
from fastdistill.data.problems import prepare_problems

ASSERTED = {
    "source_file": "Benchmark Questions Verification V2.ipynb",
    "task_id": 602,
    "prompt": "Write a function to halve a number.",
    "code": "import math\ndef other(x): return x\ndef half(x): return x / 2",
    "test_imports": ["import math"],
    "test_list": ["assert math.isclose(half(1), 0.5)", "assert half(4) == 2"],
}
CHECKED = {
    "task_id": "HumanEval/0",
    "prompt": "def half(x):\n    '''Half of x.'''\n",
    "entry_point": "half ",
    "canonical_solution": "    return x / 2\n",
    "test": "def check(candidate):\n    assert candidate(4) == 2\n",
}


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_asserted_problem_has_its_tests_in_the_instruction_and_an_entry_point(tmp_path: Path) -> None:
    (tmp_path / "mbpp.json").write_text(json.dumps([ASSERTED]))
    drawn = prepare_problems("MBPP", tmp_path / "mbpp.json", 10, 13, tmp_path / "out")
    assert str(drawn).startswith("train: 1 records\neval: 0 records\n")
    (record,) = lines(drawn.folder / "train.jsonl")
    assert record.pop("instruction").endswith("tests:\n\nassert math.isclose(half(1), 0.5)\nassert half(4) == 2\n")
    assert record == {
        "task_id": "mbpp-602",
        "entry_point": "half",
        "setup": "import math",
        "tests": ASSERTED["test_list"],
        "gold_code": ASSERTED["code"],
    }


@pytest.mark.parametrize("edition", ["text", "checked"])
def test_the_other_editions_of_mbpp_are_read(edition: str, tmp_path: Path) -> None:
    text = {"text": "Halve.", "task_id": 1, "code": "def h(x): return", "test_list": ["assert not h(1)"]}
    (tmp_path / "mbpp.jsonl").write_text(json.dumps({"text": text, "checked": CHECKED}[edition]) + "\n\n")
    (record,) = lines(
        prepare_problems("MBPP", tmp_path / "mbpp.jsonl", 10, 13, tmp_path / "out").folder / "train.jsonl"
    )
    assert record["entry_point"] == {"text": "h", "checked": "half"}[edition]


def test_a_problem_to_complete_is_its_own_setup(tmp_path: Path) -> None:
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(gzip.compress(json.dumps(CHECKED).encode()))
    (record,) = lines(prepare_problems("HumanEval", path, 10, 13, tmp_path / "out").folder / "train.jsonl")
    assert record["setup"] == CHECKED["prompt"]
    assert (record["entry_point"], record["tests"]) == ("half", [CHECKED["test"]])
    assert record["instruction"].endswith("```python\ndef half(x):\n    '''Half of x.'''\n```\n")


BROKEN = {
    "absent": (None, "can't be read"),
    "empty": (b"\n", "holds no problem"),
    "half_an_archive": (gzip.compress(b"x" * 99)[:-9], "can't be read"),
    "half_a_list": (b'[{"task_id": 1}', "can't be read"),
    "no_json": (b'{"task_id": 1,', ":1: not a problem"),
    "noise": (b"\x00\xff\n", ":1: not a problem"),
    "other_fields": (b'\n{"question": "2 + 2?", "answer": "4"}\n', ":2: not a problem"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_file_of_another_kind_is_one_error_that_names_the_place(name: str, tmp_path: Path) -> None:
    content, message = BROKEN[name]
    if content is not None:
        (tmp_path / "file").write_bytes(content)
    for problems in ("MBPP", "HumanEval"):
        with pytest.raises(InputError, match=message):
            prepare_problems(problems, tmp_path / "file", 10, 13, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_draw_is_repeatable_and_never_trains_on_what_another_evaluates_with(tmp_path: Path) -> None:
    records = [{"n": n} for n in range(60)]
    small, whole, again, other = (
        draw("numbers", records, samples, seed, tmp_path / str(n))
        for n, (samples, seed) in enumerate([(10, 1), (100, 1), (100, 1), (100, 2)])
    )
    assert [(d.train, d.eval) for d in (small, whole)] == [(10, 2), (50, 10)]
    train, held_out = lines(whole.folder / "train.jsonl"), lines(whole.folder / "eval.jsonl")
    assert lines(small.folder / "train.jsonl") == train[:10]
    assert lines(small.folder / "eval.jsonl") == held_out[:2]
    assert sorted(line["n"] for line in train + held_out) == list(range(60))
    assert lines(again.folder / "train.jsonl") == train != lines(other.folder / "train.jsonl")


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
    prepared = prepare_problems("GSM8K", tmp_path, 10, 13, tmp_path / "out")
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
    draws = [
        prepare_problems("GSM8K", file, n, seed, tmp_path / f"{n}-{seed}") for n, seed in ((20, 1), (40, 1), (20, 2))
    ]
    small, large, other = [[record["task_id"] for record in records(draw, "train")] for draw in draws]
    assert (small, len(large)) == (large[:20], 40)
    assert small != other
    again = prepare_problems("GSM8K", file, 20, 1, tmp_path / "again")
    assert (again.folder / "train.jsonl").read_bytes() == (draws[0].folder / "train.jsonl").read_bytes()


def test_no_record_is_in_both_parts_of_one_file(tmp_path: Path) -> None:
    prepared = prepare_problems("GSM8K", write(tmp_path / "train.jsonl", 60), 1000, 13, tmp_path / "out")
    train, held_out = ({record["task_id"] for record in records(prepared, split)} for split in ("train", "eval"))
    assert (prepared.train, prepared.eval) == (len(train), len(held_out)) == (50, 10)
    assert not train & held_out


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        ("{", "not a problem of GSM8K"),
        ('{"question": "Q"}', "answer"),
        ('{"question": "Q", "answer": "It is 5."}', "has no final"),
        ('{"question": "Q", "answer": "It is 5. #### "}', "has no final"),
    ],
)
def test_a_line_that_is_none_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = write(tmp_path / "train.jsonl", 1)
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(InputError, match=rf"train\.jsonl:2: .*{problem}"):
        prepare_problems("GSM8K", file, 10, 13, tmp_path / "out")


def test_a_file_that_is_missing_or_empty_is_named_with_where_to_get_it(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"train\.jsonl: can't be read .*No such file.*grade-school-math"):
        prepare_problems("GSM8K", tmp_path, 10, 13)
    (tmp_path / "train.jsonl").touch()
    with pytest.raises(InputError, match=r"train\.jsonl: holds no problem.*grade-school-math"):
        prepare_problems("GSM8K", tmp_path, 10, 13)
