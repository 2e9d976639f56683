"""LiteLLM: the second tier, for any API that it reaches and no provider here speaks. Best effort, and slow.

Its own retries, caches, telemetry and fetching of price lists are off. What it says is read like an OpenAI-compatible
server's answer; what the API behind it honours is not probed.
"""

import os
import sys
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, SecretStr, model_validator

from fastdistill.core.decode import DecodeProfile
from fastdistill.core.types import Completion, Prompt
from fastdistill.model.provider import Capabilities, ErrorKind, ModelConfig, Provider, ProviderError, check_wires
from fastdistill.model.providers.openai import NEUTRAL, OFFICIAL_LACKS, chat_parameters
from fastdistill.model.providers.openai_answers import completions_of, decode_answer
from fastdistill.model.transport import error_kind


class LiteLLMConfig(ModelConfig):
    """`model` is LiteLLM's name, like `anthropic/claude-sonnet-4-5`; keys come from LiteLLM's own variables."""

    provider: Literal["litellm"] = "litellm"
    base_url: str | None = Field(None, description="where LiteLLM's default for the model is not right")
    api_key: SecretStr | None = Field(None, exclude=True, description="by default from LiteLLM's own variable")

    @model_validator(mode="after")
    def _installed(self) -> Self:
        if find_spec("litellm") is None:
            raise ValueError("provider: litellm is an extra; install it with `pip install 'fastdistill[litellm]'`")
        return self


class LiteLLMProvider(Provider):
    """Asks through `litellm.acompletion`, which takes seconds to import: it is imported with the first request."""

    notes: tuple[str, ...] = ("second tier: what the API behind LiteLLM honours is not probed",)
    Config: ClassVar[type[ModelConfig]] = LiteLLMConfig

    def __init__(self, config: LiteLLMConfig) -> None:
        self._config = config

    async def complete(self, prompt: Prompt, *, seed: int | None, n: int) -> list[Completion]:
        litellm, config = _imported(), self._config
        check_wires("litellm", prompt)
        body = chat_parameters(prompt.parameters)
        for name in OFFICIAL_LACKS:  # passed on as they are: left out where they say nothing
            if body.get(name) in NEUTRAL[name]:
                del body[name]
        key = config.api_key.get_secret_value() if config.api_key else None
        body |= {"model": prompt.model, "api_base": config.base_url, "api_key": key, "timeout": config.timeout}
        body |= {"seed": seed, "n": n if n > 1 else None}
        try:
            said = await litellm.acompletion(messages=[*prompt.messages], num_retries=0, max_retries=0, **body)
        except litellm.exceptions.openai.OpenAIError as error:  # all of LiteLLM's errors are OpenAI's too
            raise self._failed(error) from error
        if completions := completions_of(decode_answer(said.model_dump_json().encode()), n):
            return completions
        raise ProviderError(ErrorKind.GARBLED, "litellm: the answer has no choices")

    async def probe(self, like: Prompt | None = None) -> Capabilities:
        parameters = DecodeProfile(max_tokens=1).parameters()
        hello = Prompt("litellm", self._config.model, ({"role": "user", "content": "Name three colours."},), parameters)
        (answer,) = await self.complete(hello, seed=None, n=1)
        where = (self._config.base_url or "litellm", f"litellm {version('litellm')}")
        return Capabilities(*where, answer.model, answer.build, can_score_prompt=False, notes=self.notes)

    async def aclose(self) -> None:
        if "litellm" in sys.modules:
            await _imported().close_litellm_async_clients()

    def _failed(self, error: Any) -> ProviderError:
        status, chain = getattr(error, "status_code", None) or 500, [error]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            chain.append(cause)  # that nobody listens comes as a 500, with the reason behind it
        named = (_KINDS[name] for each in chain if (name := type(each).__name__) in _KINDS)
        message = f"litellm: {self._config.model}: {' '.join(str(error).split())[:600]}"
        key = self._config.api_key.get_secret_value() if self._config.api_key else ""
        message = message.replace(key, "(secret)") if len(key) >= 6 else message  # some servers repeat a wrong key
        return ProviderError(next(named, error_kind(int(status))), message)


def _imported() -> Any:
    os.environ.setdefault("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # else importing it asks the network
    import litellm

    litellm.telemetry, litellm.suppress_debug_info = False, True
    return litellm


_KINDS = {
    "ContextWindowExceededError": ErrorKind.TOO_LONG,
    "UnsupportedParamsError": ErrorKind.UNSUPPORTED,
    "Timeout": ErrorKind.TIMEOUT,
    **dict.fromkeys(("APIConnectionError", "ConnectError"), ErrorKind.REFUSED),
}
