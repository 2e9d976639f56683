import asyncio
import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from msgspec.structs import replace

from fastdistill.core.types import Cut, Sample
from fastdistill.data.parse import (
    LONGEST,
    CleanSqlOutput,
    _plain,
    _statement_end,
    _statements,
    clean_sql,
)
from tests.context import TestContext, candidate

# --- laws ---

# Texts made of what answers are made of, so that every rule meets every other.
PIECES = """SELECT¦select¦FROM t¦WHERE a = 'x;y'¦'¦"¦`¦```¦```sql¦;¦--¦/*¦*/¦<think>¦</think>¦(¦)¦WITH x AS (¦SQL:
¦Answer:¦**¦Here is the query¦This query returns¦In this case we¦it's¦INSERT INTO t VALUES (1)¦CREATE TABLE t (a)¦é
¦查询。¦.¦,¦<sql>¦</sql>¦<|im_end|>¦[a b]¦[/SQL]¦EXPLAIN SELECT 1¦a¦1. First¦Note:¦# Title¦ ¦  ¦\n¦\n\n"""
ANSWERS = st.lists(st.one_of(st.sampled_from(PIECES.split("¦")), st.text(max_size=3)), max_size=25).map("".join)


def letters(text: str) -> str:
    return "".join(text.split())


@given(ANSWERS)
@example("SELECT 1</think>SELECT 2")
@example("'SELECT 'a''")
def test_cleaning_a_clean_answer_changes_nothing(text: str) -> None:
    answer, _ = clean_sql(text)
    assert clean_sql(answer) == (answer, ())


@given(ANSWERS)
def test_every_character_is_in_the_answer_or_in_a_cut_in_order(text: str) -> None:
    answer, cuts = clean_sql(text)
    assert answer in text
    pieces = [cut.text for cut in cuts]
    assert all(piece.strip() == piece != "" for piece in pieces)
    around = [(pieces[:n], pieces[n:]) for n in range(len(pieces) + 1)]
    assert any(letters("".join([*before, answer, *after])) == letters(text) for before, after in around)


@given(ANSWERS)
@example("'a")
@example("a -- b")
@example("a /* b")
@example('"a')
def test_a_semicolon_goes_only_where_it_is_no_part_of_the_query(text: str) -> None:
    query = f"SELECT {text};"
    if _plain(query) is not None:
        assert _statement_end(query, 0) == len(query) - 1


LINES = ["", "FROM t", "WHERE a = 'x'", "for all", "This query", "1. First", "'b'", "and b > 2", "<think>", "Note: x"]


@given(st.lists(st.sampled_from(LINES + PIECES.split("¦")), max_size=6), st.sampled_from([" ", "\n", ""]))
@example(["FROM a", "/* a"], "\n")
def test_what_is_taken_for_plain_at_once_has_nothing_to_cut(rest: list[str], joint: str) -> None:
    text = joint.join(["SELECT a", *rest]).strip()
    assert _plain(text) != text or _statements(text) is None


NAMES = st.sampled_from(
    ['"SELECT; x"', "a", "t1", "`b c`", "[order by]", "singer", "查询", "the", "note", "sql", "answer"]
)
LITERALS = st.one_of(
    st.integers(0, 99).map(str),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=12).map(
        lambda text: "'" + text.replace("'", "''") + "'"
    ),
    st.sampled_from(["'```sql'", "'; SELECT 2'", "'</think>'", "'\n\nThis query returns it'", "NULL"]),
)
SPACES = st.sampled_from([" ", "\n", "\n\n", " /* ; ``` This query is */ ", " -- it's; the end\n", "\t"])

MARKS = re.compile("```|</think>")


