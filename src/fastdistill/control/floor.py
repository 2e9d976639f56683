"""The run-level quality floor (`require:`). A rate is judged by the lower bound of its 95% interval."""

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from fastdistill.control.tally import Tally, interval
from fastdistill.core.stats import Rate, wilson
from fastdistill.core.types import Status

Share = Field(None, ge=0, le=1)


class Floor(BaseModel):
    """What a run must reach; missing it has an exit code of its own, and the data set is written all the same."""

    model_config = ConfigDict(frozen=True, extra="forbid", defer_build=True)

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
        counts = {"min_total": tally.statuses[Status.OPEN], "min_accepted": tally.accepted_samples}
        rates = {
            "accept_rate": tally.accept_rate(),
            "exec_pass_rate": tally.flag_rate("exec_pass"),
            "gold_match_rate": tally.flag_rate("gold_match"),
        }
        checks = [
            {"requirement": name, "required": required, "reached": reached, "met": reached >= required}
            for name, reached in counts.items()
            if (required := getattr(self, name)) is not None
        ]
        checks += [
            _rate_check(name, required, rate)
            for name, rate in rates.items()
            if (required := getattr(self, name)) is not None
        ]
        for gate, required in self.pass_rate.items():
            count = tally.gates.get(gate)
            checks.append(_rate_check(f"pass_rate.{gate}", required, count.pass_rate() if count else wilson(0, 0)))
        if self.audited:
            known = [audit is not None for audit in (audits or {}).values()]
            counts = {"required": len(known), "reached": sum(known)}
            checks.append({"requirement": "audited", **counts, "met": all(known)})
        return checks


def _rate_check(name: str, required: float, rate: Rate) -> dict[str, Any]:
    met = rate.low is not None and rate.low >= required
    return {"requirement": name, "required": required, "reached": interval(rate), "met": met}
