"""What all exports share: prompts, splits, columns, and the one table of which files each trainer reads.

A row has messages, never rendered text: the trainer applies its own chat template. All else about a row is in `fd_`
columns, a prefix that no trainer gives a meaning. Knows no gate and runs no trainer.
"""

from abc import abstractmethod
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, asynccontextmanager, contextmanager
from enum import StrEnum
from functools import cached_property
from hashlib import sha256
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import msgspec
from pydantic import Field, PrivateAttr, field_validator, model_validator

from fastdistill.core.canonical import NotCanonical, digest
from fastdistill.core.errors import SampleError
from fastdistill.core.files import atomic
from fastdistill.core.step import Context, Output, StreamStep
from fastdistill.core.turns import beside
from fastdistill.core.types import Candidate, Sample, Status
from fastdistill.data.template import TemplateText, compile_template, render

BYTES_PER_BLOCK = 2**19
BYTES_PER_GROUP = 5 * 2**20
INTERLEAVED_ROWS = 4_096

_encode = msgspec.json.Encoder().encode

Row = dict[str, Any]
Messages = list[dict[str, str]]
Write = Callable[[bytes], object]
"""Takes JSON Lines: one, or whole ones with their line breaks."""


class Format(StrEnum):
    """A file format, with all of an export's folders in it, or a trainer, with what it reads."""

    PARQUET = "parquet"
    JSONL = "jsonl"
    TRL = "trl"
    AXOLOTL = "axolotl"
    LLAMAFACTORY = "llamafactory"
    MLX = "mlx"
    OPENAI = "openai"


class Shape(StrEnum):
    """What a row is made of. No row has two shapes' columns: trainers silently prefer one of them."""

    __hash__ = str.__hash__
    MESSAGES = "messages"
    PROMPT_COMPLETION = "prompt_completion"
    PROMPT = "prompt"
    PREFERENCE = "preference"
    KTO = "kto"
    OPENAI_SFT = "openai_sft"
    OPENAI_DPO = "openai_dpo"
    LLAMAFACTORY_DPO = "llamafactory_dpo"
    LLAMAFACTORY_KTO = "llamafactory_kto"


class Example(msgspec.Struct, frozen=True, gc=False):
    """One example before it takes its shapes."""

    shapes: frozenset[Shape]
    prompt: Messages
    answer: Messages
    columns: Mapping[str, Any]
    rejected: Sequence[dict[str, str]] = ()
    label: bool | None = None


SHAPES: dict[Shape, Callable[[Example], Row]] = {
    Shape.MESSAGES: lambda e: {"messages": [*e.prompt, *e.answer], **e.columns},
    Shape.PROMPT_COMPLETION: lambda e: {"prompt": e.prompt, "completion": e.answer, **e.columns},
    Shape.PROMPT: lambda e: {"prompt": e.prompt, **e.columns},
    Shape.PREFERENCE: lambda e: {"prompt": e.prompt, "chosen": e.answer, "rejected": e.rejected, **e.columns},
    Shape.KTO: lambda e: {"prompt": e.prompt, "completion": e.answer, "label": e.label, **e.columns},
    # OpenAI refuses keys that it does not know.
    Shape.OPENAI_SFT: lambda e: {"messages": [*e.prompt, *e.answer]},
    Shape.OPENAI_DPO: lambda e: {
        "input": {"messages": e.prompt, "tools": [], "parallel_tool_calls": True},
        "preferred_output": e.answer,
        "non_preferred_output": e.rejected,
    },
    # A list as `chosen` would be read as a broken row for fine-tuning.
    Shape.LLAMAFACTORY_DPO: lambda e: {
        "messages": e.prompt, "chosen": e.answer[0], "rejected": e.rejected[0], **e.columns
    },
    Shape.LLAMAFACTORY_KTO: lambda e: {"messages": [*e.prompt, *e.answer], "label": e.label, **e.columns},
}  # fmt: skip

