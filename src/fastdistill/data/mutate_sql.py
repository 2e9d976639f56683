"""Breaks a right SQL query on its syntax tree, one place at a time. Runs nothing, and knows no database's content."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias

from fastdistill.core.step import Mutation
from fastdistill.data.rules import LONGEST_SQL

if TYPE_CHECKING:
    from sqlglot.expressions import Expr

_Edit: TypeAlias = "Callable[[Expr], Expr | None]"
"""What stands in a node's place; None: it was changed where it stands."""

_COMPARISON = {"EQ": ("NEQ",), "NEQ": ("EQ",), "GT": ("GTE", "LT"), "GTE": ("GT", "LTE"), "LT": ("LTE", "GT")}
_COMPARISON |= {"LTE": ("LT", "GTE")}
_SWAPPED: Mapping[str, Mapping[str, Sequence[str]]] = {
    "comparison": _COMPARISON,
    "arithmetic": {"Add": ("Sub",), "Sub": ("Add",), "Mul": ("Add",), "Div": ("Mul",)},
    "aggregate": {"Sum": ("Avg",), "Avg": ("Sum",), "Min": ("Max",), "Max": ("Min",)},
    "connective": {"And": ("Or",), "Or": ("And",)},
    "set_operation": {"Union": ("Intersect",), "Intersect": ("Except",), "Except": ("Union",)},
}


def mutate_sql(sql: str, columns: Mapping[str, Sequence[str]]) -> list[Mutation]:
    """Every mutation of a query; none where it can't be parsed.

    Operators: comparison, arithmetic, aggregate, connective, set_operation, condition (one is dropped), negation,
    distinct, limit, order, group, join, constant, column.

    Args:
        columns: the columns of each table of the database, for queries that take another one. Names in lower case.
    """
    import sqlglot
    from sqlglot.errors import SqlglotError
    from sqlglot.expressions import Table

    try:
        tree = sqlglot.parse_one(sql[: LONGEST_SQL + 1], dialect="sqlite")
    except (SqlglotError, RecursionError):
        return []
    named = {table.alias_or_name.lower(): columns.get(table.name.lower(), ()) for table in tree.find_all(Table)}
    return [
        Mutation(operator, partial(_applied, tree, at, edit))
        for at, node in enumerate(tree.walk())
        for operator, edit in _edits(node, named)
    ]


def _applied(tree: "Expr", at: int, edit: _Edit) -> str:
    copy = tree.copy()
    node = next(islice(copy.walk(), at, None))
    new = edit(node)
    if new is not None and node is copy:
        copy = new
    elif new is not None:
        node.replace(new)
    return str(copy.sql(dialect="sqlite"))


def _edits(node: "Expr", columns: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, _Edit]]:
    from sqlglot import expressions as exp

    kind = type(node).__name__
    for operator, swaps in _SWAPPED.items():
        for other in swaps.get(kind, ()):
            yield operator, partial(_swap, other)
    match node:
        case exp.Count() if isinstance(node.this, exp.Distinct):
            yield "distinct", lambda n: exp.Count(this=n.this.expressions[0].copy())
        case exp.Count() if not isinstance(node.this, exp.Star):
            yield "aggregate", lambda n: exp.Max(this=n.this.copy())
        case exp.And():
            yield "condition", lambda n: n.this.copy()
            yield "condition", lambda n: n.expression.copy()
        case exp.Where() | exp.Having() if not isinstance(node.this, exp.And):
            yield "condition", _drop
        case exp.Not():
            yield "negation", lambda n: n.this.copy()
        case exp.In() | exp.Like() | exp.Between() | exp.Is() | exp.Exists() if not isinstance(node.parent, exp.Not):
            yield "negation", lambda n: exp.Not(this=exp.paren(n.copy(), copy=False))
        case exp.Select() if node.args.get("distinct"):
            yield "distinct", lambda n: n.set("distinct", None)
        case exp.Select() if not any(isinstance(e.unalias(), exp.AggFunc) for e in node.expressions):
            yield "distinct", lambda n: n.set("distinct", exp.Distinct())
        case exp.Union():
            yield "distinct", lambda n: n.set("distinct", not n.args.get("distinct"))
        case exp.Limit():
            yield "limit", _drop
        case exp.Ordered():
            yield "order", _turn
        case exp.Order() if isinstance(node.parent, exp.Query):
            yield "order", _drop
        case exp.Group():
            yield "group", _drop
        case exp.Join() if node.args.get("on") is not None:
            yield "join", lambda n: n.set("side", "" if n.args.get("side") else "LEFT")
        case exp.Literal() if node.is_string:
            yield "constant", lambda n: exp.Literal.string(n.this + "x")
        case exp.Literal():
            operator = "limit" if isinstance(node.parent, exp.Limit | exp.Offset) else "constant"
            yield operator, lambda n: exp.Add(this=n.copy(), expression=exp.Literal.number(1))
        case exp.Column() if isinstance(node.this, exp.Identifier):
            yield from _column_edits(node, columns)


def _column_edits(node: Any, columns: Mapping[str, Sequence[str]]) -> Iterator[tuple[str, _Edit]]:
    name, table = node.name, node.table
    known = columns.get(table.lower(), ()) if table else [each for of_one in columns.values() for each in of_one]
    places = [at for at, column in enumerate(known) if column.lower() == name.lower()]
    if places and len(known) > 1:
        yield "column", lambda n: n.this.set("this", known[(places[0] + 1) % len(known)])
    elif not places and known and not table and node.this.quoted:
        # SQLite takes a name in double quotes that is no column for a string.
        yield "constant", lambda n: n.this.set("this", name + "x")


def _swap(other: str, node: Any) -> "Expr":
    from sqlglot import expressions as exp

    new = getattr(exp, other)(**node.copy().args)
    if other == "Intersect":
        new.set("distinct", True)  # SQLite has no INTERSECT ALL
    # Within another connective, `a OR b` needs the parentheses that `a AND b` did not.
    return exp.paren(new, copy=False) if isinstance(node, exp.Connector) else new


def _turn(node: Any) -> None:
    ascending = bool(node.args.get("desc"))
    node.set("desc", not ascending)
    node.set("nulls_first", ascending)  # as SQLite has them, so that nothing is said of them


def _drop(node: Any) -> None:
    node.pop()
