"""Read-only SQLite for queries nobody has read: one guarded connection, one query at a time, every cost bounded.

What bounds a query here is deterministic: an authorizer with an allow-list of functions, a budget of virtual-machine
operations, caps on rows and bytes. It is not a sandbox: one long C call (`printf('%.*c', 2147483647, 'x')`) or a huge
expression at compile time escapes all of these, so untrusted SQL belongs in `SqlitePool`, whose worker processes add
limits on CPU time and memory.
"""

import sqlite3
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import pairwise, takewhile
from pathlib import Path

from fastdistill.data.execution.reason import Reason
from fastdistill.data.execution.sql_equality import Relation, Row, Token, tokenize


class SqlReason(Reason):
    """Why a query was judged as it was: a closed set. Each reason has one `outcome`."""

    MATCH = "match", "pass"
    """The result equals gold's."""
    EXECUTED = "executed", "pass"
    """It ran; there was no gold query to compare with."""

    MISMATCH = "mismatch"
    MISMATCH_PERTURBED = "mismatch_perturbed"
    """Right by luck: the result equals gold's on the database, and another one on a perturbed copy of it."""
    COLUMN_COUNT = "column_count"
    NOT_A_QUERY = "not_a_query"
    """Empty, only comments, several statements, or one that is not SELECT, VALUES or WITH ... SELECT."""
    CONSTANT = "constant"
    """It reads no table although gold does: a hard-coded answer."""
    SQL_ERROR = "sql_error"
    FORBIDDEN = "forbidden"
    """A function outside the allow-list, or SQLite's own tables."""
    NONDETERMINISTIC = "nondeterministic"
    """It reads the clock, a random number, or the state of the connection."""
    LIMIT_OPS = "limit_ops"
    LIMIT_ROWS = "limit_rows"
    LIMIT_BYTES = "limit_bytes"
    """The result, or one value on the way to it, is too large."""
    LIMIT_MEMORY = "limit_memory"
    LIMIT_CPU = "limit_cpu"

    GOLD_INVALID = "gold_invalid", "error"
    """Gold does not run, breaks a limit, or is nondeterministic."""
    GOLD_AMBIGUOUS = "gold_ambiguous", "error"
    """Gold's LIMIT cuts through tied rows: it has several right answers."""
    COMPARE_BUDGET = "compare_budget", "error"
    """The columns resemble each other so much that the search for their order gave up."""
    INFRA_TIMEOUT = "infra_timeout", "error"
    """The wall clock ran out before any budget of the query did: the machine is too busy, or its disk too slow."""
    SANDBOX_DIED = "sandbox_died", "error"
    DATABASE_UNREADABLE = "database_unreadable", "error"


@dataclass(frozen=True, slots=True)
class SqlLimits:
    """What one query may cost. The first group is deterministic; `cpu_s` onwards binds only in a worker process."""

    ops: int = 3_000_000
    """Operations of SQLite's virtual machine, counted by the thousand (about 0.1 s)."""
    rows: int = 10_000
    result_bytes: int = 8_000_000
    """Bytes of text and blobs in the result, and 8 for each cell."""
    value_bytes: int = 100_000
    """Longest text or blob a query may build; raised to the longest that the database holds."""
    sql_bytes: int = 50_000
    heap_bytes: int = 32 << 20
    """SQLite's memory, over all connections of a worker."""
    cpu_s: float = 1.0
    """CPU seconds of one query, for what escapes `ops`."""
    wall_s: float = 10.0
    """Wall seconds without an answer before a worker is killed: a backstop that never blames the query."""
    memory_bytes: int = 512 << 20
    """Address space of a worker."""


@dataclass(frozen=True, slots=True)
class QueryResult(Relation):
    ops: int
    """Operations of the virtual machine, rounded down to a thousand."""
    size: int
    """Bytes, as `SqlLimits.result_bytes` counts them."""
    tables: tuple[str, ...]
    """Tables and views of the database that the query refers to, sorted."""


