"""What may be spent on models, in tokens and US dollars: by one model (here), by a whole run (`control.budget`)."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from pydantic import BaseModel, Field

from fastdistill.core.errors import BudgetSpent

if TYPE_CHECKING:
    import asyncio

    from fastdistill.model.client import Brake
    from fastdistill.model.meter import Meter


class ModelBudget(BaseModel, frozen=True, extra="forbid"):
    """What may be spent in a run, answers from the store not counted. Checked before every request.

    A request in flight counts with all it could still cost: its prompt and every token that it may generate. So does
    one of which nobody says what it cost: called off, broken off, or answered without usage.
    """

    max_tokens: int | None = Field(None, ge=1, description="prompt and completion tokens")
    max_cost_usd: float | None = Field(None, gt=0, description="needs a `price`")

    def spent(self, meters: "Sequence[Meter]", tokens: int, dollars: float) -> str | None:
        """Why no request of up to `tokens` and `dollars` may be sent any more, not even if those in flight turn out to
        cost nothing; None if it may, now or later.
        """
        tokens += sum([meter.tokens + meter.unknown_tokens for meter in meters])
        if self.max_tokens is not None and tokens > self.max_tokens:
            return f"budget.max_tokens: the next request could exceed {self.max_tokens:,} tokens"
        dollars += sum([(meter.cost or 0.0) + meter.worst_cost(meter.unknown_tokens) for meter in meters])
        if self.max_cost_usd is not None and dollars > self.max_cost_usd:
            return f"budget.max_cost_usd: the next request could exceed ${self.max_cost_usd:g}"
        return None

    def taken(self, meters: "Sequence[Meter]", tokens: int, dollars: float) -> bool:
        """Whether requests in flight could still cost what a further one would need."""
        tokens += sum([meter.reserved_tokens for meter in meters])
        dollars += sum([meter.worst_cost(meter.reserved_tokens) for meter in meters])
        return self.spent(meters, tokens, dollars) is not None


class OwnBrake:
    """The brake (`client.Brake`) of a model with a budget of its own: the run's, and that. Once spent, it stays so."""

    def __init__(self, name: str, budget: ModelBudget, meter: "Meter", brake: "Brake") -> None:
        self._name = name
        self._budget = budget
        self._meter = meter
        self._brake = brake

    def check(self, tokens: int, dollars: float) -> bool:
        waits, meter = self._brake.check(tokens, dollars), self._meter
        # A smaller request might still fit; but then only what is short would be asked about.
        if meter.spent is None and (reason := self._budget.spent([meter], tokens, dollars)):
            meter.spent = f"models.{self._name}.{reason}"
        if meter.spent is not None:
            raise BudgetSpent(BudgetSpent.code, meter.spent)
        return waits or self._budget.taken([meter], tokens, dollars)

    async def pause(self, seconds: float) -> None:
        await self._brake.pause(seconds)

    def turn(self) -> "asyncio.Future[None] | None":
        return self._brake.turn()

    def asks(self) -> None:
        self._brake.asks()
