"""The definition `sql-eq/1` as laws and as cases; no database runs here."""

import random
from collections.abc import Sequence

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastdistill.data.execution.sql_equality import (
    Cell,
    Columns,
    Relation,
    Row,
    break_ties,
    clause,
    compare,
    signature,
    tie_cuts,
    tokenize,
)

law = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # a busy machine is no counterexample

CELLS: st.SearchStrategy[Cell] = st.one_of(
    st.none(),
    st.integers(-3, 3),
    st.integers(-(2**63), 2**63 - 1),
    st.sampled_from([0.1 + 0.2, 0.3, -0.0, 0.0, 2.0, float("inf"), float("-inf"), 2.0**53]),
    st.floats(allow_nan=False),
    st.text(max_size=3),
    st.binary(max_size=2),
)


@st.composite
def relations(draw: st.DrawFn, *, min_rows: int = 0) -> Relation:
    width = draw(st.integers(1, 4))
    rows = draw(st.lists(st.tuples(*[CELLS] * width), min_size=min_rows, max_size=6))
    return Relation(width, tuple(rows))


def relation(*rows: Row) -> Relation:
    return Relation(len(rows[0]), rows)


def column(*cells: Cell) -> Relation:
    return Relation(1, tuple((cell,) for cell in cells))


def permuted(table: Relation, order: Sequence[int]) -> Relation:
    return Relation(table.width, tuple(tuple(row[i] for i in order) for row in table.rows))


def equal(left: Relation, right: Relation, cuts: Sequence[int] | None = None, columns: Columns = "any") -> bool:
    return compare(left, right, cuts=cuts, columns=columns) == "match"


@law
@given(relations())
def test_a_result_equals_itself(table: Relation) -> None:
    copy = Relation(table.width, tuple(tuple(row) for row in table.rows))
    assert equal(table, copy)
    assert equal(table, copy, cuts=range(1, len(table.rows) + 1))


@law
@given(relations(), relations(), st.sampled_from(["any", "strict"]))
def test_equality_is_symmetric(left: Relation, right: Relation, columns: Columns) -> None:
    assert compare(left, right, columns=columns) == compare(right, left, columns=columns)


@law
@given(relations(), st.randoms(use_true_random=False))
def test_rows_may_come_in_any_order(table: Relation, rng: random.Random) -> None:
    rows = list(table.rows)
    rng.shuffle(rows)
    shuffled = Relation(table.width, tuple(rows))
    assert equal(table, shuffled, columns="strict")
    assert signature(table) == signature(shuffled)


@law
@given(relations(min_rows=1), st.randoms(use_true_random=False))
def test_columns_may_come_in_any_order(table: Relation, rng: random.Random) -> None:
    order = list(range(table.width))
    rng.shuffle(order)
    rows = list(permuted(table, order).rows)
    assert equal(table, Relation(table.width, tuple(rows)), cuts=range(1, len(rows) + 1))
    rng.shuffle(rows)
    assert equal(table, Relation(table.width, tuple(rows)))


@law
@given(relations(min_rows=1), st.data())
def test_one_other_cell_is_another_result(table: Relation, data: st.DataObject) -> None:
    rows = [list(row) for row in table.rows]
    row = data.draw(st.integers(0, len(rows) - 1))
    rows[row][data.draw(st.integers(0, table.width - 1))] = "a text longer than any drawn"
    assert not equal(table, Relation(table.width, tuple(map(tuple, rows))))


@law
@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6), st.randoms(use_true_random=False))
def test_floats_are_equal_within_the_tolerance(values: list[float], rng: random.Random) -> None:
    near = [value * (1 + rng.uniform(-4e-10, 4e-10)) for value in values]
    rng.shuffle(near)
    assert equal(column(*values), column(*near))


@law
@given(st.lists(st.tuples(st.integers(0, 3), st.text(max_size=2)), min_size=1, max_size=8), st.data())
def test_a_sequence_is_equal_modulo_ties(rows: list[tuple[int, str]], data: st.DataObject) -> None:
    """Rows sorted by their first column alone: any order within a group is right, any across groups is not."""
    ascending = relation(*sorted(rows))
    descending = relation(*sorted(sorted(rows, reverse=True), key=lambda row: row[0]))
    cuts = tie_cuts(ascending, descending)
    assert cuts is not None
    answer = sorted(data.draw(st.permutations(rows)), key=lambda row: row[0])
    assert equal(ascending, relation(*answer), cuts, columns="strict")
    if rows[0][0] != rows[-1][0]:
        assert not equal(ascending, relation(*sorted(rows, reverse=True)), cuts, columns="strict")