class QueryError(Exception):
    """The query was refused or failed. `reason` is one of the failing reasons, the text is stable across runs."""

    def __init__(self, reason: SqlReason, message: str, ops: int | None = 0) -> None:
        super().__init__(message)
        self.reason = reason
        self.ops = ops


class DatabaseUnreadableError(Exception):
    """The database itself is at fault: missing, not SQLite, damaged, or not checkpointed."""


class GuardedConnection:
    """A read-only connection whose every query is authorized and bounded; raises `DatabaseUnreadableError`.

    The file must not change while it is open (it is opened as immutable, without locks); see `is_stale`.
    """

    def __init__(self, path: str | Path, limits: SqlLimits) -> None:
        self.path = Path(path).absolute()
        self._limits = limits
        self._measured = False
        self._forget()
        with _blamed(self.path):
            self.identity = _identity(self.path)
            _check_header(self.path)
            self._connection = _connect(self.path)
            try:
                self._guard()
            except BaseException:
                self.close()
                raise

    def is_stale(self) -> bool:
        """Whether its path no longer names the file that was opened."""
        with suppress(OSError):
            return _identity(self.path) != self.identity
        return True

    def close(self) -> None:
        self._connection.close()

    def query(self, sql: str) -> QueryResult:
        """Runs one query; raises `QueryError` for anything wrong with it."""
        tokens = check_statement(sql, self._limits)
        self._forget()
        rows: list[Row] = []
        try:
            # Cut at its last token, because sqlite3 takes a second semicolon for a second statement.
            with closing(self._connection.execute(sql[: tokens[-1].end])) as cursor:
                if cursor.description is None:
                    raise QueryError(SqlReason.NOT_A_QUERY, "the statement returns no columns")
                if reads_clock(tokens, self._functions):
                    raise QueryError(SqlReason.NONDETERMINISTIC, "the query reads the clock")
                width = len(cursor.description)
                size = self._fetch(cursor, rows)
        except MemoryError as error:
            raise QueryError(SqlReason.LIMIT_MEMORY, "out of memory", self._ops) from error
        except sqlite3.Error as error:
            if self._connection.text_factory is str and str(error).startswith("Could not decode"):
                # Some text is not UTF-8: slower from now on, with every byte of it kept.
                self._connection.text_factory = lambda text: text.decode(*_TEXT)
                return self.query(sql)
            raise self._explain(error) from error
        return QueryResult(width, tuple(rows), self._ops, size, tuple(sorted(self._tables)))

    def allow_stored_values(self) -> bool:
        """Raises the limit on a value to the longest in the database, which is read once; whether that changed it.

        Worth calling when a query failed with `LIMIT_BYTES`: a database may hold longer values than a query may build.
        """
        if self._measured or self.identity[0] <= self._limits.value_bytes:
            return False
        self._measured = True
        with suppress(MemoryError), _blamed(self.path), closing(_connect(self.path)) as unrestricted:
            longest = max(_longest_values(unrestricted), default=0)
            if longest > self._limits.value_bytes:
                self._connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, longest)
                return True
        return False

    def _guard(self) -> None:
        connection = self._connection
        if sys.version_info >= (3, 12):  # real queries say = "san francisco", which some builds refuse
            connection.setconfig(sqlite3.SQLITE_DBCONFIG_DQS_DML, True)
        connection.executescript("PRAGMA query_only=1; PRAGMA temp_store=2; PRAGMA cache_size=-8000")
        names = connection.execute("SELECT CAST(name AS BLOB) FROM sqlite_master WHERE type IN ('table', 'view')")
        self._schema = {(shown := name.decode(*_TEXT)).lower(): shown for (name,) in names}
        with suppress(sqlite3.OperationalError):  # a build without JSON
            # Setting these up looks like a write to sqlite_master, so it must come before the authorizer.
            connection.executescript("SELECT 1 FROM json_each('[]'); SELECT 1 FROM json_tree('[]')")
        for category, value in _STATIC_LIMITS.items():
            connection.setlimit(category, value)
        connection.setlimit(sqlite3.SQLITE_LIMIT_SQL_LENGTH, self._limits.sql_bytes)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, self._limits.value_bytes)
        connection.set_progress_handler(self._tick, _OPS_PER_TICK)
        connection.set_authorizer(self._authorize)

    def _forget(self) -> None:
        self._ops = 0
        self._tables: set[str] = set()
        self._functions: set[str] = set()
        self._denied: SqlReason | None = None

    def _tick(self) -> bool:
        self._ops += _OPS_PER_TICK
        return self._ops >= self._limits.ops

    def _fetch(self, cursor: sqlite3.Cursor, rows: list[Row]) -> int:
        width, content, size = len(cursor.description), 0, 0
        while batch := cursor.fetchmany(_ROWS_AT_ONCE):
            rows += batch
            content += sum(_length(cell) for row in batch for cell in row if isinstance(cell, str | bytes))
            size = content + 8 * width * len(rows)
            if len(rows) > self._limits.rows:
                raise QueryError(SqlReason.LIMIT_ROWS, f"more than {self._limits.rows} rows", self._ops)
            if size > self._limits.result_bytes:
                message = f"result larger than {self._limits.result_bytes} bytes"
                raise QueryError(SqlReason.LIMIT_BYTES, message, self._ops)
        return size

    def _authorize(self, action: int, first: str | None, second: str | None, *_: str | None) -> int:
        if action in (sqlite3.SQLITE_SELECT, sqlite3.SQLITE_RECURSIVE):
            return sqlite3.SQLITE_OK
        reason = SqlReason.NOT_A_QUERY
        if action == sqlite3.SQLITE_FUNCTION and second is not None:
            function = second.lower()
            self._functions.add(function)
            if function in ALLOWED_FUNCTIONS:
                return sqlite3.SQLITE_OK
            volatile = function in _VOLATILE_FUNCTIONS
            reason = SqlReason.NONDETERMINISTIC if volatile else SqlReason.FORBIDDEN
        elif first is not None and first.lower().startswith("sqlite_"):
            reason = SqlReason.FORBIDDEN
        elif action == sqlite3.SQLITE_READ and first is not None:
            # Names of common table expressions come here too, from queries that read no column of them.
            if (table := self._schema.get(first.lower())) is not None:
                self._tables.add(table)
            return sqlite3.SQLITE_OK
        self._denied = self._denied or reason
        return sqlite3.SQLITE_DENY

    def _explain(self, error: sqlite3.Error) -> QueryError:
        code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF  # the primary code
        if code in _DATABASE_FAULTS:
            raise DatabaseUnreadableError(f"database {self.path}: {error}") from error
        if code == sqlite3.SQLITE_INTERRUPT and self._denied is None:
            return QueryError(SqlReason.LIMIT_OPS, f"more than {self._limits.ops} operations", self._ops)
        reason = self._denied or _REASONS.get(code, SqlReason.SQL_ERROR)
        return QueryError(reason, str(error)[:_MESSAGE_CHARS], self._ops)


