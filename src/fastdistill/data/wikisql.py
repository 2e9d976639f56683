"""Makes a data set of records and SQLite databases from WikiSQL's official release. Never asks a model.

WikiSQL (Zhong et al. 2017, arXiv:1709.00103) names columns `col0`, `col1` ...; here they have their headers' names, in
the schema, in the gold query and in the database. A query means what the official evaluator makes of it
(`lib/dbengine.py` of github.com/salesforce/WikiSQL): every gold query is run against the database that is written, and
must give what the official one gives on the official database.
"""

import random
import re
import shutil
import sqlite3
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import TypeVar

import msgspec

from fastdistill.core.errors import InputError
from fastdistill.core.files import atomic
from fastdistill.data.parse import KEYWORDS
from fastdistill.data.prepared import cache_folder

URL = "https://github.com/salesforce/WikiSQL/raw/master/data.tar.bz2"

_SPLITS = {"train": "train", "eval": "dev"}  # what is written, and the split of the release that it comes from
_MEMBERS = [f"{split}.{ending}" for split in _SPLITS.values() for ending in ("jsonl", "tables.jsonl", "db")]
_AGGREGATES = ("", "MAX", "MIN", "COUNT", "SUM", "AVG")
_OPERATORS = ("=", ">", "<")
_NUMBER = re.compile(r"[-+]?\d*\.\d+|\d+")
_LONGEST_NAME = 60  # characters; some headers are sentences


class PreparedSplit(msgspec.Struct, frozen=True):
    """One split as written. `left_out` counts the questions that were drawn and not used, by reason.

    Reasons: `no_table`, `bad_query` (it names a column, an operator or a number that is none), `fails` (SQLite refuses
    it), `empty` (no row, only NULLs, or a count of 0: any wrong query could match it), `differs` (from the official
    result).
    """

    records: int
    tables: int
    left_out: Mapping[str, int]


class Prepared(msgspec.Struct, frozen=True):
    """The data set as written: `train.jsonl`, `train.db`, `eval.jsonl` and `eval.db` in `folder`."""

    folder: Path
    train: PreparedSplit
    eval: PreparedSplit


