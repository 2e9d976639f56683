"""How an answer is drawn: the decode parameters that every provider understands, under the field's own names."""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, Field, field_validator


class DecodeProfile(BaseModel, frozen=True, extra="forbid"):
    """Sampling parameters. All are sent explicitly: a server's own defaults (top_k 40, top_p 0.9 ...) would
    silently truncate the distribution, and an answer could not be told from its record.

    The defaults leave the model's distribution as it is. `extra` in a config is an error, like everywhere.
    """

    temperature: float | tuple[float, ...] = Field(1.0, description="0 to 5; of several each draw takes the next")
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

    @field_validator("temperature")
    @classmethod
    def _bearable(cls, given: float | tuple[float, ...]) -> float | tuple[float, ...]:
        found = given if isinstance(given, tuple) else (given,)
        if not found or not all(0 <= temperature <= 5 for temperature in found):
            raise ValueError("must be from 0 to 5, or a list of such")
        return given

    @property
    def each(self) -> "tuple[DecodeProfile, ...]":
        """The profiles that draws take in turn, with one temperature each."""
        if not isinstance(self.temperature, tuple):
            return (self,)
        return tuple([self.model_copy(update={"temperature": temperature}) for temperature in self.temperature])

    def parameters(self) -> dict[str, Any]:
        """The parameters that are set, ready for a prompt's `parameters`."""
        return {name: value for name, value in self.model_dump().items() if value is not None}


def _one(profile: DecodeProfile) -> DecodeProfile:
    if len(profile.each) > 1:
        raise ValueError("temperature: one only, for there is one draw")
    return profile


SingleDraw = Annotated[DecodeProfile, AfterValidator(_one)]
"""How one answer is drawn."""
