"""Breaks a right final answer in its last number. Compares nothing."""

import re
from decimal import Decimal
from functools import partial

from fastdistill.core.step import Mutation
from fastdistill.data.answer_math import NUMBER, canonical


def mutate_math(answer: str) -> list[Mutation]:
    """Every mutation of a cleaned answer, each in a box; none where it holds no number.

    Operators: off_by_one, sign, times_ten, half, digits (the last two side by side that differ, swapped). What is more
    than one number may mean the same with another last one, as `0/5` and `\\pm 3` do.
    """
    numbers = list(re.finditer(rf"(?:^-)?(?:{NUMBER})", answer))
    if not numbers:
        return []
    digits = re.sub(r"[, ]", "", numbers[-1][0])
    value = Decimal(digits)
    others = [
        ("off_by_one", value - 1),
        ("off_by_one", value + 1),
        ("sign", -value),
        ("times_ten", value * 10),
        ("half", value / 2),
        ("digits", Decimal(re.sub(r"(.*)(\d)(?!\2)(\d)", r"\1\3\2", digits))),
    ]
    one_number = len(numbers) == 1 and re.fullmatch(r"[-\d/]+", canonical(answer)) is not None
    before, after = answer[: numbers[-1].start()], answer[numbers[-1].end() :]
    write = r"\boxed{{{}{:f}{}}}".format
    return [Mutation(name, partial(write, before, n, after), not one_number) for name, n in others if n != value]