def check_statement(sql: str, limits: SqlLimits) -> tuple[Token, ...]:
    """The tokens of the one query in `sql`, without semicolons; `QueryError` for what its text alone rules out."""
    try:
        if len(sql) > limits.sql_bytes or len(sql.encode()) > limits.sql_bytes:
            raise QueryError(SqlReason.SQL_ERROR, "query string is too large")
    except UnicodeEncodeError:
        raise QueryError(SqlReason.SQL_ERROR, "the query contains a lone surrogate") from None
    if "\0" in sql:
        raise QueryError(SqlReason.SQL_ERROR, "the query contains a null character")
    tokens = tokenize(sql)
    while tokens and tokens[-1].text == ";":
        tokens = tokens[:-1]
    if not tokens:
        raise QueryError(SqlReason.NOT_A_QUERY, "empty statement")
    if any(token.text == ";" for token in tokens):
        raise QueryError(SqlReason.NOT_A_QUERY, "more than one statement")
    if (word := tokens[0].word) in _STATEMENTS:
        raise QueryError(SqlReason.NOT_A_QUERY, f"{word} is not a query")
    return tokens


def reads_clock(tokens: Sequence[Token], functions: set[str]) -> bool:
    """Whether a call of a date function takes the current time, which SQLite's authorizer does not show.

    A time that is put together at run time (`'n' || 'ow'`) is not seen. `subsec` is the current time too, from SQLite
    3.42 on, where no other comes first.
    """
    if functions.isdisjoint(_DATE_FUNCTIONS):
        return False
    for index, token in enumerate(tokens):
        if _string(token) == "now":
            return True
        name = token.text.strip('"`[]').lower()
        if name in _DATE_FUNCTIONS and (arguments := _arguments(tokens, index + 1)) is not None:
            first = name == "strftime"  # it has the format before the time
            times = arguments[first : first + 1 + (name == "timediff")]
            if len(arguments) == first or any(_string(time) in ("subsec", "subsecond") for time in times):
                return True
    return False


