"""Jinja templates over a record's fields: for prompts, and for paths that depend on the record.

Most are text with `{{ field }}` in it, and are filled without Jinja, which costs more than all other steps together.
"""

import re
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Annotated

from msgspec import Struct
from pydantic import AfterValidator

from fastdistill.core.errors import SampleError
from fastdistill.core.types import Sample

if TYPE_CHECKING:
    import jinja2

_DATA = r"(?:[^{]|\{(?![{%#]))*+"
_FIELD = r"\{\{\s*+([A-Za-z]\w*+)\s*+\}\}"
_PLAIN = re.compile(rf"{_DATA}(?:{_FIELD}{_DATA})*+", re.ASCII)
_RESERVED = frozenset(["and", "else", "false", "if", "in", "is", "none", "not", "or", "self", "true"])


class Template(Struct, frozen=True, dict=True):
    """A template that compiles. `plain` is the same for `str.format`, where it has nothing but text and fields."""

    text: str
    plain: str | None
    fields: tuple[str, ...] = ()
    """Those of `plain`."""

    @cached_property
    def compiled(self) -> "jinja2.Template":
        """In it an unknown field is an error, as is a null to be written, and no Python object can be reached."""
        from jinja2 import StrictUndefined
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(
            undefined=StrictUndefined, keep_trailing_newline=True, finalize=_written
        )
        return environment.from_string(self.text)


@lru_cache(maxsize=256)
def compile_template(text: str) -> Template:
    """Raises ValueError if the text does not compile; names the line."""
    if _PLAIN.fullmatch(text):
        # Jinja, too, makes every line end "\n".
        parts = re.split(_FIELD, re.sub(r"\r\n|\r", "\n", text), flags=re.ASCII)
        if _RESERVED.isdisjoint(name.lower() for name in parts[1::2]):
            parts[::2] = [part.replace("{", "{{").replace("}", "}}") for part in parts[::2]]
            fields, parts[1::2] = (*parts[1::2],), [f"{{{name}!s}}" for name in parts[1::2]]
            return Template(text, "".join(parts), fields)
    template = Template(text, None)

    from jinja2 import TemplateSyntaxError

    try:
        assert template.compiled
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the template: {error.message}") from error
    return template


TemplateText = Annotated[str, AfterValidator(lambda text: compile_template(text).text)]
"""A field of a step that must compile."""


def render(template: Template, sample: Sample) -> str:
    """The template filled from the record.

    Raises:
        SampleError: `missing_field` or `template_error`.
    """
    record = sample.record
    if template.plain is not None:
        try:
            if None not in map(record.__getitem__, template.fields):  # what is wrong with a null, Jinja says
                return template.plain.format_map(record)
        except (KeyError, ValueError):
            pass  # Jinja knows more names than the record's, and what to say of one, or of a number too long to write

    from jinja2 import TemplateError, UndefinedError

    try:
        return template.compiled.render(record)
    except UndefinedError as error:
        fields = ", ".join(name if value is not None else f"{name} (null)" for name, value in record.items())
        raise SampleError(
            "missing_field", f"{sample.source}: the template: {error.message}; the record has: {fields}"
        ) from error
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise SampleError("template_error", f"{sample.source}: the template: {error}") from error


def _written(value: object) -> object:
    from jinja2 import UndefinedError

    if value is None:  # or every such record is asked about "None"
        raise UndefinedError("a null has no text; give it one, like {{ field or 'unknown' }}, or leave the record out")
    return value
