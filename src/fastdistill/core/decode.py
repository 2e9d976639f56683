"""How an answer is drawn: the decode parameters that every provider understands, under the field's own names."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field


class DecodeProfile(BaseModel):
    """Sampling parameters. All are sent explicitly: a server's own defaults (top_k 40, top_p 0.9 ...) would
    silently truncate the distribution, and an answer could not be told from its record.

    The defaults leave the model's distribution as it is. `extra` in a config is an error, like everywhere.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    temperature: float = Field(1.0, ge=0, le=5)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=0, description="0: no limit")
    min_p: float = Field(0.0, ge=0, le=1)
    max_tokens: int = Field(512, gt=0)
    stop: tuple[str, ...] = ()
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)
    token_ids: bool | None = Field(None, description="ask for the ids of tokens with `logprobs`, for distillation")
    response_format: Literal["json"] | dict[str, Any] | None = Field(
        None, description="'json', or a JSON schema that the answer must satisfy"
    )

    def parameters(self) -> dict[str, Any]:
        """The parameters that are set, ready for a prompt's `parameters`."""
        return {name: value for name, value in self.model_dump().items() if value is not None}
