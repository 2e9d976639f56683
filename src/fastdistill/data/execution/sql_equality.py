"""`sql-eq/1`: when two SQL results are the same answer, and what a query's text says about the order of its rows.

Pure functions over rows and text: nothing here opens a database or runs a query.

- **Width** decides first, also when both results are empty. Column names never matter.
- **Cells**: NULL equals only NULL; numbers compare by value, integers exactly (never through a float); text, blob and
  number are distinct; nothing is trimmed or case-folded. Floats of both results that lie within 1e-9 relative or 1e-12
  absolute of a neighbour are snapped together first, because rounding has bucket edges.
- **Rows** are a multiset. Where order counts they are a sequence modulo ties: `cuts` are the positions at which one
  group of tied rows ends and the next begins.
- **Columns** may come in any order, one permutation for the whole result, unless `columns="strict"`.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain, pairwise
from typing import Literal, NamedTuple

DEFINITION = "sql-eq/1"

Cell = int | float | str | bytes | None
Row = tuple[Cell, ...]
Columns = Literal["any", "strict"]

RELATIVE_TOLERANCE = 1e-9
ABSOLUTE_TOLERANCE = 1e-12
MAX_SEARCH_NODES = 10_000
"""Column assignments tried before a comparison gives up."""
MAX_SEARCH_ROWS = 4_000_000
"""Rows looked at over all those assignments (about a second): long results give up after fewer nodes."""


@dataclass(frozen=True, slots=True)
class Relation:
    """What a query returned. `width` comes from the cursor's description: an empty result has one too."""

    width: int
    rows: tuple[Row, ...]


Comparison = Literal["match", "mismatch", "column_count", "compare_budget"]
"""The words are those of `sqlite_guard.SqlReason`. `compare_budget`: the search for an order of columns gave up."""


def compare(
    gold: Relation, other: Relation, *, cuts: Sequence[int] | None = None, columns: Columns = "any"
) -> Comparison:
    """Whether `other` is the same answer as `gold`.

    `cuts` are the ends of gold's groups of interchangeable rows, rising to `len(gold.rows)`: `None` (one group) makes
    the rows a multiset, `range(1, n + 1)` an exact sequence, `tie_cuts` a sequence modulo ties.
    """
    if gold.width != other.width:
        return "column_count"
    if len(gold.rows) != len(other.rows):
        return "mismatch"
    if gold.rows == other.rows:
        return "match"
    left, right = _snapped(gold.rows, other.rows)
    ends = [len(left)] if cuts is None else cuts
    groups = ((left[start:end], right[start:end]) for start, end in pairwise([0, *ends]))
    if all(wanted == given or Counter(wanted) == Counter(given) for wanted, given in groups):
        return "match"
    if columns == "strict" or gold.width == 1:
        return "mismatch"
    return _permuted(left, right, ends)


def tie_cuts(ascending: Relation, descending: Relation) -> tuple[int, ...] | None:
    """The cuts of a query that ran twice, its ties broken by all columns ascending and then descending.

    The two runs agree on a prefix, as multisets, exactly where a group of ties ends. `None`: they returned different
    rows, so a LIMIT cuts through a group of ties and the query has no single answer.
    """
    if len(ascending.rows) != len(descending.rows):
        return None
    left, right = _snapped(ascending.rows, descending.rows)
    surplus: Counter[Row] = Counter()
    cuts = []
    for position, (first, second) in enumerate(zip(left, right, strict=True), start=1):
        if first != second:
            for row, step in ((first, 1), (second, -1)):
                surplus[row] += step
                if not surplus[row]:
                    del surplus[row]
        if not surplus:
            cuts.append(position)
    return None if surplus else tuple(cuts)


def signature(relation: Relation, *, ordered: bool = False) -> str:
    """SHA-256 (hex) of the result: the order of rows counts only if `ordered`, that of columns always.

    Equal numbers have one form (`2` and `2.0`); other floats keep ten significant digits. A hash has no tolerance:
    two floats that `compare` would snap together can still fall on two sides of a rounding edge.
    """
    rows: Iterable[Row] = relation.rows
    if float in map(type, chain.from_iterable(rows)):
        rows = (tuple(map(_canonical, row)) for row in rows)
    lines = list(map(ascii, rows))  # exact for every other cell, and the same in every version of Python
    if not ordered:
        lines.sort()
    text = "\n".join([f"{DEFINITION} {relation.width} {len(lines)}", *lines])
    return hashlib.sha256(text.encode()).hexdigest()


class Token(NamedTuple):
    """One lexical token of SQL: neither space nor comment. `depth` counts the parentheses around it."""

    text: str
    end: int
    depth: int

    @property
    def word(self) -> str:
        """The text in upper case; a quoted name or a string keeps its quotes, and is never a keyword."""
        return self.text.upper()


# As SQLite reads it: only ASCII space separates, and unterminated strings and comments run to the end of the text.
_LEXEME = re.compile(
    r"""(?P<skip> [ \t\n\f\r]+ | --[^\n]* | /\*.*?(?:\*/|\Z) )
      | [\w$\u0080-\U0010ffff]+
      | '[^']*(?:''[^']*)*'? | "[^"]*(?:""[^"]*)*"? | `[^`]*(?:``[^`]*)*`? | \[[^\]]*\]?
      | .""",
    re.VERBOSE | re.DOTALL,
)


@lru_cache(maxsize=32)  # a gold query is looked at several times in a row
def tokenize(sql: str) -> tuple[Token, ...]:
    """The tokens of `sql`, as far as finding clauses needs them: operators come one character at a time."""
    tokens: list[Token] = []
    depth = 0
    for lexeme in _LEXEME.finditer(sql):
        if lexeme.lastgroup == "skip":
            continue
        text = lexeme.group()
        if text == ")":
            depth -= 1
        tokens.append(Token(text, lexeme.end(), depth))
        if text == "(":
            depth += 1
    return tuple(tokens)


