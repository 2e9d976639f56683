"""Jinja templates over a record's fields: for prompts, and for paths that depend on the record."""

from functools import lru_cache
from typing import TYPE_CHECKING

from fastdistill.core.errors import SampleError
from fastdistill.core.types import Sample

if TYPE_CHECKING:
    from jinja2 import Template


@lru_cache(maxsize=256)
def compile_template(text: str) -> "Template":
    """A Jinja template in which an unknown field is an error and no Python object can be reached.

    Raises:
        ValueError: it does not compile; names the line.
    """
    from jinja2 import StrictUndefined, TemplateSyntaxError
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
    try:
        return environment.from_string(text)
    except TemplateSyntaxError as error:
        raise ValueError(f"line {error.lineno} of the template: {error.message}") from error


def render(template: "Template", sample: Sample) -> str:
    """The template filled from the record.

    Raises:
        SampleError: `missing_field` or `template_error`.
    """
    from jinja2 import TemplateError, UndefinedError

    try:
        return template.render(sample.record)
    except UndefinedError as error:
        fields = ", ".join(sample.record)
        raise SampleError(
            "missing_field", f"{sample.source}: the template: {error.message}; the record has: {fields}"
        ) from error
    except (TemplateError, TypeError, ValueError, ArithmeticError) as error:
        raise SampleError("template_error", f"{sample.source}: the template: {error}") from error