FOLDERS = {
    Shape.MESSAGES: "sft",
    Shape.PROMPT_COMPLETION: "sft_pc",
    Shape.PROMPT: "prompts",
    Shape.PREFERENCE: "preference",
    Shape.KTO: "kto",
}
FILES: dict[Format, dict[Shape, str]] = {
    Format.PARQUET: {shape: f"{folder}/{{split}}.parquet" for shape, folder in FOLDERS.items()},
    Format.JSONL: {shape: f"{folder}/{{split}}.jsonl" for shape, folder in FOLDERS.items()},
    Format.TRL: {
        Shape.PROMPT_COMPLETION: "sft_pc/{split}.parquet",
        Shape.PREFERENCE: "preference/{split}.parquet",
        Shape.KTO: "kto/{split}.parquet",
    },
    Format.AXOLOTL: {Shape.MESSAGES: "sft/{split}.parquet", Shape.PREFERENCE: "preference/{split}.parquet"},
    Format.LLAMAFACTORY: {
        Shape.MESSAGES: "sft/{split}.parquet",
        Shape.LLAMAFACTORY_DPO: "lf/preference_{split}.jsonl",
        Shape.LLAMAFACTORY_KTO: "lf/kto_{split}.jsonl",
    },
    Format.MLX: {Shape.MESSAGES: "mlx/{short}.jsonl"},
    Format.OPENAI: {Shape.OPENAI_SFT: "openai/sft_{short}.jsonl", Shape.OPENAI_DPO: "openai/dpo_{short}.jsonl"},
}
"""The file of a format for a shape, or that a trainer reads; `{short}` is `valid` where `{split}` is `validation`."""

FD_COLUMNS = (
    "fd_id", "fd_sample_id", "fd_candidate_id", "fd_task_id", "fd_model", "fd_seed", "fd_attempt", "fd_score",
    "fd_gates",
)  # fmt: skip


class Splits(StreamStep):
    """Writes rows to files of each split, and passes every sample on. A subclass says which rows and files.

    The files appear when the run ends well, whole, or not at all. The hash of a sample's group says which split it is
    in. `validation` is the lower end of the hashes and `test` the upper one: neither share moves a group of the other.
    """

    validation: float = Field(0.0, ge=0, lt=1, description="share of the groups that goes to validation.*")
    test: float = Field(0.0, ge=0, lt=1, description="share of the groups that goes to test.*; no config trains on it")
    group_by: str | None = Field(None, description="field whose values are never split; by default each sample is one")

    @field_validator("formats", "shapes", "keep_fields", check_fields=False)
    @classmethod
    def _each_once(cls, values: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(values)) < len(values):
            raise ValueError("the list names something twice")
        return values

    @model_validator(mode="after")
    def _something_is_left(self) -> Self:
        if self.validation + self.test >= 1:
            raise ValueError("validation and test: together less than 1, or nothing is left to train on")
        return self

    _open: ExitStack | None = PrivateAttr(None)
    """The files being written, of a step that is open."""

    @asynccontextmanager
    async def opened(self, ctx: Context) -> AsyncIterator[None]:
        with ExitStack() as stack:
            self._open = stack
            stack.callback(setattr, self, "_open", None)
            yield
            await beside(stack.pop_all().close)  # to write what is left takes a tenth of a second, to sync as much

    @abstractmethod
    def writers(self, split: str, dist: Path, stack: ExitStack) -> dict[str, Write]:
        """What takes the lines of each kind; `stack` closes it."""

    @abstractmethod
    def rows(self, sample: Sample, seen: "Counter[str]") -> list[tuple[str, bytes]]:
        """The rows of a sample, each a line of JSON without its break.

        `seen` counts what is worth a report; it has the samples before, and what is added for one that fails is lost.

        Raises:
            SampleError: the sample can't be written.
        """

    def finish(self, seen: "Counter[str]", ctx: Output) -> None:
        """Says in the quality report what was written."""
        ctx.report(self.name, dict(sorted(seen.items())))

    def run(self, samples: Iterator[Sample], ctx: Output) -> Iterator[Sample]:
        splits = ["train"] + ["validation"] * bool(self.validation) + ["test"] * bool(self.test)
        seen = Counter({f"{split}_samples": 0 for split in splits} if len(splits) > 1 else {})
        with ExitStack() as own_stack:
            stack = self._open or own_stack
            writers = {split: self.writers(split, ctx.dist, stack) for split in splits}
            own = writers["train"]
            for sample in samples:
                before = dict(seen)
                try:
                    rows = self.rows(sample, seen) if sample.status is Status.OPEN else []
                    if rows and len(writers) > 1:
                        split = self.split(sample)
                        seen[f"{split}_samples"] += 1
                        own = writers[split]
                except (SampleError, UnicodeEncodeError) as error:
                    seen = Counter(before)
                    lone = SampleError("not_unicode", f"{sample.source}: a lone surrogate in a row: {error}")
                    ctx.discard(sample.failed(self.name, error if isinstance(error, SampleError) else lone))
                    continue
                for kind, line in rows:
                    own[kind](line)
                yield sample
        self.finish(seen, ctx)

    def split(self, sample: Sample) -> str:
        """Raises SampleError where `group_by` names no field of the record, or one that has no hash."""
        if self.group_by is not None and self.group_by not in sample.record:
            raise SampleError("missing_field", f"{sample.source}: no field {self.group_by}, which group_by names")
        group = sample.sample_id if self.group_by is None else sample.record[self.group_by]
        try:
            share = int(digest(["split", group])[:13], 16) / 16**13
        except NotCanonical as error:
            raise SampleError("not_canonical", f"{sample.source}: {self.group_by}: {error}") from error
        return "validation" if share < self.validation else "test" if share >= 1 - self.test else "train"


