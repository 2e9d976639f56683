"""Mutants: each is another program or query, each is one, and the same ones every time."""

import ast
import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing

import pytest
import sqlglot

from fastdistill.data.answer_math import Equality, compare, extract
from fastdistill.data.mutate_math import mutate_math
from fastdistill.data.mutate_python import mutate_python
from fastdistill.data.mutate_sql import mutate_sql

COLUMNS: Mapping[str, Sequence[str]] = {"city": ("id", "name", "people"), "land": ("id", "name")}


def sql(query: str, operator: str) -> list[str]:
    return [mutation.apply() for mutation in mutate_sql(query, COLUMNS) if mutation.operator == operator]


def python(code: str, operator: str, setup: str = "") -> list[str]:
    return [mutation.apply() for mutation in mutate_python(code, setup) if mutation.operator == operator]


@pytest.mark.parametrize(
    ("operator", "query", "mutants"),
    [
        ("comparison", "SELECT id FROM city WHERE id > 1", ["id >= 1", "id < 1"]),
        ("column", "SELECT city.id FROM city", ["SELECT city.name FROM city"]),
        ("aggregate", "SELECT MAX(id) FROM city", ["SELECT MIN(id) FROM city"]),
        ("condition", "SELECT id FROM city WHERE id = 1 AND name = 'x'", ["WHERE id = 1", "WHERE name = 'x'"]),
        ("condition", "SELECT id FROM city WHERE id = 1", ["SELECT id FROM city"]),
        ("connective", "SELECT id FROM city WHERE id = 1 AND name = 'x'", ["WHERE (id = 1 OR name = 'x')"]),
        ("negation", "SELECT id FROM city WHERE name LIKE 'x%'", ["WHERE NOT (name LIKE 'x%')"]),
        ("negation", "SELECT id FROM city WHERE NOT id IN (1)", ["WHERE id IN (1)"]),
        ("distinct", "SELECT DISTINCT id FROM city", ["SELECT id FROM city"]),
        ("distinct", "SELECT COUNT(DISTINCT name) FROM city", ["SELECT COUNT(name) FROM city"]),
        ("limit", "SELECT id FROM city LIMIT 3", ["SELECT id FROM city", "LIMIT 3 + 1"]),
        ("order", "SELECT id FROM city ORDER BY id DESC", ["SELECT id FROM city", "ORDER BY id"]),
        ("order", "SELECT id FROM city ORDER BY id", ["SELECT id FROM city", "ORDER BY id DESC"]),
        ("group", "SELECT COUNT(*) FROM city GROUP BY name", ["SELECT COUNT(*) FROM city"]),
        ("join", "SELECT c.id FROM city c JOIN land l ON c.id = l.id", ["LEFT JOIN land AS l ON c.id = l.id"]),
        ("constant", "SELECT id FROM city WHERE people = 7", ["people = 7 + 1"]),
        ("constant", "SELECT id FROM city WHERE name = 'x'", ["name = 'xx'"]),
        ("constant", 'SELECT id FROM city WHERE name = "x"', ['name = "xx"']),
        ("set_operation", "SELECT id FROM city UNION SELECT id FROM land", ["id FROM city INTERSECT SELECT id"]),
        ("set_operation", "SELECT id FROM city UNION ALL SELECT id FROM land", ["id FROM city INTERSECT SELECT id"]),
        ("arithmetic", "SELECT id + 1 FROM city", ["SELECT id - 1 FROM city"]),
    ],
)
def test_each_operator_breaks_sql_in_its_way(operator: str, query: str, mutants: list[str]) -> None:
    found = sql(query, operator)
    assert len(found) == len(mutants)
    assert all(end in text for end, text in zip(mutants, found, strict=True)), found


def test_every_mutant_of_a_query_is_another_query_that_runs() -> None:
    query = (
        "SELECT DISTINCT c.name, COUNT(l.id) FROM city AS c LEFT JOIN land AS l ON c.id = l.id WHERE (c.people > 5 OR"
        " c.name LIKE 'a%') AND NOT c.id IN (SELECT id FROM land WHERE name = 'x') GROUP BY c.name"
        " HAVING COUNT(*) >= 1 ORDER BY c.name DESC LIMIT 3"
    )
    mutants = [mutation.apply() for mutation in mutate_sql(query, COLUMNS)]
    assert len(mutants) == len(set(mutants)) > 30
    assert sqlglot.parse_one(query, dialect="sqlite").sql(dialect="sqlite") not in mutants
    assert mutants == [mutation.apply() for mutation in mutate_sql(query, COLUMNS)]
    with closing(sqlite3.connect(":memory:")) as database:
        for table, columns in COLUMNS.items():
            database.execute(f"CREATE TABLE {table} ({', '.join(columns)})")
        for mutant in mutants:
            database.execute(mutant)


