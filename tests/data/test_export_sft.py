import hashlib
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from msgspec.structs import replace
from pydantic import ValidationError

from fastdistill.core.types import Candidate, Cut, Outcome, Sample, Status, Verdict
from fastdistill.data.export.dataset import BYTES_PER_BLOCK, BYTES_PER_GROUP
from fastdistill.data.export.sft import ExportSFT
from tests.context import TestContext, candidate

ASKED = ({"role": "system", "content": "Return SQL only."}, {"role": "user", "content": "Wie viele Sänger?"})


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


def accepted(answer: str = "SELECT 'é'", attempt: int = 0) -> Candidate:
    return candidate(answer, attempt, messages=ASKED).judged(Verdict("rules", "f", Outcome.PASS, "ok"))


def sample(index: int = 0, candidates: Sequence[Candidate] = (accepted(),), **record: Any) -> Sample:
    return Sample(index, f"t.jsonl:{index + 1}", record, f"task-{index}", f"id-{index}", {}, tuple(candidates))


def export(ctx: TestContext, step: ExportSFT, *samples: Sample) -> list[Sample]:
    return list(step.run(iter(samples), ctx))


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def test_each_shape_has_its_own_file_and_no_row_has_both(ctx: TestContext) -> None:
    export(ctx, ExportSFT(), sample())
    answer = {"role": "assistant", "content": "SELECT 'é'"}
    columns = {
        "fd_id": "id-0#0",
        "fd_sample_id": "id-0",
        "fd_candidate_id": "candidate-0",
        "fd_task_id": "task-0",
        "fd_model": "teacher-1",
        "fd_seed": 0,
        "fd_attempt": 0,
        "fd_score": None,
        "fd_gates": [{"gate": "rules", "outcome": "pass", "reason": "ok", "score": None}],
    }
    rows = {"sft": {"messages": [*ASKED, answer], **columns}}
    rows["sft_pc"] = {"prompt": list(ASKED), "completion": [answer], **columns}
    for folder, row in rows.items():
        (line,) = lines(ctx.dist / folder / "train.jsonl")
        assert list(line) == list(row)
        assert line == row
        assert pq.read_table(ctx.dist / folder / "train.parquet").to_pylist() == [row]
    assert "é".encode() in (ctx.dist / "sft" / "train.jsonl").read_bytes()


def test_every_sample_goes_on_and_only_the_chosen_are_written(ctx: TestContext) -> None:
    failed = candidate("SELECT 2", 1).judged(Verdict("rules", "f", Outcome.FAIL, "too_long"))
    samples = [
        sample(0, [accepted("a", 0), failed, accepted("b", 2)]),
        replace(sample(1, [accepted("c", 0), accepted("d", 1)]), selection=("candidate-1",)),
        sample(2, [failed]),
        replace(sample(3), status=Status.FAILED),
    ]
    assert export(ctx, ExportSFT(), *samples) == samples
    assert [row["fd_id"] for row in lines(ctx.dist / "sft" / "train.jsonl")] == ["id-0#0", "id-0#2", "id-1#1"]


def test_no_rows_are_still_a_valid_data_set(ctx: TestContext) -> None:
    export(ctx, ExportSFT(validation=0.1, keep_fields=("q",)))
    for split in ("train", "validation"):
        empty = pq.read_table(ctx.dist / "sft_pc" / f"{split}.parquet")
        assert empty.num_rows == 0
        assert empty.column_names[:2] == ["prompt", "completion"]
        assert empty.column_names[-1] == "fd_q"
        assert (ctx.dist / "sft" / f"{split}.jsonl").read_bytes() == b""


def test_only_what_is_asked_for_is_written(ctx: TestContext) -> None:
    export(ctx, ExportSFT(formats=("jsonl",), shapes=("prompt_completion",)), sample())
    assert [path.relative_to(ctx.dist).as_posix() for path in ctx.dist.rglob("*.*")] == ["sft_pc/train.jsonl"]


