import json
import unicodedata
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdistill.core.canonical import NotCanonical, canonical_json, digest, sample_id, with_characters

TEXT = st.text(st.characters(codec="utf-8"), max_size=8)
NUMBERS = st.one_of(st.integers(), st.floats(allow_nan=False, allow_infinity=False))
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(TEXT, inner, max_size=4)),
    max_leaves=12,
)


def canonical(value: object) -> bytes | None:
    """None where two keys are one after normalisation."""
    try:
        return canonical_json(value)
    except NotCanonical as error:
        assert "appears twice" in str(error)
        return None


def as_json_value(value: Any) -> Any:
    """The JSON value that `value` stands for, in a form that `==` compares as JSON does."""
    match value:
        case bool() | None:
            return (type(value).__name__, value)
        case int() | float():
            return ("number", value)
        case str():
            return ("string", unicodedata.normalize("NFC", value))
        case dict():
            return {unicodedata.normalize("NFC", key): as_json_value(inner) for key, inner in value.items()}
        case _:
            return [as_json_value(inner) for inner in value]


def disguised(value: Any) -> Any:
    """The same JSON value otherwise written: keys turned round, strings decomposed, floats for integers."""
    match value:
        case bool() | None:
            return value
        case int():
            return float(value) if abs(value) < 2**53 else value
        case float():
            return int(value) if value.is_integer() else value
        case str():
            return unicodedata.normalize("NFD", value)
        case dict():
            return {unicodedata.normalize("NFD", key): disguised(value[key]) for key in reversed(value)}
        case _:
            return tuple(disguised(inner) for inner in value)


@given(VALUES)
def test_one_value_has_one_form_however_it_is_written(value: object) -> None:
    if (form := canonical(value)) is not None:
        assert canonical(disguised(value)) == form


@given(VALUES, VALUES)
def test_two_forms_are_equal_only_for_one_value(left: object, right: object) -> None:
    one, other = canonical(left), canonical(right)
    if one is not None and other is not None:
        assert (one == other) == (as_json_value(left) == as_json_value(right))


@given(VALUES)
def test_the_form_reads_back_as_the_value_and_is_its_own_form(value: object) -> None:
    if (form := canonical(value)) is not None:
        again = json.loads(form)
        assert as_json_value(again) == as_json_value(value)
        assert canonical_json(again) == form


@given(st.dictionaries(TEXT, st.integers(), max_size=6))
def test_keys_are_sorted_and_no_space_is_added(value: dict[str, int]) -> None:
    if (form := canonical(value)) is not None:
        keys = list(json.loads(form))
        assert keys == sorted(keys)
        assert form == json.dumps(json.loads(form), ensure_ascii=False, separators=(",", ":")).encode()


@pytest.mark.parametrize(
    ("value", "form"),
    [
        (1.0, b"1"),
        (-0.0, b"0"),
        (1e15, b"1000000000000000"),
        (0.1, b"0.1"),
        (1e22, b"10000000000000000000000"),
        (1e-7, b"1e-07"),
        (10**30, b"1000000000000000000000000000000"),
        (True, b"true"),
        ({"b": [1, None], "a": "e\u0301"}, '{"a":"é","b":[1,null]}'.encode()),
    ],
)
def test_known_forms(value: object, form: bytes) -> None:
    assert canonical_json(value) == form


@pytest.mark.parametrize("integer", [10**16, 10**22, 2**53, 2**60, -(2**70)])
def test_an_integer_and_the_equal_float_have_one_form(integer: int) -> None:
    assert canonical_json(float(integer)) == canonical_json(integer)


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        (float("nan"), "not a JSON number"),
        ({"a": [float("inf")]}, r"\$.a\[0\]: inf"),
        ({1: "a"}, "key 1 is not a string"),
        ({"\u00e9": 1, "e\u0301": 2}, "appears twice"),
        ({"a": b"bytes"}, r"\$.a: bytes has no JSON form"),
        ({"a": {1, 2}}, "set has no JSON form"),
        ("\ud800", "surrogate"),
        ({"a": 10**5000}, r"\$.a: an integer of more than 4,200 digits"),
    ],
)
def test_what_is_no_json_is_an_error_that_names_the_place(value: object, problem: str) -> None:
    with pytest.raises(NotCanonical, match=problem):
        canonical_json(value)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        (rb'"\ud83d\ude00 \u00e9 \\ud800"', "\U0001f600 \u00e9 \\ud800"),
        (rb'"a\ud83d"', "a\ufffd"),
        (rb'"\uDE00\ud83d\ud83d\ude00"', "\ufffd\ufffd\U0001f600"),
        (b'"a\xf0\x9f\x98"', "a\ufffd"),
        (b'"a\xed\xa0\x80"', "a\ufffd\ufffd\ufffd"),
    ],
)
def test_what_is_no_character_becomes_the_replacement_character_and_all_else_stays(text: bytes, read: str) -> None:
    assert msgspec.json.decode(with_characters(text)) == read


@given(st.text(st.characters(codec="utf-8")))
def test_a_text_of_characters_stays_as_it_is(text: str) -> None:
    for ascii_only in (True, False):
        whole = json.dumps(text, ensure_ascii=ascii_only).encode()
        assert with_characters(whole) == whole


def test_a_value_without_end_is_an_error() -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    with pytest.raises(NotCanonical, match="too deeply"):
        canonical_json(deep)


@given(TEXT, st.dictionaries(TEXT, NUMBERS, max_size=2), TEXT, st.dictionaries(TEXT, NUMBERS, max_size=2))
def test_sample_ids_are_equal_only_for_the_same_task_and_input(
    task: str, content: dict[str, Any], other_task: str, other_content: dict[str, Any]
) -> None:
    if canonical(content) is not None and canonical(other_content) is not None:
        same = as_json_value([task, content]) == as_json_value([other_task, other_content])
        assert (_id(task, content) == _id(other_task, other_content)) == same


def test_the_joint_of_task_and_input_can_not_be_confused() -> None:
    content = {"q": 1}
    assert _id('a{"q":1}', {}) != _id("a", content)
    assert _id("", {"a": ""}) != _id('{"a":""}', {})
    assert digest(["ab", "c"]) != digest(["a", "bc"])


def _id(task: str, content: dict[str, Any]) -> str:
    return sample_id(task, canonical_json(content))