def clause(sql: str, *words: str) -> int | None:
    """The place, in its tokens, of the last such keywords in a row that are of no subquery and no window."""
    tokens = tokenize(sql)
    for index in range(len(tokens) - len(words), -1, -1):
        found = tokens[index : index + len(words)]
        if all(token.depth == 0 and token.word == word for token, word in zip(found, words, strict=True)):
            return index
    return None


def break_ties(sql: str, width: int, direction: Literal["ASC", "DESC"]) -> str:
    """`sql` with every result column, in `direction`, as its last sort keys: a total order of its rows.

    `COLLATE BINARY` keeps rows apart that a column's own collation would leave tied; but where UNION, INTERSECT
    or EXCEPT leave one of equal rows, it would change which are equal.
    """
    tokens = tokenize(sql)
    pairs = ((a.word, b.word) for a, b in pairwise(tokens) if not a.depth)
    merged = any(a in ("INTERSECT", "EXCEPT") or (a == "UNION" and b != "ALL") for a, b in pairs)
    how = direction if merged else f"COLLATE BINARY {direction}"
    keys = ", ".join(f"{column} {how}" for column in range(1, width + 1))
    limit = clause(sql, "LIMIT")
    end = next((token.end for token in reversed(tokens[:limit]) if token.text != ";"), 0)
    joint = "," if clause(sql, "ORDER", "BY") is not None else " ORDER BY"
    return f"{sql[:end]}{joint} {keys}{sql[end:]}"


def _canonical(cell: Cell) -> Cell:
    if not isinstance(cell, float):
        return cell
    rounded = cell if cell.is_integer() else float(format(cell, ".10g"))
    return int(rounded) if rounded.is_integer() else rounded


def _snapped(left: tuple[Row, ...], right: tuple[Row, ...]) -> tuple[tuple[Row, ...], tuple[Row, ...]]:
    """Both results with each chain of close floats replaced by one of its members.

    Python's own equality then does the rest: it compares int with float exactly, and never str with bytes or number.
    """
    floats = {cell for rows in (left, right) for row in rows for cell in row if isinstance(cell, float)}
    close: list[list[float]] = []
    for lower, upper in pairwise(sorted(floats)):
        if math.isclose(lower, upper, rel_tol=RELATIVE_TOLERANCE, abs_tol=ABSOLUTE_TOLERANCE):
            if close and close[-1][-1] == lower:
                close[-1].append(upper)
            else:
                close.append([lower, upper])
    if not close:
        return left, right
    # A chain takes the value of an integer that it contains, or 3.0 would stop being equal to 3.
    integers = {cell for rows in (left, right) for row in rows for cell in row if isinstance(cell, int)}
    member = {value: next((v for v in chain if v in integers), chain[0]) for chain in close for value in chain}

    def snap(rows: tuple[Row, ...]) -> tuple[Row, ...]:
        return tuple(tuple(member.get(cell, cell) if isinstance(cell, float) else cell for cell in row) for row in rows)

    return snap(left), snap(right)


class _BudgetSpentError(Exception):
    pass


def _permuted(gold: tuple[Row, ...], other: tuple[Row, ...], ends: Sequence[int]) -> Comparison:
    """Backtracking over which column of `other` stands for each column of gold.

    A partial assignment splits the rows into classes: rows are in one class if they agree on the group of ties and on
    all columns assigned so far. It survives only while every class is as large as gold's, so most die at once.
    """
    mine, others = list(zip(*gold, strict=True)), list(zip(*other, strict=True))
    wanted, shapes = list(map(_shape, mine)), list(map(_shape, others))
    if Counter(wanted) != Counter(shapes):
        return "mismatch"
    options = [[i for i, shape in enumerate(shapes) if shape == column] for column in wanted]
    order = sorted(range(len(mine)), key=lambda column: len(options[column]))
    first_alike = [others.index(column) for column in others]  # columns that look alike are tried once
    tied = [group for group, (start, end) in enumerate(pairwise([0, *ends])) for _ in range(end - start)]
    left = min(MAX_SEARCH_NODES, MAX_SEARCH_ROWS // len(gold))

    def assign(depth: int, reference: list[int], groups: list[int], used: frozenset[int]) -> bool:
        """Whether the columns from this depth on find their places, given the class of each row on both sides."""
        nonlocal left
        if depth == len(order):
            return True
        classes: dict[Hashable, int] = {}  # numbered by first appearance
        keys = zip(reference, mine[order[depth]], strict=True)
        numbers = [classes.setdefault(key, len(classes)) for key in keys]
        sizes = Counter(numbers)
        tried = set()
        for column in options[order[depth]]:
            if column in used or first_alike[column] in tried:
                continue
            tried.add(first_alike[column])
            if len(options[order[depth]]) > 1:  # one that can only be this one is no search
                left -= 1
                if left < 0:
                    raise _BudgetSpentError
            refined = [classes.get(key, -1) for key in zip(groups, others[column], strict=True)]
            if Counter(refined) == sizes and assign(depth + 1, numbers, refined, used | {column}):
                return True
        return False

    try:
        return "match" if assign(0, tied, tied, frozenset()) else "mismatch"
    except _BudgetSpentError:
        return "compare_budget"


def _shape(column: Row) -> int:
    """Equal for columns with the same multiset of values; a chance collision costs the search a node, no more."""
    return hash(frozenset(Counter(column).items()))
