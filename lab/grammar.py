"""A synthetic text-to-SQL grammar: endless schemas, questions, gold queries and SQLite databases, from a seed.

It feeds the demo, the tests and the training of the embedded teacher. A fifth of the schemas (by a stable hash) are
held out from training. It is not a benchmark: its English is small, and nothing here predicts a real model's score.
"""

from __future__ import annotations

import argparse
import json
import random
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path

from lab.schemas import Column, Database, Role, Row, Split, Table, Value, plural, random_database

QUESTIONS_PER_DATABASE = 8


@dataclass(frozen=True, slots=True)
class Example:
    """One question about one database, with a query that answers it."""

    schema: str
    question: str
    gold_sql: str
    kind: str
    db_id: str
    db: Database


def examples(seed: int, split: Split) -> Iterator[Example]:
    """Endless examples: `QUESTIONS_PER_DATABASE` different questions for each schema of the split, in a row.

    Each gold query returns something on the database filled with seed 0, from which its literals are mostly taken.
    """
    rng = random.Random(f"examples:{split}:{seed}")
    while True:
        database = random_database(rng)
        if database.split == split:
            yield from _questions(database, rng)


def write_synthetic(output: Path, samples: int, seed: int, split: Split = "heldout") -> Path:
    """Write `samples` examples as `output/train.jsonl` and their databases as `output/databases/<db_id>.sqlite`.

    Lines have task_id, schema, instruction, gold_sql, kind and db_id. The same arguments give byte-identical files.
    Returns the path of train.jsonl.
    """
    folder = output / "databases"
    folder.mkdir(parents=True, exist_ok=True)
    prefix = "synthetic" if split == "heldout" else "synthetic-train"
    lines = []
    written: set[str] = set()
    for index, example in enumerate(islice(examples(seed, split), samples)):
        record = {
            "task_id": f"{prefix}-{seed}-{index:05d}",
            "schema": example.schema,
            "instruction": example.question,
            "gold_sql": example.gold_sql,
            "kind": example.kind,
            "db_id": example.db_id,
        }
        lines.append(json.dumps(record) + "\n")
        if example.db_id not in written:
            written.add(example.db_id)
            _write_database(example.db, folder / f"{example.db_id}.sqlite")
    path = output / "train.jsonl"
    partial = path.with_suffix(".partial")
    partial.write_text("".join(lines), encoding="ascii", newline="\n")
    return partial.replace(path)


def _write_database(database: Database, path: Path) -> None:
    partial = path.with_suffix(".partial")
    partial.unlink(missing_ok=True)
    with closing(sqlite3.connect(partial)) as connection:
        database.fill(connection)
    partial.replace(path)


# --- Questions ------------------------------------------------------------------------------------------------------

# What a kind of question yields: paraphrases of the question, and equivalent queries, the commonest form first.
_Asked = tuple[tuple[str, ...], tuple[str, ...]]

_COMPARISONS = {
    ">": ("more than", "greater than", "above", "over"),
    "<": ("less than", "smaller than", "below", "under"),
    ">=": ("at least", "no less than"),
    "<=": ("at most", "no more than"),
}
_OPPOSITE = {">": "<=", "<": ">=", ">=": "<", "<=": ">"}
_AGGREGATES = {
    "AVG": ("average", "mean"),
    "MAX": ("highest", "maximum", "largest"),
    "MIN": ("lowest", "minimum", "smallest"),
    "SUM": ("total", "sum of the"),
}