class Export(Splits):
    """Writes examples as trainers read them. A subclass says which ones a sample gives.

    A row's prompt is what the model was asked, unless `template` or `system_prompt` says what the student is asked.
    """

    writes: ClassVar[frozenset[Shape]]
    """The shapes that this export can give."""

    formats: tuple[Format, ...] = Field((Format.PARQUET, Format.JSONL), min_length=1)
    shapes: tuple[Shape, ...] = Field(min_length=1, description="what parquet and jsonl are written of")
    system_prompt: str | None = Field(None, description="in place of the teacher's; empty: none")
    template: TemplateText | None = Field(
        None, description="Jinja; the student's user message, in place of all the teacher saw"
    )
    keep_fields: tuple[str, ...] = Field((), description="fields of the record to keep, as text, in fd_<field>")

    @field_validator("formats", "shapes")
    @classmethod
    def _writes_it(cls, values: tuple[Format | Shape, ...]) -> tuple[Format | Shape, ...]:
        offered = cls.offered() | (cls.writes & FOLDERS.keys())
        if strange := [str(value) for value in values if value not in offered]:
            raise ValueError(f"{cls.__name__} writes no {', '.join(strange)}")
        return values

    @model_validator(mode="after")
    def _columns_are_free(self) -> "Export":
        for field in self.keep_fields:
            if taken := [shape for shape in self.writes if f"fd_{field}" in self.columns(shape)]:
                raise ValueError(f"keep_fields: {field}: there is a column fd_{field} already ({taken[0]})")
        return self

    @classmethod
    def offered(cls) -> "set[Format]":
        """The formats that this export has something for."""
        return {format_ for format_, files in FILES.items() if cls.writes & files.keys()}

    @abstractmethod
    def examples(self, sample: Sample, seen: "Counter[str]") -> Iterator[Example]:
        """The examples of a sample; more is said at `rows`."""

    def columns(self, shape: Shape) -> tuple[str, ...]:
        """Names of a shape's `fd_` columns, without those of `keep_fields`."""
        return FD_COLUMNS

    def files(self, split: str) -> dict[str, Shape]:
        short = "valid" if split == "validation" else split
        return {
            path.format(split=split, short=short): shape
            for format_ in self.formats
            for shape, path in FILES[format_].items()
            if shape in self.writes and (shape in self.shapes or format_ not in (Format.PARQUET, Format.JSONL))
        }

    def rows(self, sample: Sample, seen: "Counter[str]") -> list[tuple[str, bytes]]:
        return [
            (shape, _encode(SHAPES[shape](example)))
            for example in self.examples(sample, seen)
            for shape in self._wanted
            if shape in example.shapes
        ]

    @cached_property
    def _wanted(self) -> list[Shape]:
        return [*dict.fromkeys(self.files("train").values())]

    def writers(self, split: str, dist: Path, stack: ExitStack) -> dict[str, Write]:
        writers: dict[str, Write] = {}
        for shape in self._wanted:
            same = [
                parquet_file(dist / path, self._schema(shape)) if path.endswith(".parquet") else jsonl_file(dist / path)
                for path, own in self.files(split).items()
                if own is shape
            ]
            write = stack.enter_context(in_blocks(*map(stack.enter_context, same)))
            labelled = shape in (Shape.KTO, Shape.LLAMAFACTORY_KTO)
            writers[shape] = stack.enter_context(interleaved(write)) if labelled else write
        return writers

    def prompt(self, sample: Sample, candidate: Candidate) -> Messages:
        """What the student is asked: the candidate's own prompt, where nothing else is said."""
        if self.template is None:
            asked = [{"role": m["role"], "content": m["content"]} for m in candidate.prompt.messages]
        else:
            asked = [{"role": "user", "content": render(compile_template(self.template), sample)}]
        if self.system_prompt is None:
            return asked
        system = [{"role": "system", "content": self.system_prompt}] if self.system_prompt else []
        return system + [message for message in asked if message["role"] != "system"]

    def kept(self, sample: Sample) -> Row:
        return {f"fd_{field}": _text(sample.record.get(field)) for field in self.keep_fields}

    def _schema(self, shape: Shape) -> Any:
        import pyarrow as pa

        texts = [(name, pa.string()) for name in ("gate", "outcome", "reason")]
        messages = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
        types = dict.fromkeys(("messages", "prompt", "completion", "chosen", "rejected"), messages)
        types |= dict.fromkeys(("fd_score", "fd_score_chosen", "fd_score_rejected", "fd_margin"), pa.float64())
        types |= dict.fromkeys(("fd_seed", "fd_attempt", "fd_len_chosen", "fd_len_rejected"), pa.int64())
        types |= {"fd_gates": pa.list_(pa.struct([*texts, ("score", pa.float64())])), "label": pa.bool_()}
        names = [*SHAPES[shape](Example(frozenset(), [], [], {})), *self.columns(shape)]
        kept = [(f"fd_{field}", pa.string()) for field in self.keep_fields]
        return pa.schema([*((name, types.get(name, pa.string())) for name in names), *kept])


