"""Measure a trained model on held-out schemas, and write its card.

    python -m lab.evaluate_teacher --model src/fastdistill/model/embedded --questions 300

An answer is right if it returns what the gold query returns, as a multiset of rows, on two databases filled at random
(not the one that the question's literals come from). Writes teacher_card.md and teacher_card.json.
"""

from __future__ import annotations

import argparse
import json
import sqlite3
import sys
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from statistics import mean
from typing import Any

from fastdistill.core.stats import wilson
from fastdistill.model.embedded.inference import Engine
from fastdistill.model.embedded.network import load_weights
from fastdistill.model.embedded.wire import Request
from lab.grammar import Example, examples
from lab.train_teacher import prompt

DATABASES = (1, 2)
SAMPLES = 8


@dataclass(frozen=True, slots=True)
class Judged:
    """The answers to one question: which of them run, and which are right."""

    kind: str
    texts: tuple[str, ...]
    runs: tuple[bool, ...]
    right: tuple[bool, ...]


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure a trained model on held-out schemas.")
    parser.add_argument("--model", type=Path, default=Path("src/fastdistill/model/embedded"))
    parser.add_argument("--questions", type=int, default=300)
    parser.add_argument("--seed", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=Path("lab"))
    arguments = parser.parse_args()

    questions = list(islice(examples(arguments.seed, "heldout"), arguments.questions))
    greedy = answer(arguments.model, questions, n=1, temperature=0.0)
    sampled = answer(arguments.model, questions, n=SAMPLES, temperature=1.0)
    card = json.loads((arguments.model / "model.json").read_text(encoding="utf-8"))
    facts = {
        "model": {key: card[key] for key in ("architecture", "sha256", "training")},
        "evaluation": {"seed": arguments.seed, "questions": len(questions)},
        "measured": summary(greedy, sampled),
        "kinds": kinds(greedy, sampled),
    }
    arguments.output.mkdir(parents=True, exist_ok=True)
    (arguments.output / "teacher_card.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    text = card_text(facts)
    (arguments.output / "teacher_card.md").write_text(text, encoding="utf-8")
    sys.stdout.write(text)


def answer(folder: Path, questions: Sequence[Example], n: int, temperature: float) -> list[Judged]:
    """Ask every question n times, with the model of a folder, and judge the answers."""
    engine = Engine(load_weights(folder))
    for index, example in enumerate(questions):
        # Seeds of different requests must not overlap: choice i draws with seed + i.
        messages = prompt(example.schema, example.question)
        engine.submit(Request(id=index, messages=messages, n=n, temperature=temperature, seed=index * n))
    texts: dict[Any, tuple[str, ...]] = {}
    while engine.busy:
        for result in engine.step():
            texts[result.id] = tuple(choice.text for choice in result.choices)
    return [judge(example, texts[index]) for index, example in enumerate(questions)]


def judge(example: Example, texts: tuple[str, ...]) -> Judged:
    """Run the answers and the gold query on the databases."""
    gold = run(example, example.gold_sql)
    results = {text: run(example, text) for text in set(texts)}
    return Judged(
        kind=example.kind,
        texts=texts,
        runs=tuple(results[text] is not None for text in texts),
        right=tuple(results[text] == gold for text in texts),
    )


def run(example: Example, sql: str) -> list[Counter[Any]] | None:
    """The rows that a query returns on each of the databases, or None if it fails."""
    results = []
    for seed in DATABASES:
        with closing(sqlite3.connect(":memory:")) as connection:
            example.db.fill(connection, seed)
            try:
                rows = connection.execute(sql).fetchall()
            except sqlite3.Error:
                return None
        results.append(Counter(tuple(round(v, 6) if isinstance(v, float) else v for v in row) for row in rows))
    return results


def summary(greedy: Sequence[Judged], sampled: Sequence[Judged]) -> dict[str, Any]:
    """Shares with their 95 % Wilson intervals; the single sample is the first of the eight."""
    total = len(greedy)

    def share(count: int) -> dict[str, float]:
        rate = wilson(count, total)
        shares = {"share": rate.rate, "low": rate.low, "high": rate.high}
        return {name: round(value, 4) for name, value in shares.items() if value is not None}

    return {
        "greedy_right": share(sum(judged.right[0] for judged in greedy)),
        "greedy_fails_to_run": share(sum(not judged.runs[0] for judged in greedy)),
        "sample_right": share(sum(judged.right[0] for judged in sampled)),
        "sample_fails_to_run": share(sum(not judged.runs[0] for judged in sampled)),
        "mean_of_8_right": round(mean(mean(judged.right) for judged in sampled), 4),
        "any_of_8_right": share(sum(any(judged.right) for judged in sampled)),
        "distinct_of_8": round(mean(len(set(judged.texts)) for judged in sampled), 2),
    }


def kinds(greedy: Sequence[Judged], sampled: Sequence[Judged]) -> dict[str, dict[str, Any]]:
    """By kind of question: how many, and the shares right."""
    rows: dict[str, list[tuple[Judged, Judged]]] = defaultdict(list)
    for one, many in zip(greedy, sampled, strict=True):
        rows[one.kind].append((one, many))
    return {
        kind: {
            "questions": len(pairs),
            "greedy_right": round(mean(one.right[0] for one, _ in pairs), 3),
            "mean_of_8_right": round(mean(mean(many.right) for _, many in pairs), 3),
            "any_of_8_right": round(mean(any(many.right) for _, many in pairs), 3),
        }
        for kind, pairs in sorted(rows.items())
    }


def card_text(facts: dict[str, Any]) -> str:
    """The card as Markdown."""
    shape, training = facts["model"]["architecture"], facts["model"]["training"]
    evaluation, measured = facts["evaluation"], facts["measured"]

    def interval(name: str) -> str:
        value = measured[name]
        return f"{value['share']:.1%} ({value['low']:.1%} to {value['high']:.1%})"

    lines = [
        "# The embedded teacher",
        "",
        f"A Qwen3 decoder of {shape['layers']} layers, width {shape['hidden']}, {shape['heads']} heads of "
        f"{shape['head_dim']}, SwiGLU {shape['ffn']}, a byte-level BPE of {shape['vocabulary']} tokens and a context "
        f"of {shape['context']}.",
        "Trained from random weights, on questions of `lab.grammar` whose labels are partly corrupted "
        "on purpose, so that it makes mistakes for gates to find.",
        "It knows that grammar and nothing else; its scores say nothing about any other model or data.",
        "",
        f"Training: {training['cpu_minutes']} CPU minutes on one core, {training['steps']} steps, "
        f"{training['examples']} examples, {training['label_noise']:.0%} corrupted labels, seed {training['seed']}.",
        f"Weights: sha256 `{facts['model']['sha256']}`.",
        "",
        f"Measured on {evaluation['questions']} questions about held-out schemas (seed {evaluation['seed']}), each "
        "answer run on two random databases; 95 % Wilson intervals in parentheses.",
        "",
        "| | |",
        "|---|---|",
        f"| right, greedy | {interval('greedy_right')} |",
        f"| right, one sample at temperature 1 | {interval('sample_right')} |",
        f"| right, mean of 8 samples | {measured['mean_of_8_right']:.1%} |",
        f"| right, any of 8 samples | {interval('any_of_8_right')} |",
        f"| fails to run, greedy | {interval('greedy_fails_to_run')} |",
        f"| fails to run, one sample | {interval('sample_fails_to_run')} |",
        f"| distinct texts among 8 samples | {measured['distinct_of_8']} |",
        "",
        "| kind | questions | greedy | mean of 8 | any of 8 |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {kind} | {row['questions']} | {row['greedy_right']:.0%} | {row['mean_of_8_right']:.0%} | "
        f"{row['any_of_8_right']:.0%} |"
        for kind, row in facts["kinds"].items()
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