@pytest.mark.parametrize(
    ("left", "right", "same"),
    [
        (2, 2.0, True),
        (0, -0.0, True),
        (float("inf"), float("inf"), True),
        (float("inf"), 1.7e308, False),
        (0.3, 0.1 + 0.2, True),
        (0.0, 1e-13, True),
        (0.0, 1e-9, False),
        (2 / 3, 0.67, False),
        (2**53, 2.0**53, True),
        (2**53 + 1, 2.0**53, False),
        (2**63 - 1, 2**63 - 2, False),
        (3, 3.0000000000000004, False),  # an integer is never compared through a float
        (1, "1", False),
        ("ann", b"ann", False),
        ("ann", "ann ", False),
        ("dan", "Dan", False),
        ("é", "e\u0301", False),
        (None, "", False),
        (None, "None", False),
        (None, 0, False),
        (None, None, True),
    ],
)
def test_cells(left: Cell, right: Cell, same: bool) -> None:
    assert equal(column(left), column(right)) is same
    assert equal(column(right), column(left)) is same


def test_a_snapped_float_still_equals_its_integer() -> None:
    assert equal(column(2.9999999999, 3.0), column(2.9999999999, 3))


def test_close_floats_make_one_class_on_both_sides() -> None:
    assert equal(column(1.0, 1.0 + 5e-10), column(1.0 + 1e-10, 1.0 + 4e-10))
    assert not equal(column(1.0, 1.0), column(1.0, 1.1))


def test_width_counts_even_without_rows() -> None:
    assert compare(Relation(1, ()), Relation(2, ())) == "column_count"
    assert compare(Relation(2, ()), Relation(2, ())) == "match"


def test_duplicates_count() -> None:
    assert not equal(column(1, 2, 2), column(1, 1, 2))
    assert not equal(column(1, 2), column(1, 2, 2))


def test_one_permutation_serves_all_rows() -> None:
    assert not equal(relation((1, 5), (2, 4)), relation((1, 4), (2, 5)))
    assert not equal(relation(("a", "b"), ("c", "d")), relation(("b", "a"), ("c", "d")))
    assert not equal(relation((1, 2)), relation((2, 1)), columns="strict")


def test_a_group_of_ties_binds_across_columns() -> None:
    gold = relation((1, "a"), (1, "b"), (2, "c"))
    assert equal(gold, relation(("b", 1), ("a", 1), ("c", 2)), cuts=(2, 3))
    assert not equal(gold, relation(("b", 1), ("c", 2), ("a", 1)), cuts=(2, 3))


def test_a_latin_square_is_decided_at_once() -> None:
    """Every column has the same values, so that only the rows together tell the columns apart."""
    square = [tuple((i + j) % 8 for j in range(8)) for i in range(8)]
    shuffled = [tuple(row[k] for k in (3, 1, 7, 0, 5, 2, 6, 4)) for row in reversed(square)]
    assert equal(relation(*square), relation(*shuffled))
    broken = [*shuffled[:-1], shuffled[-1][::-1]]
    assert not equal(relation(*square), relation(*broken))


def test_a_search_that_runs_too_long_is_undecided() -> None:
    """Two Hadamard matrices of order 32, Paley's and Sylvester's: any two columns of both look alike."""
    squares = {x * x % 31 for x in range(1, 31)}
    core = [tuple(1 if (j - i) % 31 in squares else -1 for j in range(31)) for i in range(31)]
    paley = [(1,) * 32, *((1, *row) for row in core)]
    sylvester = [tuple((-1) ** (i & j).bit_count() for j in range(32)) for i in range(32)]
    assert compare(relation(*paley), relation(*sylvester)) == "compare_budget"
    assert equal(relation(*paley), permuted(relation(*paley), range(31, -1, -1)))


def test_a_limit_that_cuts_a_tie_has_no_cuts() -> None:
    assert tie_cuts(column("bob"), column("eve")) is None
    assert tie_cuts(column(1, 2), column(1)) is None
    assert tie_cuts(Relation(1, ()), Relation(1, ())) == ()


def test_ties_are_found_where_the_two_orders_meet() -> None:
    assert tie_cuts(column(1, 2, 3, 4), column(1, 3, 2, 4)) == (1, 3, 4)
    assert tie_cuts(column(0.3, 1.0), column(0.1 + 0.2, 1.0)) == (1, 2)