def test_the_same_samples_give_the_same_bytes(ctx: TestContext) -> None:
    hashes = []
    for _ in range(2):
        export(ctx, ExportSFT(validation=0.3), *(sample(n) for n in range(1500)))
        hashes.append({path: hashlib.sha256(path.read_bytes()).hexdigest() for path in ctx.dist.rglob("*.*")})
    assert hashes[0] == hashes[1]
    assert len(hashes[0]) == 8


def test_row_groups_are_as_large_as_their_bound_in_bytes(ctx: TestContext) -> None:
    export(ctx, ExportSFT(), *(sample(n, [accepted("x" * 8 * 2**10)]) for n in range(2500)))
    metadata = pq.read_metadata(ctx.dist / "sft" / "train.parquet")
    written = iter((ctx.dist / "sft" / "train.jsonl").read_bytes().splitlines(keepends=True))
    sizes = [sum(map(len, islice(written, metadata.row_group(n).num_rows))) for n in range(metadata.num_row_groups)]
    assert len(sizes) == 5
    assert all(BYTES_PER_GROUP <= size < BYTES_PER_GROUP + BYTES_PER_BLOCK + 9_000 for size in sizes[:-1])
    assert sizes[-1] < BYTES_PER_GROUP
    assert next(written, None) is None

    export(ctx, ExportSFT(), *(sample(n, [accepted("x" * 3 * 2**20)]) for n in range(8)))
    assert pq.read_metadata(ctx.dist / "sft" / "train.parquet").num_row_groups == 4


def test_an_export_does_not_import_pandas(tmp_path: Path) -> None:
    """pyarrow does, 50 MB of it, as soon as it converts an object of Python's; `datasets` brings it to these tests."""
    code = """
import sys
from pathlib import Path
import pyarrow as pa
from fastdistill.data.export.dataset import parquet_file
with parquet_file(Path(sys.argv[1]), pa.schema([("a", pa.list_(pa.string()))])) as write:
    write(b'{"a":["b"]}\\n')
assert "pandas" not in sys.modules
pa.array(["b"])
assert "pandas" in sys.modules, "nothing is shown"
"""
    path = tmp_path / "t.parquet"
    subprocess.run([sys.executable, "-c", code, path], check=True)
    assert pq.read_table(path).to_pylist() == [{"a": ["b"]}]


def test_a_run_that_stops_leaves_no_half_file(ctx: TestContext) -> None:
    export(ctx, ExportSFT(), sample(0))
    before = {path: path.read_bytes() for path in ctx.dist.rglob("*.*")}

    stopped = ExportSFT().run((sample(n) for n in range(10)), ctx)
    next(stopped)
    stopped.close()  # type: ignore[attr-defined]

    def broken() -> Iterator[Sample]:
        yield sample(1)
        raise RuntimeError("disk on fire")

    with pytest.raises(RuntimeError, match="disk on fire"):
        list(ExportSFT().run(broken(), ctx))
    assert {path: path.read_bytes() for path in ctx.dist.rglob("*.*")} == before


def test_the_student_may_be_asked_otherwise(ctx: TestContext) -> None:
    def prompt(step: ExportSFT) -> Any:
        export(ctx, step, sample(q="How many?"))
        return lines(ctx.dist / "sft_pc" / "train.jsonl")[0]["prompt"]

    user = {"role": "user", "content": "Q: How many?"}
    assert prompt(ExportSFT(template="Q: {{ q }}")) == [user]
    assert prompt(ExportSFT(template="Q: {{ q }}", system_prompt="SQL!")) == [
        {"role": "system", "content": "SQL!"},
        user,
    ]
    assert prompt(ExportSFT(system_prompt="SQL!")) == [{"role": "system", "content": "SQL!"}, ASKED[1]]
    assert prompt(ExportSFT(system_prompt="")) == [ASKED[1]]


def test_kept_fields_are_text(ctx: TestContext) -> None:
    record: dict[str, Any] = {"q": "é", "n": 1, "tags": ["a", {"b": None}]}
    export(ctx, ExportSFT(keep_fields=("q", "n", "tags", "absent")), sample(**record))
    (row,) = pq.read_table(ctx.dist / "sft" / "train.parquet").to_pylist()
    assert (row["fd_q"], row["fd_n"], row["fd_tags"], row["fd_absent"]) == ("é", "1", '["a",{"b":null}]', None)
    assert lines(ctx.dist / "sft" / "train.jsonl") == [row]


