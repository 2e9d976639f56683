"""Record what torch answers greedily, for the tests of the numpy inference; run it after each training.

Usage: python -m lab.record_golden --model src/fastdistill/model/embedded --output tests/model/embedded_golden.json
"""

from __future__ import annotations

import argparse
import json
from itertools import islice
from pathlib import Path

import torch

from fastdistill.model.embedded.network import load_weights
from lab.grammar import examples
from lab.model import Model, load
from lab.train_teacher import prompt


def main() -> None:
    parser = argparse.ArgumentParser(description="Record greedy answers of the torch model.")
    parser.add_argument("--model", type=Path, default=Path("src/fastdistill/model/embedded"))
    parser.add_argument("--output", type=Path, default=Path("tests/model/embedded_golden.json"))
    arguments = parser.parse_args()
    weights = load_weights(arguments.model)
    model = load(arguments.model)
    answers = []
    for example in islice(examples(7, "heldout"), 0, 40, 8):
        messages = prompt(example.schema, example.question)
        tokens, logprobs = greedy(model, weights.tokenizer.encode_chat(messages), weights.tokenizer.im_end)
        text = weights.tokenizer.decode(tokens[:-1])
        answers.append({"messages": messages, "text": text, "logprobs": [round(value, 5) for value in logprobs]})
    golden = {"sha256": weights.sha256, "answers": answers}
    arguments.output.write_text(json.dumps(golden, indent=1) + "\n", encoding="utf-8")


@torch.no_grad()
def greedy(model: Model, tokens: list[int], end: int, limit: int = 64) -> tuple[list[int], list[float]]:
    """The likeliest next tokens, one by one and without a cache, with their log-probabilities."""
    answer: list[int] = []
    logprobs: list[float] = []
    while len(answer) < limit and end not in answer:
        best = model.next_logits(tokens + answer)[-1].log_softmax(-1).max(-1)
        answer.append(int(best.indices))
        logprobs.append(float(best.values))
    return answer, logprobs


if __name__ == "__main__":
    main()