def _string(token: Token) -> str | None:
    """What a string of SQL says, in small letters; None for any other token."""
    return token.text[1:-1].lower() if token.text[0] in "'\"" else None


def limit_process_heap(limits: SqlLimits) -> None:
    """Bounds SQLite's memory for the whole process, for good: only for a process that does nothing else.

    Page caches stop growing at half of it, so that idle connections leave room for the query that runs.
    """
    soft = f"PRAGMA soft_heap_limit={limits.heap_bytes // 2}"
    with closing(sqlite3.connect(":memory:")) as connection:
        connection.executescript(f"{soft}; PRAGMA hard_heap_limit={limits.heap_bytes}")


def _arguments(tokens: Sequence[Token], index: int) -> list[Token] | None:
    """What the arguments in the parenthesis at `index` begin with; `None` if there is no parenthesis."""
    if index >= len(tokens) or tokens[index].text != "(":
        return None
    depth = tokens[index].depth + 1
    inside = list(takewhile(lambda token: token.depth >= depth, tokens[index + 1 :]))
    return inside[:1] + [after for comma, after in pairwise(inside) if comma.text == "," and comma.depth == depth]


@contextmanager
def _blamed(path: Path) -> Iterator[None]:
    """Whatever the system or SQLite says of it within is the fault of the database."""
    try:
        yield
    except (OSError, ValueError, sqlite3.Error) as error:
        text = getattr(error, "strerror", None) or error
        raise DatabaseUnreadableError(f"database {path}: {text}") from error


def _identity(path: Path) -> tuple[int, int, int, int]:
    """Size, time of change, inode, device."""
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ino, status.st_dev


def _check_header(path: Path) -> None:
    with path.open("rb") as file:
        if file.read(16) != b"SQLite format 3\0":
            raise ValueError("not a SQLite database")
    log = path.with_name(f"{path.name}-wal")
    if log.exists() and log.stat().st_size:
        raise ValueError("changes wait in its write-ahead log; run `PRAGMA wal_checkpoint(TRUNCATE)` on it")


def _connect(path: Path) -> sqlite3.Connection:
    # immutable=1 takes no locks and creates no files, but also ignores a write-ahead log.
    return sqlite3.connect(f"{path.as_uri()}?mode=ro&immutable=1", uri=True, isolation_level=None, cached_statements=0)


def _longest_values(connection: sqlite3.Connection) -> Iterator[int]:
    """Bytes of the longest value of each table's columns."""
    tables = connection.execute(
        "SELECT name FROM sqlite_master WHERE type = 'table' AND sql NOT LIKE 'CREATE VIRTUAL%'"
    ).fetchall()
    for (table,) in tables:
        columns = connection.execute("SELECT name FROM pragma_table_info(?)", (table,)).fetchall()
        longest = ", ".join(f"max(length(CAST({quoted(column)} AS BLOB)))" for (column,) in columns)
        (lengths,) = connection.execute(f"SELECT {longest} FROM {quoted(table)}").fetchall()
        yield from (length for length in lengths if length is not None)