class _Scene:
    """The random choices behind one question: a table in focus, its rows, and ways to speak of them."""

    def __init__(self, database: Database, rows: dict[str, list[Row]], rng: random.Random) -> None:
        self.rng = rng
        self.rows = rows
        self.parent, self.child = database.tables[0], database.tables[-1]
        self.table = rng.choice(database.tables)
        self.name = self.table.name
        self.things = plural(self.table.noun)

    def column(self, *roles: Role, besides: Column | None = None, table: Table | None = None) -> Column:
        """A column that plays one of the roles. Raises IndexError if there is none: this question can't be asked."""
        found = (table or self.table).of_role(*roles)
        return self.rng.choice([column for column in found if column is not besides])

    def say(self, column: Column) -> str:
        return self.rng.choice(column.phrases)

    def ask(self, what: str) -> str:
        return f"{self.rng.choice(('Show', 'List', 'Find', 'Give me', 'Return'))} the {what}"

    def having(self) -> str:
        return self.rng.choice(("with", "that have", "having"))

    def value(self, column: Column, table: Table | None = None) -> Value:
        """A literal for the column: mostly from the rows, and then never the smallest or the largest number."""
        table = table or self.table
        if self.rng.random() < 0.05:
            return self.rng.choice(column.pool)
        index = table.columns.index(column)
        values = [row[index] for row in self.rows[table.name]]
        return self.rng.choice(sorted(values, key=_number_of)[1:-1] if column.role == "number" else values)

    def condition(self, column: Column) -> tuple[str, str]:
        """A condition on a category or a number, as English ("rating above 3") and as SQL."""
        value = self.value(column)
        if column.role == "category":
            return f"{self.say(column)} {self.rng.choice(('', 'equal to '))}{value}", f"{column.name} = '{value}'"
        operator = self.rng.choice(list(_COMPARISONS))
        said = f"{self.say(column)} {self.rng.choice(_COMPARISONS[operator])} {value}"
        if self.rng.random() < 0.1:
            return said, f"NOT {column.name} {_OPPOSITE[operator]} {value}"
        return said, f"{column.name} {operator} {value}"

    def aggregate(self, column: Column) -> tuple[str, str]:
        """An aggregate of a number, as English ("mean age") and as the SQL function's name."""
        function = self.rng.choice(list(_AGGREGATES))
        return f"{self.rng.choice(_AGGREGATES[function])} {self.say(column)}", function

    def those(self, clause: str, *conditions: str) -> _Asked:
        """What to show of the rows that a clause describes; the label most of the time."""
        others = [c for c in self.table.of_role("category", "number", "optional") if c.name not in conditions[0]]
        column = self.rng.choice(others) if others and self.rng.random() < 0.4 else self.column("label")
        said = self.say(column)
        return (
            (f"{self.ask(said)} of the {self.things} {clause}.", f"For {self.things} {clause}, show the {said}."),
            tuple(f"SELECT {column.name} FROM {self.name} WHERE {condition}" for condition in conditions),
        )


def _number_of(value: Value) -> float:
    return value if isinstance(value, int | float) else 0


def _select(s: _Scene) -> _Asked:
    columns = s.rng.sample(s.table.of_role("label", "category", "number", "optional"), s.rng.randint(1, 2))
    what = s.ask(" and ".join(s.say(column) for column in columns))
    plain = ", ".join(column.name for column in columns)
    qualified = ", ".join(f"{s.name}.{column.name}" for column in columns)
    return (
        (f"{what} of all {s.things}.", f"{what} of every {s.table.noun}."),
        (f"SELECT {plain} FROM {s.name}", f"SELECT {qualified} FROM {s.name}"),
    )


def _distinct(s: _Scene) -> _Asked:
    column = s.column("category")
    what = f"{s.rng.choice(('different', 'distinct', 'unique'))} {s.say(column)} values"
    return (
        (f"{s.ask(what)} of the {s.things}.", f"Which {what} do the {s.things} have?"),
        (f"SELECT DISTINCT {column.name} FROM {s.name}", f"SELECT {column.name} FROM {s.name} GROUP BY {column.name}"),
    )


def _count(s: _Scene) -> _Asked:
    return (
        (f"How many {s.things} are there?", f"Count the {s.things}.", f"What is the number of {s.things}?"),
        (f"SELECT COUNT(*) FROM {s.name}", f"SELECT COUNT(id) FROM {s.name}"),
    )


def _count_where(s: _Scene) -> _Asked:
    said, sql = s.condition(s.column("category", "number"))
    those = f"{s.things} {s.having()} {said}"
    return (
        (f"How many {s.things} have {said}?", f"Count the {those}.", f"What is the number of {those}?"),
        (f"SELECT COUNT(*) FROM {s.name} WHERE {sql}", f"SELECT COUNT(id) FROM {s.name} WHERE {sql}"),
    )


def _where(role: Role, s: _Scene) -> _Asked:
    said, sql = s.condition(s.column(role))
    return s.those(f"{s.having()} {said}", sql)


def _where_two(word: str, s: _Scene) -> _Asked:
    first = s.column("category", "number")
    second = s.column("category", "number", besides=first)
    (said, sql), (also_said, also_sql) = s.condition(first), s.condition(second)
    operator = word.upper()
    return s.those(
        f"{s.having()} {said} {word} {also_said}", f"{sql} {operator} {also_sql}", f"{also_sql} {operator} {sql}"
    )


def _where_in(s: _Scene) -> _Asked:
    column = s.column("category")
    one, other = s.rng.sample(column.pool, 2)
    is_in, either = f"{column.name} IN ('{one}', '{other}')", f"{column.name} = '{one}' OR {column.name} = '{other}'"
    return s.those(f"whose {s.say(column)} is {s.rng.choice(('', 'either '))}{one} or {other}", is_in, either)


