"""Writes the chosen answers as rows for supervised fine-tuning. Knows no trainer and no gate.

Two shapes, never in one row (trainers silently prefer one of them): `messages` in `sft/`, `prompt` and `completion`
in `sft_pc/`. All else about a row is in `fd_` columns, a prefix that no trainer gives a meaning.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
from pydantic import Field, field_validator

from fastdistill.core.canonical import NotCanonical, digest
from fastdistill.core.errors import SampleError
from fastdistill.core.files import atomic
from fastdistill.core.step import Context, StreamStep
from fastdistill.core.types import Candidate, Sample, Status
from fastdistill.data.template import compile_template, render

ROWS_PER_GROUP = 1_000
BYTES_PER_GROUP = 16 * 2**20

Row = dict[str, Any]
Messages = list[dict[str, str]]
Write = Callable[[Row, bytes], None]
"""Takes a row, and its JSON text."""


class Format(StrEnum):
    PARQUET = "parquet"
    JSONL = "jsonl"


class Shape(StrEnum):
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"


FOLDERS = {Shape.MESSAGES: "sft", Shape.PROMPT_COMPLETION: "sft_pc"}
FD_COLUMNS = (
    "fd_id",
    "fd_sample_id",
    "fd_candidate_id",
    "fd_task_id",
    "fd_model",
    "fd_seed",
    "fd_attempt",
    "fd_score",
    "fd_gates",
)


class ExportSFT(StreamStep):
    """Writes each sample's chosen candidates to `sft/` and `sft_pc/` of the data set, and passes every sample on.

    A row's prompt is what the teacher was asked, unless `template` or `system_prompt` says what the student will be
    asked. The files appear when the last sample has passed, whole, or not at all.
    """

    formats: tuple[Format, ...] = Field((Format.PARQUET, Format.JSONL), min_length=1)
    shapes: tuple[Shape, ...] = Field((Shape.MESSAGES, Shape.PROMPT_COMPLETION), min_length=1)
    validation: float = Field(0.0, ge=0, lt=1, description="share of the groups that goes to validation.*")
    group_by: str | None = Field(None, description="field whose values are never split; by default each sample is one")
    system_prompt: str | None = Field(None, description="in place of the teacher's; empty: none")
    template: str | None = Field(None, description="Jinja; the student's user message, in place of all the teacher saw")
    keep_fields: tuple[str, ...] = Field((), description="fields of the record to keep, as text, in fd_<field>")

    @field_validator("formats", "shapes", "keep_fields")
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(values)) < len(values):
            raise ValueError("the list names something twice")
        return values

    @field_validator("template")
    @classmethod
    def _template_compiles(cls, template: str | None) -> str | None:
        if template is not None:
            compile_template(template)
        return template

    @field_validator("keep_fields")
    @classmethod
    def _columns_are_free(cls, fields: tuple[str, ...]) -> tuple[str, ...]:
        for field in fields:
            if f"fd_{field}" in FD_COLUMNS:
                raise ValueError(f"{field}: there is a column fd_{field} already")
        return fields

    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample]:
        with ExitStack() as stack:
            writers = {
                (split, shape): [stack.enter_context(file) for file in self._files(ctx.dist, split, shape)]
                for split in (["train", "validation"] if self.validation else ["train"])
                for shape in self.shapes
            }
            for sample in samples:
                try:
                    rows = self._rows(sample)
                    split = self._split(sample) if rows else "train"
                except SampleError as error:
                    ctx.discard(sample.failed(self.name, error))
                    continue
                for shape, row, line in rows:
                    for write in writers[split, shape]:
                        write(row, line)
                yield sample

    def _files(self, dist: Path, split: str, shape: Shape) -> list[AbstractContextManager[Write]]:
        path = dist / FOLDERS[shape] / split
        files: list[AbstractContextManager[Write]] = []
        if Format.PARQUET in self.formats:
            files.append(parquet_file(path.with_suffix(".parquet"), self._schema(shape)))
        if Format.JSONL in self.formats:
            files.append(jsonl_file(path.with_suffix(".jsonl")))
        return files

    def _rows(self, sample: Sample) -> list[tuple[Shape, Row, bytes]]:
        if sample.status is not Status.OPEN:
            return []
        rows = []
        for candidate in sample.chosen:
            prompt, answer = self._prompt(sample, candidate), {"role": "assistant", "content": candidate.answer}
            columns = self._columns(sample, candidate)
            for shape in self.shapes:
                if shape is Shape.MESSAGES:
                    row = {"messages": [*prompt, answer], **columns}
                else:
                    row = {"prompt": prompt, "completion": [answer], **columns}
                try:
                    rows.append((shape, row, msgspec.json.encode(row)))
                except UnicodeEncodeError as error:
                    raise SampleError("not_unicode", f"{sample.source}: a lone surrogate in a row: {error}") from error
        return rows

    def _prompt(self, sample: Sample, candidate: Candidate) -> Messages:
        if self.template is None:
            asked = [{"role": m["role"], "content": m["content"]} for m in candidate.prompt.messages]
        else:
            asked = [{"role": "user", "content": render(compile_template(self.template), sample)}]
        if self.system_prompt is None:
            return asked
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return system + [message for message in asked if message["role"] != "system"]

    def _columns(self, sample: Sample, candidate: Candidate) -> dict[str, Any]:
        values = (
            f"{sample.sample_id}#{candidate.attempt}",
            sample.sample_id,
            candidate.candidate_id,
            sample.task_id,
            candidate.prompt.model,
            candidate.seed,
            candidate.attempt,
            candidate.score,
            [{"gate": v.gate, "outcome": v.outcome.value, "reason": str(v.reason)} for v in candidate.verdicts],
        )
        kept = {f"fd_{field}": _text(sample.record.get(field)) for field in self.keep_fields}
        return dict(zip(FD_COLUMNS, values, strict=True)) | kept

    def _split(self, sample: Sample) -> str:
        if not self.validation:
            return "train"
        if self.group_by is not None and self.group_by not in sample.record:
            raise SampleError("missing_field", f"{sample.source}: no field {self.group_by}, which group_by names")
        group = sample.sample_id if self.group_by is None else sample.record[self.group_by]
        try:
            share = int(digest(["split", group])[:13], 16) / 16**13
        except NotCanonical as error:
            raise SampleError("not_canonical", f"{sample.source}: {self.group_by}: {error}") from error
        return "validation" if share < self.validation else "train"

    def _schema(self, shape: Shape) -> Any:
        import pyarrow as pa

        messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        gates = pa.list_(pa.struct([("gate", pa.string()), ("outcome", pa.string()), ("reason", pa.string())]))
        types = {"fd_seed": pa.int64(), "fd_attempt": pa.int64(), "fd_score": pa.float64(), "fd_gates": gates}
        names = (*FD_COLUMNS, *(f"fd_{field}" for field in self.keep_fields))
        shaped = ["messages"] if shape is Shape.MESSAGES else ["prompt", "completion"]
        return pa.schema(
            [(name, messages) for name in shaped] + [(name, types.get(name, pa.string())) for name in names]
        )


@contextmanager
def jsonl_file(path: Path) -> Iterator[Write]:
    """A JSON Lines file that is whole or absent."""
    with atomic(path, "wb") as file:

        def write(row: Row, line: bytes) -> None:
            file.write(line + b"\n")

        yield write


@contextmanager
def parquet_file(path: Path, schema: Any) -> Iterator[Write]:
    """A Parquet file with this `pyarrow.Schema` that is whole or absent; no rows are a valid file too.

    The same rows give the same bytes, with the same version of pyarrow. Row groups are bounded in rows and in bytes.
    """
    import pyarrow as pa
    from pyarrow.parquet import ParquetWriter

    rows: list[Row] = []
    size = 0
    with atomic(path, "wb") as file, ParquetWriter(file, schema, compression="zstd") as writer:

        def flush() -> None:
            nonlocal size
            writer.write_batch(pa.RecordBatch.from_pylist(rows, schema=schema))
            rows.clear()
            size = 0

        def write(row: Row, line: bytes) -> None:
            nonlocal size
            rows.append(row)
            size += len(line)
            if len(rows) >= ROWS_PER_GROUP or size >= BYTES_PER_GROUP:
                flush()

        yield write
        if rows:
            flush()


def _text(value: Any) -> str | None:
    """A field of a record as a column of text: a string as it is, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return msgspec.json.encode(value, order="deterministic").decode()