@st.composite
def queries(draw: st.DrawFn, marks: bool = True) -> str:
    """Queries that SQLite can parse, over tables and columns that need not exist, spaced in any way."""
    literals, gaps = (each.filter(lambda text: marks or not MARKS.search(text)) for each in (LITERALS, SPACES))
    columns = draw(st.lists(st.one_of(NAMES, literals), min_size=1, max_size=3))
    tokens = ["SELECT", *draw(st.sampled_from([[], ["DISTINCT"]]))]
    for number, column in enumerate(columns):
        alias = draw(st.sampled_from([[], ["AS", "y"], ["z"]]))
        tokens += [*([","] if number else []), column, *alias]
    tokens += ["FROM", draw(NAMES), *draw(st.sampled_from([[], ["AS", "t9"], ["t9"], ["JOIN", "u", "ON", "1"]]))]
    if draw(st.booleans()):
        operator = draw(st.sampled_from(["=", "<", "LIKE", "IS", "*", "IN (", "NOT IN ("]))
        tokens += ["WHERE", draw(NAMES), operator, draw(literals), *([")"] if "(" in operator else [])]
    if draw(st.booleans()):
        tokens += ["ORDER", "BY", draw(NAMES), draw(st.sampled_from(["ASC", "desc"])), "LIMIT", "1"]
    if draw(st.booleans()):
        tokens = ["WITH", "c", "AS", "(", *tokens, ")", "SELECT", "*", "FROM", "c"]
    if draw(st.booleans()):
        tokens += ["UNION", "ALL", *tokens] if "ORDER" not in tokens and "WITH" not in tokens else []
    spaces = draw(st.lists(gaps, min_size=len(tokens), max_size=len(tokens)))
    return "".join(token + space for token, space in zip(tokens, spaces, strict=True)).strip()


def parses(sql: str) -> bool:
    try:
        with closing(sqlite3.connect(":memory:")) as database:
            database.execute(f"EXPLAIN {sql}")
    except sqlite3.OperationalError as error:
        return "syntax error" not in str(error)
    return True


@given(queries())
def test_a_plain_query_is_left_as_it_is(sql: str) -> None:
    assert clean_sql(sql) == (sql, ())


@given(queries(), st.sampled_from(["", " ", "\n"]))
def test_only_the_final_semicolon_goes(sql: str, space: str) -> None:
    # A line comment at the end would swallow the semicolon.
    query = sql if "--" not in sql.rsplit("\n", 1)[-1] else sql + "\n"
    assert clean_sql(f"{query}{space};{space}") == (sql, (Cut("semicolon", ";"),))


# Behind an introduction, marks in a literal or a comment are taken for what they look like.
@given(queries(marks=False))
def test_a_query_comes_out_of_its_wrapping(sql: str) -> None:
    if sql.endswith(("'", "`")) or "--" in sql.rsplit("\n", 1)[-1]:
        sql = f"SELECT * FROM ({sql}\n)"
    for wrapped in (
        f"<think>Let me SELECT it's</think>\n{sql}",
        f"Here is the query:\n{sql};\n\nThis query returns what you asked for; it's right.",
        f"SQL: {sql}",
        f"**Answer:** {sql}",
        f"{sql}; SELECT 2; DROP TABLE t",
    ):
        assert clean_sql(wrapped)[0] == sql


# --- cases ---