@pytest.mark.parametrize("query", ["SELEC 1", "", "(" * 5000, "SELECT '" + "x" * 20_000])
def test_what_is_no_query_has_no_mutants(query: str) -> None:
    assert mutate_sql(query, {}) == []


@pytest.mark.parametrize(
    ("operator", "code", "mutants"),
    [
        ("comparison", "def f(a):\n    return a < 1", ["(a <= 1)"]),
        ("arithmetic", "def f(a):\n    a += 2\n    return a * 3", ["a -= 2\n", "return (a + 3)"]),
        ("arithmetic", "def f(a):\n    return -a", ["return (a)"]),
        ("connective", "def f(a):\n    return a and f", ["(a or f)"]),
        ("condition", "def f(a):\n    if a:\n        return 1\n    return 2", ["if (not a):"]),
        ("off_by_one", "def f(a):\n    return a[0]", ["a[(0 - 1)]", "a[(0 + 1)]"]),
        ("off_by_one", "def f(a):\n    return range(len(a))", ["range((len(a) - 1))", "range((len(a) + 1))"]),
        ("off_by_one", "def f(a, n):\n    return a[:n]", ["a[:(n - 1)]", "a[:(n + 1)]"]),
        ("constant", "def f():\n    return [True, 2, 'é']", ["[False, 2, 'é']", "[True, (2 + 1), 'é']", "2, 'éx']"]),
        ("return", "def f(a):\n    return a", ["    return None"]),
        ("statement", "def f(a):\n    a = a.x\n    return a", ["    pass\n    return a"]),
    ],
)
def test_each_operator_breaks_python_in_its_way(operator: str, code: str, mutants: list[str]) -> None:
    found = python(code, operator)
    assert len(found) == len(mutants)
    assert all(part in text for part, text in zip(mutants, found, strict=True)), found
    for text in found:
        ast.parse(text)


def test_a_program_that_continues_a_prompt_is_broken_where_it_is() -> None:
    prompt = 'def f(a):\n    """Größe: adds 1 + 1."""'
    assert python("    return a + 1\n", "arithmetic", prompt) == ["    return (a - 1)\n"]
    assert python("    return a + 1\n", "constant", prompt) == ["    return a + (1 + 1)\n"]
    assert python("    return f'{a + 1}'\n", "arithmetic", prompt) == [], "an f-string is left alone"


def test_every_mutant_of_a_program_is_a_program() -> None:
    code = "def f(a):\n    match a:\n        case 1 | {'b': -2}:\n            return a[3]\n    return 4\n"
    mutants = [mutation.apply() for mutation in mutate_python(code)]
    assert len(mutants) == len(set(mutants)) == 5
    for mutant in mutants:
        ast.parse(mutant)


@pytest.mark.parametrize("code", ["def f(:", "    return 1", "\0", "(" * 5000])
def test_what_is_no_program_has_no_mutants(code: str) -> None:
    assert mutate_python(code) == []


@pytest.mark.parametrize(
    ("answer", "mutants"),
    [
        ("72", ["71", "73", "-72", "720", "36", "27"]),
        ("-3.50", ["-4.50", "-2.50", "3.50", "-35.00", "-1.75", "-3.05"]),
        ("$1,200", ["$1199", "$1201", "$-1200", "$12000", "$600", "$1020"]),
        ("0", ["-1", "1"]),
        ("11%", ["10%", "12%", "-11%", "110%", "5.5%"]),
    ],
)
def test_another_number_is_certainly_wrong(answer: str, mutants: list[str]) -> None:
    found = mutate_math(answer)
    assert [mutation.apply() for mutation in found] == [rf"\boxed{{{text}}}" for text in mutants]
    assert not any(mutation.may_be_equal for mutation in found)
    for mutation in found:
        read = extract(mutation.apply())
        assert read and compare(answer, read.answers[0], lambda gold, number: gold == number) is Equality.DIFFERENT


@pytest.mark.parametrize("answer", ["0/5", r"\pm 3", "(1, 2)", r"\frac{1}{2}", "3 cm^2"])
def test_what_is_more_than_a_number_may_mean_the_same_with_another_last_one(answer: str) -> None:
    assert {mutation.may_be_equal for mutation in mutate_math(answer)} == {True}


def test_an_answer_without_a_number_has_no_mutants() -> None:
    assert mutate_math("B") == mutate_math(r"\pi") == []
