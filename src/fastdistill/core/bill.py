"""What a sample asks of models, whichever step asks, and whether it is paid for or stored. Knows no price."""

from contextvars import ContextVar
from typing import TypeAlias

from fastdistill.core.types import Usage

Bill: TypeAlias = dict[str, tuple[str, Usage]]
"""By the key of an answer, which is paid for once: the name of the model, and the usage."""

BILLS: ContextVar[dict[int, Bill] | None] = ContextVar("bills", default=None)
"""Where somebody wants to know, the bills of samples by their index."""
