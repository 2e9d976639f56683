"""Reads records from JSON Lines and Parquet, one at a time. Knows nothing of what a record means."""

import gzip
import json
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from io import BufferedReader
from itertools import chain, islice
from pathlib import Path
from typing import Any, Self, TypeAlias

import msgspec
from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticSerializationError, to_json

from fastdistill.core.canonical import has_lone_surrogate
from fastdistill.core.errors import InputError, SampleError
from fastdistill.core.step import Context, StreamStep
from fastdistill.core.types import Sample

_ENDINGS = (".jsonl", ".ndjson", ".jsonl.gz", ".parquet")
_CONVERT = {
    ".json": "jq -c '.[]' {0} > {1}.jsonl",
    ".csv": "python -c \"from pyarrow import csv, parquet as p; p.write_table(csv.read_csv('{0}'), '{1}.parquet')\"",
}
_PARQUET_ROWS = 256  # rows decoded at a time
_BOM, _GZIP = b"\xef\xbb\xbf", b"\x1f\x8b"


class LoadJsonl(StreamStep):
    """Records of one or more files, or of `rows` given in the config, after the samples of the steps before.

    A file is JSON Lines (`.jsonl`, `.ndjson`, `.jsonl.gz`: one JSON object a line, UTF-8) or `.parquet`. A line that
    can't be read costs itself alone: it leaves the stream with the reason `bad_record`. `start` and `limit` count
    records, readable or not, over all files together.
    """

    path: Path | tuple[Path, ...] | None = Field(None, description="a file, or a list of files; `~` is your home")
    rows: tuple[dict[str, Any], ...] | None = Field(None, description="records in place of a file")
    start: int = Field(0, ge=0, description="how many records to leave out at the beginning")
    limit: int | None = Field(None, gt=0, description="how many records to read at most")

    @field_validator("path")
    @classmethod
    def _known_endings(cls, path: Path | tuple[Path, ...] | None) -> Path | tuple[Path, ...] | None:
        for each in _paths(path):
            if not each.name.endswith(_ENDINGS):
                command = _CONVERT.get(each.suffix, "").format(each, each.with_suffix("") if each.suffix else "")
                how = f"; make it one with `{command}`" if command else ""
                raise ValueError(f"{each}: a data set ends in {', '.join(_ENDINGS)}{how}")
        return path

    @model_validator(mode="after")
    def _one_origin(self) -> Self:
        if (self.path is None) == (self.rows is None):
            raise ValueError("give either path or rows")
        if self.path == ():
            raise ValueError("path: the list is empty")
        try:
            to_json(self.rows)
        except PydanticSerializationError as error:
            raise ValueError(f"rows: {error}; give plain values of Python, like int(n) of numpy's") from error
        return self

    def inputs(self) -> Sequence[Path]:
        return [path.expanduser() for path in _paths(self.path)]

    def count(self) -> int:
        """Records at most: a blank line counts as one."""
        total = len(self.rows or ()) + sum(_count(path) for path in self.inputs())
        return min(max(0, total - self.start), total if self.limit is None else self.limit)

    def run(self, samples: Iterator[Sample], ctx: Context) -> Iterator[Sample | None]:
        """Raises:
        InputError: a file is missing, is not a file or can't be read, or there is no record at all.
        """
        files = [_found(path) for path in _paths(self.path)]
        yield from samples
        empty = True
        stop = None if self.limit is None else self.start + self.limit
        for source, content in islice(self._entries(files), self.start, stop):
            empty = False
            index = ctx.next_index()
            if isinstance(content, SampleError):
                ctx.discard(Sample(index, source, {}).failed(self.name, content))
                yield None
            else:
                yield Sample(index, source, content)
        if empty:
            origin = ", ".join(map(str, files)) or "rows"
            after = f" after the first {self.start}" if self.start else ""
            raise InputError(f"{origin}: no records{after}; a data set has one JSON object a line")

    def _entries(self, files: Sequence[Path]) -> "Iterator[_Entry]":
        for number, row in enumerate(self.rows or (), 1):
            yield f"rows:{number}", row
        names = [file.name for file in files]
        for given, file in zip(_paths(self.path), files, strict=True):
            yield from _entries_of(file, file.name if names.count(file.name) == 1 else str(given))