def test_a_kept_field_is_text_whatever_other_exports_call_a_number(ctx: TestContext) -> None:
    export(ctx, ExportSFT(keep_fields=("margin",)), sample(0, margin="wide"))
    assert pq.read_table(ctx.dist / "sft" / "train.parquet").to_pylist()[0]["fd_margin"] == "wide"


def test_a_group_is_never_split_and_the_share_is_near(ctx: TestContext) -> None:
    samples = [sample(n, table=f"t{n % 500}") for n in range(2000)]
    export(ctx, ExportSFT(validation=0.2, group_by="table", keep_fields=("table",)), *samples)
    train, validation = (lines(ctx.dist / "sft" / f"{split}.jsonl") for split in ("train", "validation"))
    assert len(train) + len(validation) == 2000
    assert not {row["fd_table"] for row in train} & {row["fd_table"] for row in validation}
    assert 300 < len(validation) < 500


def test_three_splits_share_no_group_and_neither_share_moves_the_other(ctx: TestContext) -> None:
    def groups(**shares: float) -> dict[str, set[str]]:
        samples = [sample(n, table=f"t{n % 500}") for n in range(1000)]
        step = ExportSFT(group_by="table", keep_fields=("table",), formats=("jsonl",), shapes=("messages",), **shares)
        export(ctx, step, *samples)
        return {
            split: {row["fd_table"] for row in lines(ctx.dist / "sft" / f"{split}.jsonl")}
            for split in ("train", "validation", "test")
            if split == "train" or shares.get(split)
        }

    both = groups(validation=0.1, test=0.2)
    assert sum(map(len, both.values())) == len(set[str]().union(*both.values())) == 500
    assert 25 < len(both["validation"]) < 75 < len(both["test"]) < 130
    assert groups(validation=0.1)["validation"] == both["validation"]
    assert groups(validation=0.3, test=0.2)["test"] == both["test"]
    assert groups(test=0.1)["test"] < both["test"]
    assert "test_samples" in ctx.reports[""]


def test_a_split_does_not_depend_on_the_other_samples(ctx: TestContext) -> None:
    def validation(*numbers: int) -> set[str]:
        export(ctx, ExportSFT(validation=0.5), *(sample(n) for n in numbers))
        return {row["fd_id"] for row in lines(ctx.dist / "sft" / "validation.jsonl")}

    assert validation(*range(40)) == validation(*range(0, 40, 2)) | validation(*range(1, 40, 2))


