"""The run-level quality floor (`require:`). A rate is judged by the lower bound of its 95% interval."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, Field

from fastdistill.control.tally import GateCount, Tally
from fastdistill.core.stats import Rate, interval
from fastdistill.core.types import Status

Share = Field(None, ge=0, le=1)


class Floor(BaseModel, frozen=True, extra="forbid"):
    """What a run must reach; missing it has an exit code of its own, and the data set is written all the same."""

    min_total: int | None = Field(None, ge=1, description="samples that went through all steps")
    min_accepted: int | None = Field(None, ge=1, description="samples with an accepted candidate")
    accept_rate: float | None = Share
    exec_pass_rate: float | None = Share
    gold_match_rate: float | None = Share
    pass_rate: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(
        default_factory=dict, description="by the name of a gate"
    )
    audited: bool = Field(False, description="every gate must have been audited as it is now, with the files it reads")

    def check(self, tally: Tally, audits: Mapping[str, object] | None = None) -> list[dict[str, Any]]:
        """One entry for each requirement, with what was reached and whether that is enough.

        `audits` has each gate that can be audited, None where it was not.
        """
        known = [audit is not None for audit in (audits or {}).values()]
        requirements: list[tuple[str, float | None, int | Rate]] = [
            ("min_total", self.min_total, tally.statuses[Status.OPEN]),
            ("min_accepted", self.min_accepted, tally.accepted_samples),
            ("accept_rate", self.accept_rate, tally.accept_rate()),
            ("exec_pass_rate", self.exec_pass_rate, tally.flag_rate("exec_pass")),
            ("gold_match_rate", self.gold_match_rate, tally.flag_rate("gold_match")),
            *(
                (f"pass_rate.{gate}", share, tally.gates.get(gate, GateCount()).pass_rate())
                for gate, share in self.pass_rate.items()
            ),
            ("audited", len(known) if self.audited else None, sum(known)),
        ]
        return [_check(name, required, reached) for name, required, reached in requirements if required is not None]


def _check(name: str, required: float, reached: int | Rate) -> dict[str, Any]:
    least = reached.low if isinstance(reached, Rate) else reached
    met = least is not None and least >= required
    shown = interval(reached) if isinstance(reached, Rate) else reached
    return {"requirement": name, "required": required, "reached": shown, "met": met}
