"""What says the same in almost the same words: questions by MinHash, answers by their canonical code."""

import ast
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from typing import Self

from pydantic import Field, model_validator

from fastdistill.core.step import Context, Look, StreamFilter
from fastdistill.core.types import Failure, Sample, Status
from fastdistill.data.decontaminate import words

_PERMUTATIONS = 128  # an estimate of 0.8 is then off by 0.035, one standard deviation
_RUNS_AT_ONCE = 500  # between two turns of the event loop; each takes some kilobytes for as long
_LONGEST = 10_000
"""Characters of code that is parsed; what is longer stays as it is."""


class NearDuplicates(StreamFilter):
    """Leaves out samples whose text nearly is that of an earlier one; the first in input order stays.

    Near means that the Jaccard similarity of their runs of `shingle` characters (words in lower case, without
    punctuation) is at least `threshold`, as estimated by MinHash with 128 permutations; pairs are found by
    locality-sensitive hashing, which may miss one close to the threshold. Memory grows by about 2.5 kB a sample.
    """

    fields: tuple[str, ...] = Field(min_length=1, description="the fields of the record that are compared, joined")
    threshold: float = Field(0.8, gt=0, lt=1, description="similarity from which a sample is left out")
    shingle: int = Field(5, ge=1, description="characters of a run")

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if find_spec("datasketch") is None:
            raise ValueError("needs datasketch; run `pip install 'fastdistill[dedup]'`")
        return self

    def looking(self, ctx: Context) -> Callable[[Sample], Look]:
        import numpy as np
        from datasketch import MinHash, MinHashLSH

        best = MinHashLSH(self.threshold, _PERMUTATIONS)  # whose own tables take several times as much
        bands = [slice(at * best.r, (at + 1) * best.r) for at in range(best.b)]
        kept: list[tuple[str, bytes]] = []
        nearby: dict[int, int] = {}  # the first of those kept, by the hash of what a band of theirs is
        others: dict[int, list[int]] = {}

        def look(sample: Sample) -> Look:
            text = " ".join(words(sample.record, self.fields, sample.source))
            sketch = MinHash(_PERMUTATIONS)
            seen: set[str] = set()
            starts = range(max(1, len(text) - self.shingle + 1))
            for begin in range(0, len(starts), _RUNS_AT_ONCE):
                if len(starts) > _RUNS_AT_ONCE:
                    yield
                new = {text[at : at + self.shingle] for at in starts[begin : begin + _RUNS_AT_ONCE]} - seen
                sketch.update_batch([run.encode() for run in new])
                seen |= new
            if len(starts) > _RUNS_AT_ONCE:
                yield
            values = sketch.hashvalues
            buckets = [hash((at, values[band].tobytes())) for at, band in enumerate(bands)]
            known = [bucket for bucket in buckets if bucket in nearby]
            similar = (kept[at] for at in sorted({at for b in known for at in (nearby[b], *others.get(b, ()))}))
            shares = ((name, float(np.mean(np.frombuffer(other, values.dtype) == values))) for name, other in similar)
            first = next(((name, share) for name, share in shares if share >= self.threshold), None)
            if first is None:
                for bucket in buckets:
                    if nearby.setdefault(bucket, len(kept)) != len(kept):
                        others.setdefault(bucket, []).append(len(kept))
                kept.append((f"{sample.source} ({sample.sample_id or 'no id'})", values.tobytes()))
                return sample
            message = f"{sample.source}: {first[1]:.0%} the same as {first[0]}"
            return sample.left_out(Status.DUPLICATE, Failure(self.name, "near_duplicate", message))

        return look


def canonical_sql(text: str) -> str:
    """One text for queries that differ in case, space and comments alone; else the text itself."""
    import sqlglot
    from sqlglot.errors import SqlglotError
    from sqlglot.expressions import Identifier

    if len(text) > _LONGEST:
        return text
    with suppress(SqlglotError, RecursionError):
        statements = [statement for statement in sqlglot.parse(text, dialect="sqlite") if statement is not None]
        if len(statements) == 1:
            for name in statements[0].find_all(Identifier):
                if not name.quoted:  # what is quoted may be a string, as SQLite has it
                    name.set("this", name.this.lower())
            return statements[0].sql(dialect="sqlite", comments=False)
    return text


def canonical_python(text: str) -> str:
    """One text for programs with the same syntax tree, whatever their space and comments; else the text itself."""
    if len(text) > _LONGEST:
        return text
    with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
        return ast.dump(ast.parse(text))
    return text