def prepare_wikisql(
    source: str | Path | None = None,
    samples: int = 1000,
    seed: int = 13,
    output: Path | None = None,
) -> Prepared:
    """Draws `samples` questions from the train split, and a fifth as many from the dev split.

    `source` is the release's data.tar.bz2 or its unpacked folder; without it, the archive is downloaded once into the
    cache. A question that can't be used is replaced by the next one drawn, so fewer come out only when the release has
    no more. The same arguments give the same bytes; with the same seed, a smaller draw begins a larger one.

    Text is compared without case in the databases, as the official evaluator does by lower-casing both sides; so a
    query may write a value as the question does.

    Raises:
        InputError: the release can't be fetched or read, or has no usable question.
        EnvironmentFault: the files can't be written.
    """
    size = f"{samples // 1000}k" if samples % 1000 == 0 else samples
    output = output or cache_folder() / "datasets" / "wikisql" / f"wikisql_{size}"
    sizes = {"train": samples, "eval": max(1, samples // 5)}
    with _release(source) as release, TemporaryDirectory(prefix="fastdistill-") as scratch:
        prepared = {}
        for name, split in _SPLITS.items():
            try:
                prepared[name] = _prepare_split(release, split, sizes[name], seed, Path(scratch) / name)
            except sqlite3.DatabaseError as error:
                raise InputError(f"{release / split}.db: can't be copied ({error}); fetch {URL} again") from error
        for draft in sorted(Path(scratch).iterdir()):
            with draft.open("rb") as written, atomic(output / draft.name, "wb") as file:
                shutil.copyfileobj(written, file)
    return Prepared(output, **prepared)


# --- the release ---


class _Query(msgspec.Struct, frozen=True):
    sel: int
    agg: int
    conds: list[tuple[int, int, str | int | float]]


class _Question(msgspec.Struct, frozen=True):
    table_id: str
    question: str
    sql: _Query


class _Header(msgspec.Struct, frozen=True):
    """A line of *.tables.jsonl, less its rows: those are taken from the .db, as the official evaluator does."""

    id: str
    header: list[str]


@contextmanager
def _release(source: str | Path | None) -> Iterator[Path]:
    """A folder with the release's files."""
    path = _downloaded() if source is None else Path(source).expanduser().absolute()
    with TemporaryDirectory(prefix="fastdistill-") as unpacked:
        folder = path / "data" if (path / "data").is_dir() else path
        if path.is_file():
            folder = Path(unpacked)
            _unpack(path, folder)
        elif not path.is_dir():
            raise InputError(f"{path}: there is no such file or folder; leave --source out to download the release")
        if missing := [name for name in _MEMBERS if not (folder / name).is_file()]:
            raise InputError(f"{path}: lacks {', '.join(missing)}; give data.tar.bz2 of {URL}, or what is in it")
        yield folder


def _downloaded() -> Path:
    from http.client import HTTPException
    from urllib.request import urlopen

    path = cache_folder() / "datasets" / "wikisql" / "data.tar.bz2"
    if not path.exists():
        try:
            with urlopen(URL, timeout=60) as response, atomic(path, "wb") as file:
                shutil.copyfileobj(response, file)
        except (OSError, HTTPException) as error:
            raise InputError(
                f"{URL}: can't be downloaded ({error}); fetch it by other means, and give its path as --source"
            ) from error
    return path


def _unpack(archive: Path, folder: Path) -> None:
    """Writes the expected members, if plain files, by names of ours: no path or link of the archive is followed."""
    try:
        with tarfile.open(archive) as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                wanted = member.isreg() and path.parent.name == "data" and path.name in _MEMBERS
                if wanted and (content := tar.extractfile(member)):
                    with (folder / path.name).open("wb") as file:
                        shutil.copyfileobj(content, file)
    except (tarfile.TarError, EOFError, OSError) as error:
        raise InputError(f"{archive}: can't be unpacked ({error}); fetch {URL} again") from error


_Line = TypeVar("_Line")


def _lines(path: Path, kind: type[_Line]) -> Iterator[_Line]:
    decoder = msgspec.json.Decoder(kind)
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                yield decoder.decode(line)
            except ValueError as error:
                raise InputError(f"{path}:{number}: not a line of the release ({error}); fetch {URL} again") from error


# --- one split ---


class _LeftOut(Exception):
    """A question can't be used; the text is the reason."""


def _prepare_split(release: Path, split: str, samples: int, seed: int, draft: Path) -> PreparedSplit:
    """Writes `draft`.db and `draft`.jsonl."""
    questions = list(enumerate(_lines(release / f"{split}.jsonl", _Question)))
    random.Random(f"wikisql {split} {seed}").shuffle(questions)
    headers = {line.id: line.header for line in _lines(release / f"{split}.tables.jsonl", _Header)}
    left_out: Counter[str] = Counter()
    records = 0
    database = sqlite3.connect(draft.with_suffix(".db").as_uri(), uri=True, isolation_level=None)
    with closing(database), draft.with_suffix(".jsonl").open("wb") as file:
        database.execute("ATTACH ? AS release", [f"{(release / f'{split}.db').as_uri()}?mode=ro"])
        tables = _Tables(database, headers)
        database.execute("BEGIN")
        for number, question in questions:
            if records == samples:
                break
            try:
                file.write(msgspec.json.encode(_record(f"wikisql-{split}-{number:05d}", question, tables)) + b"\n")
                records += 1
            except _LeftOut as reason:
                left_out[str(reason)] += 1
        database.execute("COMMIT")
    if not records:
        raise InputError(f"{release}: no usable question in {split}.jsonl ({dict(left_out)}); fetch {URL} again")
    return PreparedSplit(records, len(tables.written), dict(left_out))


def _record(task_id: str, question: _Question, tables: "_Tables") -> dict[str, str | int]:
    table, query = tables.find(question.table_id), question.sql
    try:
        conditions = table.conditions(query)
        where = [f"{table.columns[column]} {operator} {_literal(value)}" for column, operator, value in conditions]
        gold = _select(query, table.name, table.columns, where)
        numbered = [f"col{index}" for index in range(len(table.columns))]
        where = [f"col{column} {operator} ?" for column, operator, _ in conditions]
        official = _select(query, f"release.{table.name}", numbered, where)
    except IndexError as error:
        raise _LeftOut("bad_query") from error
    expected = tables.answer(official, [value for _, _, value in conditions])
    if all(value is None for value in expected) or (_AGGREGATES[query.agg] == "COUNT" and expected == [0]):
        raise _LeftOut("empty")
    tables.write(table)
    if tables.answer(gold) != expected:
        raise _LeftOut("differs")
    return {
        "task_id": task_id,
        "schema": table.schema(),
        "instruction": question.question.strip(),
        "gold_sql": gold,
        "db_id": question.table_id,
        "agg": _AGGREGATES[query.agg] or "NONE",
        "conditions": len(conditions),
    }


class _Table(msgspec.Struct, frozen=True):
    name: str
    columns: tuple[str, ...]  # as SQL writes them
    types: tuple[str, ...]  # as the release has them: text or real

    def schema(self, collation: str = "") -> str:
        kinds = (f"TEXT{collation}" if kind == "text" else "REAL" for kind in self.types)
        return f"CREATE TABLE {self.name} ({', '.join(map(' '.join, zip(self.columns, kinds, strict=True)))});"

    def conditions(self, query: _Query) -> list[tuple[int, str, str | float]]:
        """The query's columns, operators, and values as the evaluator compares them."""
        return [
            (column, _OPERATORS[operator], str(value).lower() if self.types[column] == "text" else _real(value))
            for column, operator, value in query.conds
        ]


def _select(query: _Query, table: str, columns: Sequence[str], where: Sequence[str]) -> str:
    aggregate, column = _AGGREGATES[query.agg], columns[query.sel]
    selected = f"{aggregate}({column})" if aggregate else column
    return " WHERE ".join([f"SELECT {selected} FROM {table}", *filter(None, [" AND ".join(where)])])


class _Tables(msgspec.Struct):
    """The release's tables, as they are there and as they are written."""

    database: sqlite3.Connection
    headers: Mapping[str, Sequence[str]]
    written: set[str] = set()

    def find(self, table_id: str) -> _Table:
        name = f"table_{table_id.replace('-', '_')}"
        header = self.headers.get(table_id, ())
        found = self.database.execute("SELECT lower(type) FROM pragma_table_info(?, 'release')", [name])
        types = tuple(kind for (kind,) in found)
        if not types or len(types) != len(header) or not re.fullmatch(r"\w+", name):
            raise _LeftOut("no_table")
        return _Table(name, tuple(readable_columns(header)), types)

    def write(self, table: _Table) -> None:
        if table.name not in self.written:
            self.database.execute(table.schema(" COLLATE NOCASE"))
            self.database.execute(f"INSERT INTO main.{table.name} SELECT * FROM release.{table.name} ORDER BY rowid")
            self.written.add(table.name)

    def answer(self, query: str, values: Sequence[str | float] = ()) -> list[str | float | None]:
        try:
            return [value for (value,) in self.database.execute(query, values)]
        except sqlite3.Error as error:
            raise _LeftOut("fails") from error


def readable_columns(header: Sequence[str]) -> list[str]:
    """Column names made of a table's headers, quoted where SQL needs it, and unique whatever their case.

    `School/Club Team` is school_club_team, `Pick #` is pick_number, `Order` is "order".
    """
    taken: set[str] = set()
    columns = []
    for index, title in enumerate(header):
        words = re.findall(r"\w+", title.replace("#", " number ").replace("%", " percent ").lower())
        stem = "_".join(words)[:_LONGEST_NAME].strip("_") or f"column_{index}"
        name, repeat = stem, 1
        while name in taken:
            repeat += 1
            name = f"{stem}_{repeat}"
        taken.add(name)
        plain = re.fullmatch(r"[a-z_][a-z0-9_]*", name) and name not in KEYWORDS
        columns.append(name if plain else f'"{name}"')
    return columns


def _real(value: str | float) -> float:
    """A number, as the evaluator reads one: with commas between thousands, or the first that the text holds.

    Raises:
        IndexError: it holds none.
    """
    if not isinstance(value, str):
        return value
    plain = value.replace(",", "")
    return float(plain if re.fullmatch(r"\s*[-+]?(\d+\.?\d*|\.\d+)\s*", plain) else _NUMBER.findall(value)[0])


def _literal(value: str | float) -> str:
    if isinstance(value, str):
        return "'" + value.replace("'", "''") + "'"
    return str(int(value)) if float(value).is_integer() and abs(value) < 1e15 else repr(value)