@pytest.mark.parametrize(
    ("step", "bad", "reason"),
    [
        (ExportSFT(template="{{ q }}"), sample(1), "missing_field"),
        (ExportSFT(validation=0.1, group_by="table"), sample(1), "missing_field"),
        (ExportSFT(validation=0.1, group_by="q"), sample(1, q=float("nan")), "not_canonical"),
        (ExportSFT(), sample(1, [accepted("fine"), accepted("\ud800", 1)]), "not_unicode"),
    ],
)
def test_a_sample_that_can_not_be_written_costs_itself_alone(
    ctx: TestContext, step: ExportSFT, bad: Sample, reason: str
) -> None:
    passed = export(ctx, step, sample(0, q="x", table="t"), bad, sample(2, q="x", table="t"))
    assert [each.index for each in passed] == [0, 2]
    assert ctx.reasons == [reason]
    splits = ("train", "validation") if step.validation else ("train",)
    rows = [row for split in splits for row in lines(ctx.dist / "sft" / f"{split}.jsonl")]
    assert {row["fd_sample_id"] for row in rows} == {"id-0", "id-2"}


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"template": "{{ q "}, "line 1 of the template"),
        ({"keep_fields": ["id"]}, "fd_id already"),
        ({"keep_fields": ["q", "q"]}, "twice"),
        ({"concat_format": "{rational} {answer}"}, "'rational' is unknown; {rationale} and {answer} are known"),
        ({"formats": []}, "at least 1"),
        ({"validation": 1.0}, "less than 1"),
        ({"validation": 0.5, "test": 0.5}, "nothing is left to train on"),
    ],
)
def test_a_wrong_config_is_found_before_anything_is_spent(config: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        ExportSFT(**config)


def explained(attempt: int = 0, kind: str = "rationale") -> Candidate:
    return replace(accepted("SELECT 1", attempt), cuts=(Cut("prose", "Hi"), Cut(kind, "because")))


def written(ctx: TestContext, step: ExportSFT, *candidates: Candidate) -> list[dict[str, Any]]:
    export(ctx, step, sample(0, candidates))
    return lines(ctx.dist / "sft_pc" / "train.jsonl")


def drawn(index: int, passed: int, failed: int, undecided: int = 0) -> Sample:
    outcomes = [Outcome.PASS] * passed + [Outcome.FAIL] * failed + [Outcome.ERROR] * undecided
    given = [candidate(f"answer {n}", n).judged(Verdict("g", "f", each, "r")) for n, each in enumerate(outcomes)]
    return replace(sample(index, given), selection=tuple(c.candidate_id for c in given[: min(passed, 2)]))


def test_a_bin_of_difficulty_has_no_more_samples_than_its_quota_the_first_ones(ctx: TestContext) -> None:
    step = ExportSFT(
        difficulty_quotas={0.5: 1, 0: 2, 0.25: 0, 0.75: None}, shapes=("messages", "prompt"), name="ExportSFT"
    )
    easy, half, hard = (4, 0), (2, 2), (1, 3)
    samples = [drawn(at, *each) for at, each in enumerate([easy, half, (3, 1), easy, half, easy, hard, hard, (0, 4)])]
    samples.append(drawn(9, 2, 0, undecided=2))  # an error says nothing of the record
    assert export(ctx, step, *samples) == samples, "all of them go on"
    written = [row["fd_sample_id"] for row in lines(ctx.dist / "sft" / "train.jsonl")]
    assert list(dict.fromkeys(written)) == ["id-0", "id-1", "id-3", "id-6", "id-7"]
    assert len(lines(ctx.dist / "prompts" / "train.jsonl")) == 10, "whoever samples by itself needs all prompts"
    assert ctx.reports["ExportSFT"] == {
        "rows": 8,
        "difficulty_to_0": 2,
        "difficulty_to_0.5": 1,
        "difficulty_to_0.75": 2,
        "left_out_difficulty_to_0": 2,
        "left_out_difficulty_to_0.25": 1,
        "left_out_difficulty_to_0.5": 1,
    }


def test_multitask_writes_answer_and_rationale_as_two_tasks_of_one_split(ctx: TestContext) -> None:
    label, rationale, bare = written(
        ctx, ExportSFT(target="multitask"), explained(), explained(1, "unusable_rationale")
    )
    assert [row["prompt"][0]["content"] for row in (label, rationale)] == [
        "[label] Return SQL only.",
        "[rationale] Return SQL only.",
    ]
    assert label["prompt"][1:] == rationale["prompt"][1:] == [ASKED[1]]
    assert [row["completion"][0]["content"] for row in (label, rationale, bare)] == ["SELECT 1", "because", "SELECT 1"]
    assert [row["fd_id"] for row in (label, rationale, bare)] == ["id-0#0#label", "id-0#0#rationale", "id-0#1#label"]
    assert [row["fd_part"] for row in (label, rationale, bare)] == ["label", "rationale", "label"]
    (without_system, _) = written(ctx, ExportSFT(target="multitask", system_prompt=""), explained())
    assert without_system["prompt"] == [{"role": "system", "content": "[label]"}, ASKED[1]]


def test_concat_puts_the_rationale_first(ctx: TestContext) -> None:
    (row,) = written(ctx, ExportSFT(target="concat"), explained(), accepted("SELECT 2", 1))
    assert row["completion"][0]["content"] == "### RATIONALE\nbecause\n\n### ANSWER\nSELECT 1"
    (row,) = written(ctx, ExportSFT(target="concat", concat_format="{rationale} #### {answer}"), explained())
    assert row["completion"][0]["content"] == "because #### SELECT 1"


def test_concat_leaves_out_and_counts_a_sample_without_any_rationale_and_it_fails_no_run(ctx: TestContext) -> None:
    step = ExportSFT(target="concat", difficulty_quotas={1: 1})
    assert written(ctx, step, accepted()) == [] and not ctx.reasons
    assert ctx.reports[step.name] == {"left_out_no_rationale": 1}  # it takes no place in a bin


def test_answer_only_knows_nothing_of_rationales(ctx: TestContext) -> None:
    (row,) = written(ctx, ExportSFT(), explained())
    assert row["completion"][0]["content"] == "SELECT 1"
    assert "fd_part" not in row


def test_a_rationale_of_a_rejected_answer_is_dropped(ctx: TestContext) -> None:
    rejected = explained(1).judged(Verdict("exec", "f", Outcome.FAIL, "mismatch"))
    rows = written(ctx, ExportSFT(target="multitask"), explained(), rejected)
    assert {row["fd_attempt"] for row in rows} == {0}


def test_prompts_are_of_all_that_was_asked(ctx: TestContext) -> None:
    failed = candidate("no", messages=ASKED).judged(Verdict("exec", "f", Outcome.FAIL, "mismatch"))
    export(ctx, ExportSFT(shapes=("prompt",), keep_fields=("q",)), sample(0), sample(1, [failed], q="x"), sample(2, []))
    rows = lines(ctx.dist / "prompts" / "train.jsonl")
    assert [row["fd_sample_id"] for row in rows] == ["id-0", "id-1"]
    assert rows[1] == {"prompt": list(ASKED), "fd_sample_id": "id-1", "fd_task_id": "task-1", "fd_q": "x"}
    assert pq.read_table(ctx.dist / "prompts" / "train.parquet").to_pylist() == rows


def test_steps_of_other_names_have_rows_of_their_own(ctx: TestContext) -> None:
    student = replace(accepted("b"), step="student", candidate_id="other")
    rows = written(ctx, ExportSFT(), replace(accepted("a"), step="TextGeneration"), student)
    assert [row["fd_id"] for row in rows] == ["id-0#0", "id-0#student.0"]


@pytest.mark.parametrize(
    ("format_", "files"),
    [
        ("trl", ["sft_pc/test.parquet", "sft_pc/train.parquet", "sft_pc/validation.parquet"]),
        ("axolotl", ["sft/test.parquet", "sft/train.parquet", "sft/validation.parquet"]),
        ("llamafactory", ["sft/test.parquet", "sft/train.parquet", "sft/validation.parquet"]),
        # a split named `validation` is silently not evaluated
        ("mlx", ["mlx/test.jsonl", "mlx/train.jsonl", "mlx/valid.jsonl"]),
        ("openai", ["openai/sft_test.jsonl", "openai/sft_train.jsonl", "openai/sft_valid.jsonl"]),
    ],
)
def test_a_trainer_gets_the_files_that_it_reads(ctx: TestContext, format_: str, files: list[str]) -> None:
    export(ctx, ExportSFT(formats=(format_,), validation=0.3, test=0.3), *(sample(n) for n in range(20)))
    assert sorted(path.relative_to(ctx.dist).as_posix() for path in ctx.dist.rglob("*.*")) == files
    rows: list[dict[str, Any]] = []
    for file in files:
        path = ctx.dist / file
        rows += pq.read_table(path).to_pylist() if path.suffix == ".parquet" else lines(path)
    assert len(rows) == 20
    shape = ["prompt", "completion"] if format_ == "trl" else ["messages"]
    for row in rows:
        assert [name for name in row if not name.startswith("fd_")] == shape
        assert all(isinstance(row[name], list) for name in shape)
        if format_ == "openai":
            assert list(row) == ["messages"]  # it refuses keys that it does not know


def test_trainers_and_file_formats_can_be_asked_for_together(ctx: TestContext) -> None:
    export(ctx, ExportSFT(formats=("parquet", "trl", "mlx"), shapes=("prompt_completion",)), sample())
    files = sorted(path.relative_to(ctx.dist).as_posix() for path in ctx.dist.rglob("*.*"))
    assert files == ["mlx/train.jsonl", "sft_pc/train.parquet"]