@pytest.mark.parametrize(
    ("text", "answer", "kinds"),
    [
        ("", "", []),
        ("I can't answer that.", "I can't answer that.", []),
        ("<think>never closed SELECT 1", "", ["thinking"]),
        ("so I SELECT it\n</think>\n\nSELECT 1", "SELECT 1", ["thinking"]),
        ("SELECT draft</think>SELECT 1", "SELECT 1", ["thinking"]),
        ("```sql\nSELECT 1;\n```", "SELECT 1", ["fence", "semicolon", "fence"]),
        ("```SELECT 1```", "SELECT 1", ["fence", "fence"]),
        ("```\nSELECT\n1\n```", "SELECT\n1", ["fence", "fence"]),
        ("SELECT 1\n```", "SELECT 1", ["markup"]),
        ("```sql\nSELECT 1", "SELECT 1", ["fence"]),
        (
            "First:\n```python\nx = 1\n```\nthen\n```sql\nselect 1\n```\nor\n```sql\nselect 2\n```",
            "select 1",
            ["prose", "fence", "fence", "prose"],
        ),
        ("SQL: SELECT 1", "SELECT 1", ["prefix"]),
        ("sql\nSELECT 1", "SELECT 1", ["prefix"]),
        ("Here is the query:\n\nselect 1", "select 1", ["prefix"]),
        (
            "Sure.\nYou can select it so:\nwith x as (select 1) select * from x",
            "with x as (select 1) select * from x",
            ["prose"],
        ),
        ("这是查询：SELECT a FROM t\n这个查询返回 a。", "SELECT a FROM t", ["prefix", "prose"]),
        ("SELECT 1; SELECT 2;", "SELECT 1", ["semicolon", "statement"]),
        (
            "CREATE TABLE t (a); SELECT a FROM t; DROP TABLE t",
            "SELECT a FROM t",
            ["statement", "semicolon", "statement"],
        ),
        ("INSERT INTO t VALUES (1); DELETE FROM t", "INSERT INTO t VALUES (1)", ["semicolon", "statement"]),
        ("SELECT 'a;b' -- c;\nFROM t; ok", "SELECT 'a;b' -- c;\nFROM t", ["semicolon", "prose"]),
        ("SELECT a FROM t\n\nThis is what it's for", "SELECT a FROM t", ["prose"]),
        ("SELECT a FROM t\nExplanation: all of them", "SELECT a FROM t", ["prose"]),
        ("SELECT a FROM t\n\nIn this query we take a", "SELECT a FROM t", ["prose"]),
        ("SELECT a FROM t\n\n**Why**\n- x", "SELECT a FROM t", ["prose"]),
        ("SELECT a FROM t" + "\n**" * 20_000, "SELECT a FROM t", ["markup"]),  # a model that has lost its way
        ("SELECT a FROM t\n1. First, a", "SELECT a FROM t", ["prose"]),
        ("SELECT a FROM t\n\nQuestion: b?\nSQL: SELECT b FROM t;", "SELECT a FROM t", ["prose"]),
        ("<sql>SELECT 1</sql>", "SELECT 1", ["prefix", "markup"]),
        ("SELECT 1<|im_end|>", "SELECT 1", ["markup"]),
        ("`SELECT 1`", "SELECT 1", ["quote", "quote"]),
        ('"SELECT 1;"', "SELECT 1", ["quote", "semicolon", "quote"]),
        ("'SELECT a FROM t WHERE b = 'x''", "SELECT a FROM t WHERE b = 'x'", ["quote", "quote"]),
        ("'SELECT a FROM t WHERE b = 'x'", "SELECT a FROM t WHERE b = 'x'", ["quote"]),
        ("It is `SELECT `a` FROM t`, which uses `a`.", "SELECT `a` FROM t", ["prefix", "quote", "quote", "prose"]),
        ("The answer is SELECT a FROM t.", "SELECT a FROM t", ["prefix", "markup"]),
        ("(SELECT 1) UNION SELECT 2", "(SELECT 1) UNION SELECT 2", []),
        ("Answer: (SELECT 1) UNION SELECT 2", "(SELECT 1) UNION SELECT 2", ["prefix"]),
        ("-- get it\nSELECT 1 /* ok */", "-- get it\nSELECT 1 /* ok */", []),
        ("SELECT 1.", "SELECT 1.", []),
        ("SELECT a *\nb c FROM t", "SELECT a *\nb c FROM t", []),
        ("WITH /* x */ a AS (SELECT 1) SELECT * FROM a", "WITH /* x */ a AS (SELECT 1) SELECT * FROM a", []),
    ],
)
def test_what_is_kept_and_what_is_cut(text: str, answer: str, kinds: list[str]) -> None:
    kept, cuts = clean_sql(text)
    assert (kept, [cut.kind for cut in cuts]) == (answer, kinds)


@pytest.mark.parametrize(
    "piece",
    ["SELECT ", "'", "`", "(", "<think></think>", "CREATE TABLE t;", "```", "--\n", "/*", "a\n", ": (", "WITH a("],
)
def test_no_answer_takes_long(piece: str) -> None:
    clean_sql("SELECT a\n" + piece * (LONGEST // len(piece) - 20))
    clean_sql(piece * (LONGEST // len(piece)))


def test_an_answer_beyond_any_query_is_left_for_the_length_rule() -> None:
    text = " " + "SELECT 1;" * LONGEST
    assert clean_sql(text) == (text, ())


def test_the_step_cleans_each_candidate_and_again_when_more_have_come(tmp_path: Path) -> None:
    ctx = TestContext(tmp_path)
    first = Sample(0, "t.jsonl:1", {}, candidates=(candidate("SQL: SELECT 1;"),))
    once = asyncio.run(CleanSqlOutput().run(first, ctx))
    assert once.candidates[0].answer == "SELECT 1"
    assert once.candidates[0].cuts == (Cut("prefix", "SQL:"), Cut("semicolon", ";"))
    assert once.candidates[0].completion.text == "SQL: SELECT 1;"

    more = replace(once, candidates=(*once.candidates, candidate("`SELECT 2`", attempt=1)))
    twice = asyncio.run(CleanSqlOutput().run(more, ctx))
    assert twice.candidates[0] == once.candidates[0]
    assert twice.candidates[1].answer == "SELECT 2"
    ctx.close()


def test_the_queries_of_these_tests_are_sql() -> None:
    @given(queries())
    def check(sql: str) -> None:
        assert parses(sql)

    check()
