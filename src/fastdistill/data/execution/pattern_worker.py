"""Searches a text for regular expressions; as a program, the worker of `patterns.PatternPool`, which may be killed."""

import json
import re
import sys
from collections.abc import Callable, Sequence

from fastdistill.data.execution.worker_process import Channel, confine_process

Rule = tuple[re.Pattern[str], bool]
"""A pattern, and whether it must be found; otherwise it must not."""
Broken = tuple[int, str | None, int | None]
"""The place of a rule, and what was found, with where it begins, if that is what breaks it."""


def first_broken(rules: Sequence[Rule], text: str, enter: Callable[[int], object] = int) -> Broken | None:
    """The first rule that a text breaks. Calls `enter` before each is looked at, with its place."""
    for at, (pattern, wanted) in enumerate(rules):
        enter(at)
        found = pattern.search(text)
        if (found is not None) is not wanted:
            return (at, found[0][:200], found.start()) if found else (at, None, None)
    return None


def main() -> None:
    limits = json.loads(sys.argv[1])
    confine_process(limits["memory_bytes"])
    channel = Channel(limits["cpu_s"])

    def judge(job: tuple[list[tuple[str, int, bool]], str]) -> Broken | None:
        rules = [(re.compile(pattern, flags), wanted) for pattern, flags, wanted in job[0]]
        broken = first_broken(rules, job[1], lambda at: channel.enter(str(at)))
        channel.enter(None)
        return broken

    channel.serve(judge)


if __name__ == "__main__":
    main()
