import gzip
import json
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import numpy
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from fastdistill.core.errors import InputError
from fastdistill.core.types import Sample, Status
from fastdistill.data.load import LoadJsonl
from tests.context import TestContext


def write(path: Path, *lines: str | bytes) -> Path:
    path.write_bytes(b"\n".join(line if isinstance(line, bytes) else line.encode() for line in lines) + b"\n")
    return path


def load(ctx: TestContext, *steps: LoadJsonl) -> list[Sample]:
    samples: Iterator[Sample | None] = iter(())
    for step in steps:
        samples = step.run(filter(None, samples), ctx)
    return [*filter(None, samples)]


@pytest.fixture
def ctx(tmp_path: Path) -> Iterator[TestContext]:
    with closing(TestContext(tmp_path)) as context:
        yield context


def test_records_come_in_order_and_are_named_by_line(ctx: TestContext, tmp_path: Path) -> None:
    path = write(tmp_path / "train.jsonl", '{"q": 1}', "", "  ", '{"q": 2}')
    assert load(ctx, LoadJsonl(path=path)) == [
        Sample(0, "train.jsonl:1", {"q": 1}),
        Sample(1, "train.jsonl:4", {"q": 2}),
    ]


def test_a_bad_line_costs_itself_alone(ctx: TestContext, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", '{"q": "ok"}', b'{"q": "caf\xe9"}', "{", "[1]", '{"q": NaN}', '{"q": "end"}')
    samples = load(ctx, LoadJsonl(name="load", path=path))

    assert [(sample.index, sample.record["q"]) for sample in samples] == [(0, "ok"), (5, "end")]
    assert [sample.index for sample in ctx.discarded] == [1, 2, 3, 4]
    assert {sample.status for sample in ctx.discarded} == {Status.FAILED}
    failures = [sample.failures[0] for sample in ctx.discarded]
    assert {(failure.step, failure.reason) for failure in failures} == {("load", "bad_record")}
    assert failures[0].message.startswith("t.jsonl:2: not valid UTF-8 (byte 0xe9 at 10); re-encode")
    assert failures[1].message.startswith("t.jsonl:3: not a JSON object (Input data was truncated)")
    assert failures[2].message.startswith("t.jsonl:4: not a JSON object (Expected `object`, got `array`)")


@pytest.mark.parametrize("text", ["\\ud800", "\\udc00 and more", "\\ud83d\\u0041"])
def test_half_a_surrogate_pair_is_named_with_its_line_and_a_remedy(ctx: TestContext, tmp_path: Path, text: str) -> None:
    load(ctx, LoadJsonl(path=write(tmp_path / "t.jsonl", f'{{"a": "{text}"}}')))
    (failure,) = ctx.discarded[0].failures
    assert failure.message.startswith("t.jsonl:1: a lone surrogate is no character; write both of its pair")


@pytest.mark.parametrize("value", ["NaN", "[-Infinity]"])
def test_what_python_writes_though_it_is_no_json_is_named(ctx: TestContext, tmp_path: Path, value: str) -> None:
    load(ctx, LoadJsonl(path=write(tmp_path / "t.jsonl", f'{{"a": {value}}}')))
    (failure,) = ctx.discarded[0].failures
    assert failure.message == "t.jsonl:1: NaN and Infinity are no JSON; write null in their place"


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": "\\ud800"}', "null", '"text"', "1", "true", '{"a":1}{"a":2}'])
def test_no_line_breaks_the_reader(ctx: TestContext, tmp_path: Path, line: str) -> None:
    load(ctx, LoadJsonl(path=write(tmp_path / "t.jsonl", line, "{}")))
    assert ctx.reasons == ["bad_record"]


def test_a_byte_order_mark_and_windows_line_ends_are_no_content(ctx: TestContext, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", b'\xef\xbb\xbf{"q": 1}\r', b'{"q": 2}\r', b'\xef\xbb\xbf{"q": 3}\r')
    assert [sample.record for sample in load(ctx, LoadJsonl(path=path))] == [{"q": 1}, {"q": 2}, {"q": 3}]


def test_a_line_of_ten_megabytes_is_a_record(ctx: TestContext, tmp_path: Path) -> None:
    text = "é" * 5_000_000
    path = write(tmp_path / "t.jsonl", json.dumps({"q": text}, ensure_ascii=False))
    assert load(ctx, LoadJsonl(path=path))[0].record["q"] == text


def test_integers_of_any_size_stay_exact(ctx: TestContext, tmp_path: Path) -> None:
    path = write(tmp_path / "t.jsonl", '{"q": 123456789012345678901234567890}')
    assert load(ctx, LoadJsonl(path=path))[0].record["q"] == 123456789012345678901234567890


def test_loads_chain_and_indices_go_on(ctx: TestContext, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", '{"q": 1}', '{"q": 2}')
    samples = load(ctx, LoadJsonl(path=path), LoadJsonl(rows=({"q": 3},)))
    assert [(s.index, s.source, s.record["q"]) for s in samples] == [
        (0, "a.jsonl:1", 1),
        (1, "a.jsonl:2", 2),
        (2, "rows:1", 3),
    ]


def test_start_and_limit_count_over_all_files(ctx: TestContext, tmp_path: Path) -> None:
    first = write(tmp_path / "a.jsonl", '{"q": 1}', '{"q": 2}')
    second = write(tmp_path / "b.jsonl", '{"q": 3}', '{"q": 4}')
    samples = load(ctx, LoadJsonl(path=(first, second), start=1, limit=2))
    assert [(sample.index, sample.source) for sample in samples] == [(0, "a.jsonl:2"), (1, "b.jsonl:1")]


def test_files_of_one_name_are_told_apart(ctx: TestContext, tmp_path: Path) -> None:
    paths = []
    for folder in ("x", "y"):
        (tmp_path / folder).mkdir()
        paths.append(write(tmp_path / folder / "t.jsonl", "{}"))
    sources = [sample.source for sample in load(ctx, LoadJsonl(path=tuple(paths)))]
    assert sources == [f"{paths[0]}:1", f"{paths[1]}:1"]


def test_home_and_the_working_directory_are_known(
    ctx: TestContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "t.jsonl", "{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert len(load(ctx, LoadJsonl(path="~/t.jsonl"), LoadJsonl(path="t.jsonl"))) == 2


def test_parquet_gives_the_same_records(ctx: TestContext, tmp_path: Path) -> None:
    records = [{"q": f"q{n}", "tags": ["a", None], "n": n} for n in range(600)]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "t.parquet")
    samples = load(ctx, LoadJsonl(path=tmp_path / "t.parquet"))
    assert [sample.record for sample in samples] == records
    assert samples[-1].source == "t.parquet:600"


def test_a_value_in_parquet_that_python_has_not_costs_its_record_alone(ctx: TestContext, tmp_path: Path) -> None:
    text = pa.Array.from_buffers(
        pa.string(), 3, [None, pa.py_buffer(b"\0\0\0\0\1\0\0\0\2\0\0\0\3\0\0\0"), pa.py_buffer(b"a\xffc")]
    )
    times = pa.array([0, 0, -(10**17)], pa.timestamp("us"))
    pq.write_table(pa.table({"q": text, "at": times}), tmp_path / "t.parquet")
    samples = load(ctx, LoadJsonl(path=tmp_path / "t.parquet"))
    assert [(sample.index, sample.record["q"]) for sample in samples] == [(0, "a")]
    assert ctx.reasons == ["bad_record", "bad_record"]
    assert [sample.failures[0].message.partition(": ")[0] for sample in ctx.discarded] == ["t.parquet:2", "t.parquet:3"]
    assert "write its column as text" in ctx.discarded[0].failures[0].message


def test_gzip_is_read(ctx: TestContext, tmp_path: Path) -> None:
    with gzip.open(tmp_path / "t.jsonl.gz", "wb") as file:
        file.write(b'{"q": 1}\n')
    assert load(ctx, LoadJsonl(path=tmp_path / "t.jsonl.gz"))[0].record == {"q": 1}


@pytest.mark.parametrize("name", ["t.jsonl.gz", "t.parquet"])
def test_a_broken_file_ends_the_run_by_its_name(ctx: TestContext, tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"not what the name says")
    with pytest.raises(InputError, match=f"{tmp_path}/{name}: can't be read"):
        load(ctx, LoadJsonl(path=tmp_path / name))


def test_a_compressed_file_under_the_name_of_another_is_told_as_such(ctx: TestContext, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_bytes(gzip.compress(b'{"q": 1}\n'))
    load(ctx, LoadJsonl(path=tmp_path / "t.jsonl"))
    assert ctx.discarded[0].failures[0].message == "t.jsonl:1: compressed; let the file's name end in .jsonl.gz"


def test_a_name_that_no_file_can_have_is_one_clear_error(ctx: TestContext, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="File name too long"):
        load(ctx, LoadJsonl(path=tmp_path / f"{'x' * 300}.jsonl"))


def test_a_missing_file_is_found_before_the_first_record(ctx: TestContext, tmp_path: Path) -> None:
    there = write(tmp_path / "a.jsonl", "{}")
    samples = LoadJsonl(path=(there, tmp_path / "b.jsonl")).run(iter(()), ctx)
    with pytest.raises(InputError, match=f"{tmp_path}/b.jsonl: there is no such file"):
        next(samples)


def test_a_folder_is_not_a_data_set(ctx: TestContext, tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").mkdir()
    with pytest.raises(InputError, match="Is a directory; name"):
        load(ctx, LoadJsonl(path=tmp_path / "t.jsonl"))


@pytest.mark.parametrize("step", [{"rows": ()}, {"rows": ({"q": 1},), "start": 1}])
def test_no_record_at_all_is_an_error(ctx: TestContext, step: dict[str, object]) -> None:
    with pytest.raises(InputError, match="rows: no records"):
        load(ctx, LoadJsonl.model_validate(step))


@pytest.mark.parametrize(
    ("step", "problem"),
    [
        ({}, "either path or rows"),
        ({"path": "a.jsonl", "rows": []}, "either path or rows"),
        ({"path": []}, "empty"),
        ({"rows": [{"q": "x", "n": numpy.float32(1)}]}, "numpy.float32'>; give plain values"),
        ({"path": "a.json"}, "jq -c"),
        ({"path": "b/a.csv"}, r"read_csv\('b/a.csv'\), 'b/a.parquet'"),
        ({"path": "a.jsonl", "limit": 0}, "greater than 0"),
    ],
)
def test_a_wrong_config_says_what_to_do(step: dict[str, object], problem: str) -> None:
    with pytest.raises(ValidationError, match=problem):
        LoadJsonl.model_validate(step)


def test_records_are_counted_for_the_time_left(tmp_path: Path) -> None:
    lines = tmp_path / "a.jsonl"
    lines.write_text('{"a": 1}\n{"a": 2}\n{"a": 3}')
    assert LoadJsonl(path=lines).count() == 3
    assert LoadJsonl(path=(lines, lines), start=1, limit=4).count() == 4
    assert LoadJsonl(rows=({"a": 1}, {"a": 2})).count() == 2
    empty = tmp_path / "b.jsonl"
    empty.write_text("")
    assert LoadJsonl(path=empty).count() == 0
