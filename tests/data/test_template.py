"""Templates filled from a record: as Jinja would fill them, whether Jinja is needed or not."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jinja2 import StrictUndefined, TemplateSyntaxError, UndefinedError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from fastdistill.core.errors import SampleError
from fastdistill.core.types import Sample
from fastdistill.data.template import compile_template, render


def no_null(value: object) -> object:
    if value is None:
        raise UndefinedError
    return value


JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True, finalize=no_null)
PIECES = [
    "{{ a }}",
    "{{b}}",
    "{{\n a\t}}",
    "{{ none }}",
    "{{ self }}",
    "{{ dict }}",
    "{{- a }}",
    "{{ a.b }}",
    "{{ a|upper }}",
]
PIECES += ["{", "}", "{{", "}}", "{%", "{#", "{# a #}", "{% if a %}", "{% endif %}", "\r\n", "\r", "\n", " ", "x", "é"]
VALUES: st.SearchStrategy[Any] = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(), st.just([1])
)


def sample(record: dict[str, Any]) -> Sample:
    return Sample(0, "train.jsonl:1", record)


@given(st.lists(st.sampled_from(PIECES), max_size=6).map("".join), VALUES)
def test_a_template_gives_what_jinja_gives(text: str, value: object) -> None:
    record = {"a": value, "b": "two", "none": 1, "self": 2}
    try:
        expected = JINJA.from_string(text).render(record)
    except TemplateSyntaxError:
        with pytest.raises(ValueError, match=r"line \d+ of the template"):
            compile_template(text)
    except UndefinedError:
        with pytest.raises(SampleError, match=r"train\.jsonl:1: the template: .* has: a( \(null\))?, b, none, self"):
            render(compile_template(text), sample(record))
    else:
        assert render(compile_template(text), sample(record)) == expected


def test_a_field_that_is_missing_is_named_with_those_that_are_there() -> None:
    with pytest.raises(SampleError, match=r"'schema' is undefined; the record has: instruction") as caught:
        render(compile_template("{{ schema }} {{ instruction }}"), sample({"instruction": "How many?"}))
    assert caught.value.reason == "missing_field"


@pytest.mark.parametrize("text", ["{{ question }}", "{{ question }} {{ id + 1 }}", "{{ more.hint }}"])
def test_a_null_is_no_text(text: str) -> None:
    record = {"id": 1, "question": None, "more": {"hint": None}}
    with pytest.raises(SampleError, match=r"no text.*the record has: id, question \(null\), more$") as caught:
        render(compile_template(text), sample(record))
    assert caught.value.reason == "missing_field"
    kept = compile_template("{{ question or 'None' }}{% if more.hint %}x{% endif %}")
    assert render(kept, sample(record)) == "None"
    assert render(compile_template("None of {{ id }}"), sample(record)) == "None of 1"


def test_a_number_that_python_does_not_write_costs_its_sample_only() -> None:
    with pytest.raises(SampleError, match="digit") as caught:
        render(compile_template("{{ n }}"), sample({"n": 10**5000}))
    assert caught.value.reason == "template_error"