_Entry: TypeAlias = tuple[str, Mapping[str, Any] | SampleError]
"""Where a record stands, and the record, or why it is none."""


def records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Each record of one file and where it stands, as `LoadJsonl` reads them.

    Raises:
        InputError: the file can't be read, or one of its lines.
    """
    file = _found(path)
    for source, content in _entries_of(file, file.name):
        if isinstance(content, SampleError):
            raise InputError(f"{file.parent}/{content}")
        yield source, content


def _found(given: Path) -> Path:
    """The absolute path of a file, which is checked before anything is spent."""
    path = given.expanduser().absolute()
    try:
        path.open("rb").close()
    except FileNotFoundError as error:
        raise InputError(f"{path}: there is no such file; a relative path starts at {Path.cwd()}") from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; name a data set's files themselves, readable ones") from error
    return path


def _entries_of(path: Path, label: str) -> Iterator[_Entry]:
    return _parquet(path, label) if path.name.endswith(".parquet") else _lines(path, label)


def _lines(path: Path, label: str) -> Iterator[_Entry]:
    try:
        with _opened(path) as file:
            for number, line in enumerate(file, 1):
                if text := line.removeprefix(_BOM).strip():  # a file may be several, one after the other
                    source = f"{label}:{number}"
                    yield source, _parsed(text, source)
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: can't be read to its end: {error}; fetch the file again") from error


def _parquet(path: Path, label: str) -> Iterator[_Entry]:
    from pyarrow import ArrowException
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            batches = file.iter_batches(batch_size=_PARQUET_ROWS)
            for number, record in enumerate(chain.from_iterable(map(_rows, batches)), 1):
                source = f"{label}:{number}"
                if isinstance(record, Exception):
                    message = f"{source}: a value can't be read ({record}); write its column as text"
                    record = SampleError("bad_record", message)
                yield source, record
    except (ArrowException, OSError) as error:
        raise InputError(f"{path}: can't be read as Parquet: {error}; fetch the file again") from error


def _rows(batch: Any) -> list[Any]:
    """The records of a batch; in place of one that has a value which Python has not, what is wrong with it."""
    try:
        return list(batch.to_pylist())
    except (ValueError, OverflowError) as error:
        if len(batch) == 1:
            return [error]
        return [*chain.from_iterable(_rows(batch.slice(at, 1)) for at in range(len(batch)))]


def _count(path: Path) -> int:
    if path.name.endswith(".parquet"):
        from pyarrow.parquet import read_metadata

        return int(read_metadata(path).num_rows)
    with _opened(path) as file:
        return sum(1 for _ in file)


def _opened(path: Path) -> gzip.GzipFile | BufferedReader:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _paths(path: Path | tuple[Path, ...] | None) -> tuple[Path, ...]:
    return (path,) if isinstance(path, Path) else path or ()


_decode = msgspec.json.Decoder(dict[str, Any]).decode


def _parsed(text: bytes, source: str) -> dict[str, Any] | SampleError:
    try:
        return _decode(text)
    except (ValueError, RecursionError) as error:
        return SampleError("bad_record", f"{source}: {_problem(text, error)}")


def _problem(text: bytes, error: Exception) -> str:
    if text.startswith(_GZIP):
        return "compressed; let the file's name end in .jsonl.gz"
    try:
        text.decode()
    except UnicodeDecodeError as wrong:
        byte = f"byte 0x{text[wrong.start]:02x} at {wrong.start}"
        return f"not valid UTF-8 ({byte}); re-encode the file: iconv -f <its encoding> -t utf-8"
    if has_lone_surrogate(text):
        return "a lone surrogate is no character; write both of its pair, or \\ufffd in its place"
    with suppress(ValueError, RecursionError):
        if isinstance(json.loads(text), dict):  # Python reads what it should not write
            return "NaN and Infinity are no JSON; write null in their place"
    return f"not a JSON object ({error}); write one a line, as `jq -c '.[]'` makes them of an array"
