"""The value protocol: what crosses between candidate and tests, and that nothing else does."""

import json
from collections import Counter, OrderedDict, defaultdict, deque
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdistill.data.execution.python_child import PythonReason
from fastdistill.data.execution.python_values import NotPlainError, decode, encode


class Equal(int):
    def __eq__(self, other: object) -> bool:
        return True

    __hash__ = int.__hash__


PLAIN = [
    *(None, True, 0, -7, 10**5000, 1.5, float("inf"), -0.0, 2 + 3j, "a\ud800", b"\x00", bytearray(b"x")),
    *([1, [2]], (1,), {1, 2}, frozenset({"a"}), {1: {(2, 3): "x"}}, range(1, 9, 2), deque([1, 2])),
    *(Counter("aab"), OrderedDict(a=1), Fraction(1, 3), Decimal("1.10")),
    *(date(2024, 2, 29), datetime(2024, 2, 29, 1), time(1, 2), timedelta(-1, 2, 3)),  # noqa: DTZ001
]

keys = st.none() | st.booleans() | st.integers() | st.text() | st.binary() | st.floats(allow_nan=False)
values = st.recursive(
    keys,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner) | st.frozensets(keys),
)


def crossed(value: object) -> Any:
    return decode(json.loads(json.dumps(encode(value))))


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_plain_values_cross_as_they_are(value: object) -> None:
    other = crossed(value)
    assert other == value
    assert type(other) is type(value)


@settings(max_examples=50, deadline=None)
@given(values)
def test_crossing_changes_nothing(value: object) -> None:
    other = crossed(value)
    assert other == value
    assert type(other) is type(value)


def test_a_defaultdict_crosses_as_its_equal() -> None:
    assert crossed(defaultdict(int, a=1)) == {"a": 1}


@pytest.mark.parametrize("value", [Equal(1), [Equal(1)], {"a": object()}, len, Equal, iter([]), PythonReason.PASSED])
def test_objects_and_subclasses_do_not_cross(value: object) -> None:
    with pytest.raises(NotPlainError):
        encode(value)


def test_deep_and_cyclic_values_do_not_cross() -> None:
    cyclic: list[object] = []
    cyclic.append(cyclic)
    with pytest.raises(NotPlainError):
        encode(cyclic)
    with pytest.raises(NotPlainError):
        decode(json.loads("[" * 100 + "]" * 100))


FORGED = [
    *({"set": [[1]]}, {"tuple": 3}, {"dict": [1]}, {"dict": [[], 1]}, {"int": ["x"]}, {"int": 3}, {"int": []}),
    *({"Fraction": [1, 0]}, {"Fraction": ["1e1000000000"]}, {"range": [1, 2, 0]}, {"complex": [1, 2, 3]}),
    *({"a": 1, "b": 2}, {}, {"object": []}, {"Decimal": ["x"]}, {"date": ["y"]}, {"bytes": [3]}, {"bytes": None}),
]


@pytest.mark.parametrize("wire", FORGED, ids=json.dumps)
def test_forged_data_is_refused(wire: object) -> None:
    with pytest.raises(NotPlainError):
        decode(wire)


@settings(max_examples=50, deadline=None)
@given(
    st.recursive(keys, lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["set", "dict", "int"]), inner))
)
def test_whatever_is_decoded_is_plain(wire: object) -> None:
    try:
        value = decode(wire)
    except NotPlainError:
        return
    encode(value)


def test_every_reason_has_one_outcome() -> None:
    assert {reason.outcome for reason in PythonReason} == {"pass", "fail", "error"}
    assert [reason for reason in PythonReason if reason.outcome == "pass"] == [PythonReason.PASSED]
