"""Decode profiles: everything that shapes an answer is explicit, and nothing else is taken."""

import pytest
from pydantic import ValidationError

from fastdistill.core.decode import DecodeProfile


def test_what_is_not_set_is_not_sent_and_everything_else_is_explicit() -> None:
    assert DecodeProfile().parameters() == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "max_tokens": 512, "stop": (),
        "logprobs": False, "top_logprobs": 0,
    }  # fmt: skip
    assert DecodeProfile(presence_penalty=0.0).parameters()["presence_penalty"] == 0.0


@pytest.mark.parametrize(
    "wrong", [{"temprature": 1}, {"temperature": -0.1}, {"top_p": 0}, {"max_tokens": 0}, {"response_format": "xml"}]
)
def test_a_wrong_parameter_is_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        DecodeProfile.model_validate(wrong)
