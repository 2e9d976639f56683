"""How a command ended that was called in this process: one of its own would take a second to start."""

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Ended:
    code: int
    out: str
    err: str


Command = Callable[..., Ended]
"""Runs `fastdistill` with the arguments given; a fixture."""
