"""Gives each record its identity, and drops what came before. Never looks at an answer."""

import unicodedata
from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Self

from msgspec.structs import replace
from pydantic import Field, model_validator

from fastdistill.core.canonical import NotCanonical, canonical_json, sample_id
from fastdistill.core.errors import ConfigError, SampleError
from fastdistill.core.step import Context, StreamFilter
from fastdistill.core.types import Failure, Sample, Status


class CanonicalizeFields(StreamFilter):
    """Sets `input`, `task_id` and `sample_id`: what a sample is, whatever else its record holds.

    A record that lacks a field, or whose fields have no canonical JSON, fails; so does one that has the task id of an
    earlier record and other content. The very same task again is left out as a duplicate.
    """

    fields: tuple[str, ...] = Field(min_length=1, description="the fields that make the input, in this order")
    task_id_field: str = Field("task_id", description="where a record has its own id: a string or an integer")

    def looking(self, ctx: Context) -> Callable[[Sample], Sample]:
        seen = ctx.index(self.name)

        def look(sample: Sample) -> Sample:
            sample = self._identified(sample)
            # With a task id, one lookup tells both a repeated task and a conflict; without, the content is the id.
            key = f"task {sample.task_id}" if sample.task_id else f"sample {sample.sample_id}"
            first = seen.first(key, f"{sample.sample_id} {sample.source}")
            if first is None:
                return sample
            first_id, source = first.split(" ", 1)
            if first_id == sample.sample_id:
                message = f"{sample.source}: the same task as {source}"
                return sample.left_out(Status.DUPLICATE, Failure(self.name, "duplicate", message))
            raise SampleError(
                "task_id_conflict",
                f"{sample.source}: task id {sample.task_id!r} belongs to other content at {source}; "
                "give each task an id of its own, or none",
            )

        return look

    def _identified(self, sample: Sample) -> Sample:
        content = _pick(sample, self.fields)
        task_id = self._task_id(sample)
        try:
            return replace(sample, task_id=task_id, sample_id=sample_id(task_id, _form(content)), input=content)
        except NotCanonical as error:
            raise SampleError("not_canonical", f"{sample.source}: {error}") from error

    def _task_id(self, sample: Sample) -> str:
        value = sample.record.get(self.task_id_field, "")
        if isinstance(value, str) and value.isascii():  # as a rule
            return value
        if value is None:
            return ""
        if isinstance(value, bool) or not isinstance(value, str | int):
            kind = type(value).__name__
            message = f"{sample.source}: {self.task_id_field} is a {kind}; make it a string or an integer"
            raise SampleError("bad_task_id", message)
        return unicodedata.normalize("NFC", str(value))


class Deduplicate(StreamFilter):
    """Leaves out samples whose input, or whose `fields`, an earlier sample had, whatever their task ids."""

    fields: tuple[str, ...] = Field((), description="compare these fields of the record; the whole input if empty")

    def looking(self, ctx: Context) -> Callable[[Sample], Sample]:
        fields = self.fields
        seen = ctx.index(self.name)

        def look(sample: Sample) -> Sample:
            content = _pick(sample, fields) if fields else sample.input
            if not content:
                raise ConfigError(
                    f"{self.name}: nothing to compare; put CanonicalizeFields before it, or give `fields`"
                )
            try:
                first = seen.first(sha256(_form(content)).hexdigest(), sample.source)
            except NotCanonical as error:
                raise SampleError("not_canonical", f"{sample.source}: {error}") from error
            if first is None:
                return sample
            message = f"{sample.source}: the same content as {first}"
            return sample.left_out(Status.DUPLICATE, Failure(self.name, "duplicate", message))

        return look


class Shard(StreamFilter):
    """Leaves out the samples that other machines work on. A sample's shard is its id modulo `of`, wherever it lies.

    Steps that compare samples with each other belong before it: each machine reads all records.
    """

    index: int = Field(ge=0, description="0 for the first")
    of: int = Field(ge=1, description="how many machines share the records")

    @model_validator(mode="after")
    def _is_one_of_them(self) -> Self:
        if self.index >= self.of:
            raise ValueError(f"index {self.index}: {self.of} shards are numbered from 0 to {self.of - 1}")
        return self

    def looking(self, ctx: Context) -> Callable[[Sample], Sample]:
        def look(sample: Sample) -> Sample:
            if not sample.sample_id:
                raise ConfigError(f"{self.name}: samples have no id yet; put CanonicalizeFields before it")
            shard = int(sample.sample_id, 16) % self.of
            if shard == self.index:
                return sample
            message = f"{sample.source}: of shard {shard}/{self.of}"
            return sample.left_out(Status.ELSEWHERE, Failure(self.name, "elsewhere", message))

        return look


_latest: tuple[Mapping[str, Any] | None, bytes] = (None, b"")


def _form(content: Mapping[str, Any]) -> bytes:
    """The canonical JSON of a content, for which two steps ask one after the other."""
    global _latest
    if content is not _latest[0]:
        _latest = (content, canonical_json(content))
    return _latest[1]


def _pick(sample: Sample, fields: Sequence[str]) -> Mapping[str, Any]:
    record = sample.record
    try:
        return dict(zip(fields, map(record.__getitem__, fields), strict=True))
    except KeyError as error:
        missing = ", ".join([field for field in fields if field not in record])
        there = ", ".join(record) or "none"
        message = f"{sample.source}: no field {missing}; the record has: {there}"
        raise SampleError("missing_field", message) from error