def candidate_columns(sample: Sample, candidate: Candidate) -> Row:
    values = (
        row_id(sample, candidate), sample.sample_id, candidate.candidate_id, sample.task_id, candidate.prompt.model,
        candidate.seed, candidate.attempt, candidate.score,
        [{"gate": v.gate, "outcome": v.outcome, "reason": v.reason, "score": v.score} for v in candidate.verdicts],
    )  # fmt: skip
    return dict(zip(FD_COLUMNS, values, strict=True))


def row_id(sample: Sample, candidate: Candidate) -> str:
    """A row's `fd_id`: the sample id and the attempt, with the step where it has a name of its own."""
    by = "" if candidate.step in ("", "TextGeneration") else f"{candidate.step}."
    return f"{sample.sample_id}#{by}{candidate.attempt}"


@contextmanager
def in_blocks(*writes: Write) -> Iterator[Write]:
    """Takes one line at a time, without its break, and hands many on at once."""
    lines: list[bytes] = []
    size = 0

    def flush() -> None:
        nonlocal size
        text = b"\n".join([*lines, b""])
        lines.clear()
        size = 0
        for write in writes:
            write(text)

    def write_later(line: bytes) -> None:
        nonlocal size
        lines.append(line)
        size += len(line)
        if size >= BYTES_PER_BLOCK:
            flush()

    yield write_later
    if lines:
        flush()