def _between(s: _Scene) -> _Asked:
    column = s.column("number")
    low, high = sorted((s.value(column), s.value(column)), key=_number_of)
    pattern = s.rng.choice(("with {} between {} and {}", "whose {} is from {} to {}"))
    return s.those(
        pattern.format(s.say(column), low, high),
        f"{column.name} BETWEEN {low} AND {high}",
        f"{column.name} >= {low} AND {column.name} <= {high}",
    )


def _like(s: _Scene) -> _Asked:
    label = s.column("label")
    name = str(s.value(label))
    part, phrase, pattern = s.rng.choice((
        (name[:1], "starts with", "{}%"), (name[:2], "begins with", "{}%"),
        (name[-1:], "ends with", "%{}"), (name[1:3], "contains", "%{}%"),
    ))  # fmt: skip
    return s.those(f"whose {label.name} {phrase} '{part}'", f"{label.name} LIKE '{pattern.format(part)}'")


def _null(s: _Scene) -> _Asked:
    column = s.column("optional")
    said = s.say(column)
    if s.rng.random() < 0.5:
        clause = s.rng.choice((f"without a known {said}", f"whose {said} is missing"))
        return s.those(clause, f"{column.name} IS NULL")
    clause = s.rng.choice((f"with a known {said}", f"whose {said} is not missing"))
    return s.those(clause, f"{column.name} IS NOT NULL", f"NOT {column.name} IS NULL")


def _above_average(s: _Scene) -> _Asked:
    column = s.column("number")
    operator, word = s.rng.choice(((">", "above"), ("<", "below")))
    clause = s.rng.choice((f"with {s.say(column)} {word} the average", f"with {word} average {s.say(column)}"))
    return s.those(clause, f"{column.name} {operator} (SELECT AVG({column.name}) FROM {s.name})")


def _top(s: _Scene) -> _Asked:
    column, limit = s.column("number"), s.rng.choice((1, 1, 2, 3, 5))
    word, function, order = s.rng.choice((("highest", "MAX", "DESC"), ("lowest", "MIN", "ASC")))
    output = s.column("label") if s.rng.random() < 0.6 else s.column("category", "number", "optional")
    what = f"the {s.table.noun}" if limit == 1 else f"the {limit} {s.things}"
    said = f"{what} with the {word} {s.say(column)}"
    forms = [f"SELECT {output.name} FROM {s.name} ORDER BY {column.name} {order} LIMIT {limit}"]
    if limit == 1:
        best = f"(SELECT {function}({column.name}) FROM {s.name})"
        forms.append(f"SELECT {output.name} FROM {s.name} WHERE {column.name} = {best}")
    return (f"{s.ask(s.say(output))} of {said}.", f"For {said}, show the {s.say(output)}."), tuple(forms)


def _aggregate(s: _Scene) -> _Asked:
    column = s.column("number")
    said, function = s.aggregate(column)
    forms = [f"SELECT {function}({column.name}) FROM {s.name}"]
    if function in ("MAX", "MIN"):
        order = "DESC" if function == "MAX" else "ASC"
        forms.append(f"SELECT {column.name} FROM {s.name} ORDER BY {column.name} {order} LIMIT 1")
    return (f"What is the {said} of all {s.things}?", f"Find the {said} of the {s.things}."), tuple(forms)


def _aggregate_where(s: _Scene) -> _Asked:
    column = s.column("number")
    said, function = s.aggregate(column)
    condition, sql = s.condition(s.column("category", "number", besides=column))
    those = f"{s.things} {s.having()} {condition}"
    return (
        (f"What is the {said} of the {those}?", f"For {those}, what is the {said}?"),
        (f"SELECT {function}({column.name}) FROM {s.name} WHERE {sql}",),
    )


def _group_count(s: _Scene) -> _Asked:
    group, said = s.column("category"), s.rng.choice(("COUNT(*)", "COUNT(id)"))
    return (
        (f"How many {s.things} are there for each {s.say(group)}?",
         f"For each {s.say(group)}, show the {group.name} and the number of {s.things}."),
        (f"SELECT {group.name}, {said} FROM {s.name} GROUP BY {group.name}",),
    )  # fmt: skip


def _group_aggregate(s: _Scene) -> _Asked:
    group, column = s.column("category"), s.column("number")
    said, function = s.aggregate(column)
    rest = f"FROM {s.name} GROUP BY {group.name}"
    return (
        (f"What is the {said} of the {s.things} for each {s.say(group)}?",
         f"For each {s.say(group)}, show the {group.name} and the {said} of the {s.things}."),
        (f"SELECT {group.name}, {function}({column.name}) {rest}",
         f"SELECT {group.name}, {function}({column.name}) AS value {rest}"),
    )  # fmt: skip


