"""Keeps evaluation items out of training data. Looks at records alone, before anything is asked."""

import re
import unicodedata
from array import array
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any

from msgspec import Struct
from msgspec.structs import asdict
from pydantic import Field, PrivateAttr, field_validator

from fastdistill.core.errors import InputError, SampleError
from fastdistill.core.step import Context, Look, StreamFilter
from fastdistill.core.types import Failure, Sample, Status
from fastdistill.data.load import LoadJsonl, records

# A word; a Chinese or Japanese character is one of its own, for nothing is between them.
_TOKEN = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff]+")

_RUNS_AT_ONCE = 400  # between two turns of the event loop


class Decontaminate(StreamFilter):
    """Leaves out samples that hold an item of an evaluation file.

    Texts are compared as words, in lower case and NFKC, without punctuation. An item is held if the words are the same,
    or if more than `max_coverage` of the item's words lie in runs of `ngram` words that the sample has too (the rule of
    Tulu 3, arXiv 2411.15124; GPT-3's, any common run of 13 words, is counted beside it). An item that is shorter than
    `ngram` is found only if it is the same. Memory grows with the evaluation files, not with the records.
    """

    against: tuple[Path, ...] = Field(min_length=1, description="evaluation files, of the kinds that LoadJsonl reads")
    fields: tuple[str, ...] = Field(min_length=1, description="the fields of a record that are compared, joined")
    against_fields: tuple[str, ...] = Field((), description="the fields of an evaluation item; `fields` if empty")
    ngram: int = Field(8, ge=2, description="words of a run that counts")
    max_coverage: float = Field(0.5, ge=0, lt=1, description="share of an item's words that may lie in such runs")
    report_ngram: int = Field(13, ge=2, description="words of a run that is only reported")

    _index: "_Index | None" = PrivateAttr(None)

    @field_validator("against")
    @classmethod
    def _known_endings(cls, paths: tuple[Path, ...]) -> tuple[Path, ...]:
        LoadJsonl(path=paths)
        return paths

    def inputs(self) -> Sequence[Path]:
        return [path.expanduser() for path in self.against]

    def findings(self) -> Mapping[str, Any]:
        return {"against": [asdict(file) for file in self._index.files]} if self._index else {}

    def looking(self, ctx: Context) -> Callable[[Sample], Look]:
        """Raises:
        InputError: an evaluation file can't be read, or none of its items has the fields.
        """
        index = self._index = _Index(self.ngram, self.report_ngram)
        for path in self.against:
            index.read(path, self.against_fields or self.fields)

        def look(sample: Sample) -> Look:
            text = words(sample.record, self.fields, sample.source)
            if len(text) > _RUNS_AT_ONCE:
                yield
            found = yield from index.find(text, self.max_coverage)
            if found is None:
                return sample
            failure = Failure(self.name, "contaminated", f"{sample.source}: {found}")
            return sample.left_out(Status.CONTAMINATED, failure)

        return look


class _File(Struct):
    """Samples that hold an item of one evaluation file; one counts once, as `exact` if it is."""

    path: str
    items: int = 0
    without_text: int = 0
    exact: int = 0
    ngram: int = 0
    report_ngram: int = 0
    """Those with a run of `report_ngram` words of an item, left out or not."""


class _Index(Struct):
    ngram: int
    report_ngram: int
    files: list[_File] = []
    _items: list[tuple[int, str, int]] = []
    """The place of its file, its source and its number of words, for each item."""
    _texts: dict[int, int] = {}
    _runs: "dict[int, array[int]]" = {}
    """By the hash of `ngram` words: items and positions in them, one after the other."""
    _reported: dict[int, set[int]] = {}
    """By the hash of `report_ngram` words: places of files."""

    def read(self, path: Path, fields: Sequence[str]) -> None:
        place = len(self.files)
        file = _File(path.as_posix())
        self.files.append(file)
        for source, record in records(path):
            file.items += 1
            text = words(record, fields, source) if all(isinstance(record.get(name), str) for name in fields) else ()
            if not text:
                file.without_text += 1
                continue
            item = len(self._items)
            self._items.append((place, source, len(text)))
            self._texts.setdefault(hash(text), item)
            for at, run in enumerate(_runs(text, self.ngram)):
                self._runs.setdefault(run, array("I")).extend((item, at))
            for run in _runs(text, self.report_ngram):
                self._reported.setdefault(run, set()).add(place)
        if file.items == file.without_text:
            raise InputError(f"{path}: no item has {', '.join(fields)}; name its fields in against_fields")

    def find(self, text: tuple[str, ...], max_coverage: float) -> Generator[None, None, str | None]:
        """Which item a text holds, in words for people, or None. The most covered one; of several the first."""
        places: set[int] = set()
        starts: dict[int, set[int]] = {}
        runs = zip_longest(_runs(text, self.ngram), _runs(text, self.report_ngram), fillvalue=-1)  # no hash is -1
        for number, (run, reported) in enumerate(runs, 1):
            places.update(self._reported.get(reported, ()))
            postings = self._runs.get(run, ())
            for item, at in zip(postings[::2], postings[1::2], strict=True):
                starts.setdefault(item, set()).add(at)
            if number % _RUNS_AT_ONCE == 0:
                yield
        for place in places:
            self.files[place].report_ngram += 1
        if (same := self._texts.get(hash(text))) is not None:
            place, source, _ = self._items[same]
            self.files[place].exact += 1
            return f"the same words as {source}"
        covered = {
            item: (self.ngram + sum(min(self.ngram, after - at) for at, after in pairwise(sorted(found))))
            / self._items[item][2]
            for item, found in starts.items()
        }
        best = min(covered, key=lambda item: (-covered[item], item), default=None)
        if best is None or covered[best] <= max_coverage:
            return None
        place, source, _ = self._items[best]
        self.files[place].ngram += 1
        return f"{covered[best]:.0%} of the words of {source}"


def _runs(text: tuple[str, ...], length: int) -> Iterator[int]:
    return (hash(text[at : at + length]) for at in range(len(text) - length + 1))


def words(record: Mapping[str, Any], fields: Sequence[str], source: str) -> tuple[str, ...]:
    """The words of a record's fields, as texts are compared.

    Raises:
        SampleError: a field is missing, or is no text.
    """
    missing = [name for name in fields if not isinstance(record.get(name), str)]
    if missing:
        there = ", ".join(record) or "none"
        raise SampleError("missing_field", f"{source}: no text in {', '.join(missing)}; the record has: {there}")
    text = unicodedata.normalize("NFKC", " ".join(record[name] for name in fields))
    return tuple(_TOKEN.findall(text.casefold()))