def test_the_signature_sees_order_only_when_asked() -> None:
    one, two = column(1, 2), column(2, 1)
    assert signature(one) == signature(two)
    assert signature(one, ordered=True) != signature(two, ordered=True)


def test_the_signature_of_equal_numbers_is_equal() -> None:
    assert signature(column(2, 0.3, 2**53)) == signature(column(2.0, 0.1 + 0.2, 2.0**53))
    assert signature(column(1)) != signature(column("1"))
    assert signature(column("a")) != signature(column(b"a"))
    assert signature(Relation(1, ())) != signature(Relation(2, ()))
    assert signature(column("\ud800")) != signature(column("\ud801"))


def test_the_signature_is_pinned() -> None:
    table = relation((1, "é"), (None, b"x"), (float("inf"), 0.5))
    assert signature(table) == "7e631a93d73205b0496277ea874372c57b2e0cd5e67667bfac1640fb05ced23d"


@pytest.mark.parametrize(
    ("sql", "ordered"),
    [
        ("SELECT a FROM t ORDER BY a", True),
        ("select a from t order\n /* x */ by a", True),
        ("SELECT a FROM t ORDER -- x\nBY a LIMIT 1", True),
        ("WITH c AS (SELECT 1 ORDER BY 1) SELECT * FROM c", False),
        ("SELECT a FROM (SELECT a FROM t ORDER BY a)", False),
        ("SELECT row_number() OVER (ORDER BY a) FROM t", False),
        ("SELECT 'order by' FROM t", False),
        ('SELECT "order by", `order by`, [order by] FROM t', False),
        ("SELECT 'it''s order by' FROM t -- order by", False),
        ("SELECT a FROM t /* order by a", False),
        ("SELECT '(' FROM t ORDER BY a", True),
        ("SELECT a FROM t UNION SELECT b FROM u ORDER BY 1", True),
        ("SELECT a FROM t ORDER\u00a0BY a", False),
        ("", False),
    ],
)
def test_top_level_order_by(sql: str, ordered: bool) -> None:
    assert (clause(sql, "ORDER", "BY") is not None) is ordered


def test_top_level_limit() -> None:
    assert clause("SELECT a FROM t LIMIT 1", "LIMIT") == 4
    assert clause("SELECT a FROM (SELECT a FROM t LIMIT 1)", "LIMIT") is None
    assert clause("SELECT 'limit' FROM t -- limit 1", "LIMIT") is None


@pytest.mark.parametrize(
    ("sql", "expected"),
    [
        ("SELECT a FROM t ORDER BY a", "SELECT a FROM t ORDER BY a, {}"),
        ("SELECT a FROM t ORDER BY a DESC ;  ", "SELECT a FROM t ORDER BY a DESC, {} ;  "),
        ("SELECT a FROM t ORDER BY a -- x", "SELECT a FROM t ORDER BY a, {} -- x"),
        ("SELECT a FROM t ORDER BY a -- x\nLIMIT 1", "SELECT a FROM t ORDER BY a, {} -- x\nLIMIT 1"),
        ("SELECT a FROM t LIMIT 2 OFFSET 1", "SELECT a FROM t ORDER BY {} LIMIT 2 OFFSET 1"),
        (
            "SELECT a FROM (SELECT a FROM t LIMIT 3) ORDER BY 'limit'",
            "SELECT a FROM (SELECT a FROM t LIMIT 3) ORDER BY 'limit', {}",
        ),
    ],
)
def test_ties_are_broken_before_the_limit(sql: str, expected: str) -> None:
    keys = "1 COLLATE BINARY DESC, 2 COLLATE BINARY DESC"
    assert break_ties(sql, 2, "DESC") == expected.format(keys)


@law
@given(st.text(alphabet=st.sampled_from("a1 '\"`[]()-/*;\n,é"), max_size=40))
def test_tokens_cover_the_text_in_order(sql: str) -> None:
    position = 0
    for token in tokenize(sql):
        assert token.text == sql[token.end - len(token.text) : token.end]
        assert token.end > position
        position = token.end


@pytest.mark.parametrize("unit", ["-", "/*", " -- \n", "/* */", "'", "''", "(", "/", "[", '"`', "/*/"])
def test_tokenizing_is_linear(unit: str) -> None:
    assert len(tokenize(unit * (50_000 // len(unit)))) <= 50_000