def _having(s: _Scene) -> _Asked:
    group, bound = s.column("category"), s.rng.randint(2, 5)
    operator, word = s.rng.choice(((">", "more than"), (">=", "at least"), ("<", "fewer than")))
    select = f"SELECT {group.name} FROM {s.name} GROUP BY {group.name} HAVING"
    return (
        (f"Which {s.say(group)} values have {word} {bound} {s.things}?",
         f"{s.ask(f'{s.say(group)} values')} shared by {word} {bound} {s.things}."),
        (f"{select} COUNT(*) {operator} {bound}", f"{select} COUNT(id) {operator} {bound}"),
    )  # fmt: skip


def _join_where(s: _Scene) -> _Asked:
    parent, child, link = s.parent, s.child, s.column("link", table=s.child)
    column = s.column("label", "category", table=parent)
    output, value = s.column("label", "category", "number", table=child), s.value(column, parent)
    things, said = plural(child.noun), f"{s.say(column)} {value}"
    joined = f"FROM {child.name} JOIN {parent.name} ON {child.name}.{link.name} = {parent.name}.id"
    inner = f"(SELECT id FROM {parent.name} WHERE {column.name} = '{value}')"
    return (
        (f"{s.ask(s.say(output))} of the {things} whose {parent.noun} has {said}.",
         f"For {things} of {plural(parent.noun)} with {said}, show the {s.say(output)}."),
        (f"SELECT {child.name}.{output.name} {joined} WHERE {parent.name}.{column.name} = '{value}'",
         f"SELECT {output.name} FROM {child.name} WHERE {link.name} IN {inner}"),
    )  # fmt: skip


def _join_count(s: _Scene) -> _Asked:
    parent, child, link = s.parent, s.child, s.column("link", table=s.child)
    things, name = plural(child.noun), f"{parent.name}.{s.column('label', table=parent).name}"
    on = f"ON {child.name}.{link.name} = {parent.name}.id"
    return (
        (f"How many {things} does each {parent.noun} have?",
         f"For each {parent.noun}, show the {name.split('.')[1]} and the number of its {things}."),
        (f"SELECT {name}, COUNT(*) FROM {parent.name} JOIN {child.name} {on} GROUP BY {parent.name}.id",
         f"SELECT {name}, COUNT(*) FROM {child.name} JOIN {parent.name} {on} GROUP BY {name}"),
    )  # fmt: skip


# The kinds and how often they come up: those with more to learn, more often.
_KINDS: dict[str, tuple[Callable[[_Scene], _Asked], int]] = {
    "select": (_select, 3), "distinct": (_distinct, 2), "count": (_count, 1), "count_where": (_count_where, 4),
    "where_text": (partial(_where, "category"), 4), "where_number": (partial(_where, "number"), 4),
    "where_and": (partial(_where_two, "and"), 6), "where_or": (partial(_where_two, "or"), 6),
    "where_in": (_where_in, 4), "between": (_between, 4), "like": (_like, 4), "null": (_null, 5),
    "above_average": (_above_average, 3), "top": (_top, 5), "aggregate": (_aggregate, 3),
    "aggregate_where": (_aggregate_where, 5), "group_count": (_group_count, 3),
    "group_aggregate": (_group_aggregate, 4), "having": (_having, 3), "join_where": (_join_where, 10),
    "join_count": (_join_count, 6),
}  # fmt: skip
KINDS = tuple(_KINDS)


def _questions(database: Database, rng: random.Random) -> Iterator[Example]:
    schema, db_id, rows = database.schema, database.db_id, database.rows()
    kinds, weights = list(_KINDS), [weight for _, weight in _KINDS.values()]
    asked: set[str] = set()
    with closing(sqlite3.connect(":memory:")) as connection:
        database.fill(connection)
        while len(asked) < QUESTIONS_PER_DATABASE:
            kind = rng.choices(kinds, weights)[0]
            try:
                questions, forms = _KINDS[kind][0](_Scene(database, rows, rng))
            except IndexError:  # the schema has no column for this kind of question
                continue
            question = rng.choice(questions)
            sql = forms[0] if rng.random() < 0.6 else rng.choice(forms)
            sql += ";" if rng.random() < 0.2 else ""
            if question not in asked and _returns_something(connection, sql):
                asked.add(question)
                yield Example(schema, question, sql, kind, db_id, database)


def _returns_something(connection: sqlite3.Connection, sql: str) -> bool:
    rows = connection.execute(sql).fetchall()
    return rows not in ([], [(0,)], [(None,)])


def main() -> None:
    parser = argparse.ArgumentParser(description="Write questions of the grammar with their databases.")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=13)
    parser.add_argument("--split", choices=["train", "heldout"], default="heldout")
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and databases/")
    arguments = parser.parse_args()
    path = write_synthetic(arguments.output, arguments.samples, arguments.seed, arguments.split)
    print(f"{arguments.samples} questions in {path}")


if __name__ == "__main__":
    main()