@contextmanager
def interleaved(write: Write) -> Iterator[Write]:
    """Rows come out shuffled within blocks, both labels evenly mixed: TRL's KTO trainer reads rows in their order.

    The shuffle goes by each row's hash, so the same rows come out in the same order.
    """
    block: list[bytes] = []

    def flush() -> None:
        placed = []
        for label in (b'"label":true', b'"label":false'):  # in a text, quotes are escaped
            lines = sorted((line for line in block if label in line), key=lambda line: sha256(line).digest())
            placed += [((place + 0.5) / len(lines), line) for place, line in enumerate(lines)]
        for _, line in sorted(placed, key=itemgetter(0)):
            write(line)
        block.clear()

    def write_in_turn(line: bytes) -> None:
        block.append(line)
        if len(block) >= INTERLEAVED_ROWS:
            flush()

    yield write_in_turn
    flush()


@contextmanager
def jsonl_file(path: Path) -> Iterator[Write]:
    """A JSON Lines file that is whole or absent."""
    with atomic(path, "wb") as file:
        yield file.write


@contextmanager
def parquet_file(path: Path, schema: Any, **options: Any) -> Iterator[Write]:
    """A Parquet file with this `pyarrow.Schema` that is whole or absent; no rows are a valid file too.

    The same lines give the same bytes, with the same version of pyarrow. `options` are those of pyarrow's writer.
    """
    import pyarrow as pa
    from pyarrow.json import ParseOptions, ReadOptions, read_json
    from pyarrow.parquet import ParquetWriter

    halves, wider = pa.list_(pa.float16()), pa.list_(pa.float64())  # for Arrow reads no JSON to half precision
    read_as = pa.schema([field.with_type(wider) if field.type == halves else field for field in schema])
    if read_as != schema:
        import pyarrow.compute  # `cast` would, once answers are on their way

    parsing = ParseOptions(explicit_schema=read_as, unexpected_field_behavior="error")
    group: list[Any] = []
    size = 0
    # Rows are in no order by which statistics could tell where one is.
    options = {"compression": "zstd", "write_statistics": False} | options
    with atomic(path, "wb") as file, ParquetWriter(file, schema, **options) as writer:

        def compress(rows: Any) -> None:
            writer.write_table(rows)
            # By itself mimalloc keeps what is free for the next group: how much, depends on the time.
            pa.default_memory_pool().release_unused()

        def read(text: bytes) -> None:
            nonlocal size
            # Read as JSON, for at the first Python object that it converts pyarrow imports pandas, if it is there.
            reading = ReadOptions(use_threads=False, block_size=len(text))
            table = read_json(pa.BufferReader(text), reading, parsing)
            group.append(table if read_as == schema else table.cast(schema))
            size += len(text)
            # The writer keeps some kilobytes for each group until the file's end.
            if size >= BYTES_PER_GROUP:
                write_group(pa.concat_tables(group))
                group.clear()
                size = 0

        with _one_ahead(_compressing, compress) as write_group:
            with _one_ahead(_reading, read) as write:
                yield write
            if group:
                write_group(pa.concat_tables(group))


T = TypeVar("T")


@contextmanager
def _one_ahead(pool: ThreadPoolExecutor, take: Callable[[T], None]) -> Iterator[Callable[[T], None]]:
    """Has each piece taken in a thread, while the next is being made."""
    taken: Future[None] | None = None

    def hand_over(piece: T) -> None:
        nonlocal taken
        if taken is not None:
            taken.result()
        taken = pool.submit(take, piece)

    try:
        yield hand_over
    finally:
        if taken is not None:
            taken.result()


# To read half a megabyte takes some milliseconds, to compress ten times as much far longer: the loop waits for neither.
_reading = ThreadPoolExecutor(1, "parquet-reading")
_compressing = ThreadPoolExecutor(1, "parquet-compressing")


def _text(value: Any) -> str | None:
    """A field of a record as a column of text: a string as it is, anything else as JSON."""
    if value is None or isinstance(value, str):
        return value
    return msgspec.json.encode(value, order="deterministic").decode()