def _length(cell: str | bytes) -> int:
    return len(cell) if isinstance(cell, bytes) or cell.isascii() else len(cell.encode(*_TEXT))


def quoted(name: str) -> str:
    """An identifier as SQL takes it, whatever is in it."""
    return '"' + name.replace('"', '""') + '"'


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_OPS_PER_TICK = 1000
_ROWS_AT_ONCE = 16  # between two looks at the size of the result: a row may have 200 cells of 100 kB
_TEXT = ("utf-8", "surrogateescape")
_MESSAGE_CHARS = 500  # a syntax error quotes the token it stumbled on, however long

_STATIC_LIMITS = {
    sqlite3.SQLITE_LIMIT_COLUMN: 200,
    sqlite3.SQLITE_LIMIT_EXPR_DEPTH: 200,
    sqlite3.SQLITE_LIMIT_COMPOUND_SELECT: 50,
    sqlite3.SQLITE_LIMIT_VDBE_OP: 100_000,
    sqlite3.SQLITE_LIMIT_FUNCTION_ARG: 64,
    sqlite3.SQLITE_LIMIT_ATTACHED: 0,
    sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH: 200,
    sqlite3.SQLITE_LIMIT_VARIABLE_NUMBER: 0,
    sqlite3.SQLITE_LIMIT_TRIGGER_DEPTH: 0,
    sqlite3.SQLITE_LIMIT_WORKER_THREADS: 0,
}

_REASONS = {
    sqlite3.SQLITE_TOOBIG: SqlReason.LIMIT_BYTES,
    sqlite3.SQLITE_NOMEM: SqlReason.LIMIT_MEMORY,
    sqlite3.SQLITE_READONLY: SqlReason.NOT_A_QUERY,
}
_DATABASE_FAULTS = frozenset(
    {sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN}
)

# Statements by their first word; WITH can also introduce a write, which the authorizer then denies.
_STATEMENTS = _words(
    """ALTER ANALYZE ATTACH BEGIN COMMIT CREATE DELETE DETACH DROP END EXPLAIN INSERT PRAGMA REINDEX RELEASE REPLACE
    ROLLBACK SAVEPOINT UPDATE VACUUM"""
)
_DATE_FUNCTIONS = _words("date time datetime julianday unixepoch strftime timediff")
_VOLATILE_FUNCTIONS = _words(
    """random randomblob current_date current_time current_timestamp changes total_changes last_insert_rowid
    sqlite_version sqlite_source_id sqlite_compileoption_get sqlite_compileoption_used sqlite_offset"""
)
ALLOWED_FUNCTIONS = (
    _words(
        """
        abs char coalesce concat concat_ws format glob hex if ifnull iif instr length like likelihood likely lower ltrim
        max min nullif octet_length printf quote replace round rtrim sign soundex substr substring subtype trim typeof
        unhex unicode unistr unistr_quote unlikely upper zeroblob
        avg count group_concat median percentile percentile_cont percentile_disc string_agg sum total
        cume_dist dense_rank first_value lag last_value lead nth_value ntile percent_rank rank row_number
        acos acosh asin asinh atan atan2 atanh ceil ceiling cos cosh degrees exp floor ln log log10 log2 mod pi pow
        power radians sin sinh sqrt tan tanh trunc
        -> ->> json json_array json_array_length json_error_position json_extract json_group_array json_group_object
        json_insert json_object json_patch json_pretty json_quote json_remove json_replace json_set json_type json_valid
        """
    )
    | _DATE_FUNCTIONS
)
"""SQLite's built-in functions whose result depends on nothing but their arguments."""
