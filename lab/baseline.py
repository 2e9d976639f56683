"""The whole loop on a small, real model: a teacher distils, gates filter, students learn, and all are compared.

    python -m lab.baseline --output demo/lab

The embedded teacher answers questions about schemas of the training split, through a FastDistill pipeline. Fresh
students of its architecture then learn from three sets of equal size, one answer for each prompt: what the gates
passed, what came first without any gate, and the gold queries. A second generation has a student for its teacher. All
are measured on held-out schemas. Beside the fresh students, others go on from the teacher's weights on the same sets: a
short training tells data apart there that a fresh student has not the time to. What is already in the output folder is
not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
import torch

from fastdistill import (
    CanonicalizeFields,
    CleanSqlOutput,
    DecodeProfile,
    ExportSFT,
    LoadJsonl,
    Pipeline,
    RuleFilter,
    SelectBest,
    SQLiteExecEval,
    TextGeneration,
)
from fastdistill.control.ledger import read_samples
from fastdistill.core.stats import wilson
from fastdistill.core.types import Sample
from fastdistill.model.embedded.network import load_weights
from lab.evaluate_teacher import Judged, answer
from lab.grammar import examples, write_synthetic
from lab.model import Model, load, save
from lab.train_teacher import SHAPE, Pair, prompt, train

TEACHER = Path("src/fastdistill/model/embedded")
ARMS = ("ungated", "gated", "gold")
SEEDS = (42, 43, 44)
EVALUATION = 1000  # the seed of the held-out questions
DRAWS = 4  # sampled answers to each of them, at temperature 1


@dataclass(frozen=True, slots=True)
class Student:
    """One training run: which generation, on what, from which random start, or going on from the teacher."""

    generation: int
    arm: str
    seed: int
    goes_on: bool = False

    @property
    def kind(self) -> str:
        return f"generation {self.generation}, {self.arm}" if not self.goes_on else f"teacher, then {self.arm}"

    @property
    def name(self) -> str:
        return f"{self.kind.replace(', ', '-').replace(' ', '-')}-{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil, filter, train and compare, on a small model.")
    parser.add_argument("--output", type=Path, default=Path("demo/lab"))
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--minutes", type=float, default=4.5, help="CPU minutes for each student")
    parser.add_argument("--more", type=float, default=1.0, help="CPU minutes for each that goes on from the teacher")
    parser.add_argument("--questions", type=int, default=480, help="held-out questions")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    folder: Path = arguments.output
    records = folder / "data" / "train.jsonl"
    if not records.exists():
        write_synthetic(records.parent, arguments.prompts, seed=7, split="train")

    samples = distil(folder, records, generation=0, teacher=TEACHER)
    sets = {(1, arm): pairs for arm, pairs in arms(samples).items()}
    students = [Student(1, arm, seed) for seed in SEEDS for arm in ARMS]
    make(folder, students, sets, arguments.minutes, arguments.processes)
    polished = [Student(1, arm, seed, goes_on=True) for seed in SEEDS for arm in ARMS]
    make(folder, polished, sets, arguments.more, arguments.processes)

    chosen = folder / Student(1, "gated", SEEDS[0]).name
    again = distil(folder, records, generation=1, teacher=chosen)
    sets[2, "gated"] = born_again(samples, again, len(sets[1, "gated"]))
    born = [Student(2, "gated", seed) for seed in SEEDS]
    make(folder, born, sets, arguments.minutes, arguments.processes)

    judged = measure(folder, [*students, *born, *polished], arguments.questions, arguments.processes)
    facts = {
        "prompts": arguments.prompts,
        "cpu_minutes_a_student": arguments.minutes,
        "cpu_minutes_going_on": arguments.more,
        "held_out_questions": arguments.questions,
        "yield": {f"generation-{g}": yields(s) for g, s in ((0, samples), (1, again))},
        "sets": {f"generation-{g}-{arm}": size(pairs) for (g, arm), pairs in sets.items()},
        "models": table(judged),
        "differences": differences(judged),
    }
    (folder / "baseline.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(text(facts))
    print(f"{(time.perf_counter() - begun) / 60:.1f} minutes; {folder / 'baseline.json'}")


# --- Data -----------------------------------------------------------------------------------------------------------


def distil(folder: Path, records: Path, *, generation: int, teacher: Path) -> list[Sample]:
    """The samples of one run over all prompts, with every candidate and verdict, in input order."""
    result = Pipeline.model_validate(
        {
            "name": "lab",
            "models": {"teacher": {"provider": "embedded", "model": f"generation-{generation}", "path": teacher}},
            "steps": [
                LoadJsonl(path=records),
                CanonicalizeFields(fields=["schema", "instruction"]),
                TextGeneration(
                    num_generations=4,
                    decode_profile=DecodeProfile(temperature=1.0, max_tokens=96),
                    system_prompt="Return SQL only.",
                    template="Schema: {{ schema }}\nQuestion: {{ instruction }}\nSQL:",
                ),
                CleanSqlOutput(),
                RuleFilter(sql=True),
                SQLiteExecEval(db_path=str(records.parent / "databases" / "{{ db_id }}.sqlite")),
                SelectBest(k=1),
                ExportSFT(),
            ],
        }
    ).run(output_dir=folder / "artifacts", run_id=f"generation-{generation}")
    return [s for s in read_samples(result.path / "ledger.sqlite") if s.candidates]


def arms(samples: Sequence[Sample]) -> dict[str, list[Pair]]:
    """Sets of as many pairs each, one for a prompt: only where the answer comes from differs.

    The gated set takes the first attempt that passed, the ungated one the first attempt, so both are draws from the
    teacher and neither prefers its commonest texts. The gated set has only the prompts that passed; the others have
    a random choice of all prompts, as many.
    """
    gated = [(s, s.chosen[0].answer) for s in samples if s.chosen]
    ungated = [(s, s.candidates[0].answer) for s in samples]
    gold = [(s, str(s.record["gold_sql"])) for s in samples]
    rng = random.Random("arms")
    drawn = {"ungated": rng.sample(ungated, len(gated)), "gated": gated, "gold": rng.sample(gold, len(gated))}
    return {arm: [_pair(sample, sql) for sample, sql in chosen] for arm, chosen in drawn.items()}


def born_again(before: Sequence[Sample], after: Sequence[Sample], count: int) -> list[Pair]:
    """Half of the prompts with the first teacher's answer, half with the student's, as many pairs as before."""
    first = {s.sample_id: _pair(s, s.chosen[0].answer) for s in before if s.chosen}
    second = {s.sample_id: _pair(s, s.chosen[0].answer) for s in after if s.chosen}
    prompts = list({**first, **second})
    pairs = []
    for at, sample_id in enumerate(prompts):
        own, other = (first, second) if at % 2 else (second, first)
        pairs.append(own.get(sample_id) or other[sample_id])
    return pairs[:count]


def _pair(sample: Sample, sql: str) -> Pair:
    return prompt(str(sample.record["schema"]), str(sample.record["instruction"])), sql


def yields(samples: Sequence[Sample]) -> dict[str, dict[str, Any]]:
    """By kind of question: how many prompts, and for which share an answer was accepted, with its interval."""
    passed: dict[str, list[bool]] = defaultdict(list)
    for sample in samples:
        for kind in ("all", str(sample.record["kind"])):
            passed[kind].append(bool(sample.chosen))
    return {kind: {"prompts": len(p), **_rate(sum(p), len(p))} for kind, p in sorted(passed.items())}


def size(pairs: Sequence[Pair]) -> dict[str, int]:
    prompts = {json.dumps(messages) for messages, _ in pairs}
    return {"rows": len(pairs), "prompts": len(prompts), "distinct_answers": len({answer for _, answer in pairs})}


# --- Students -------------------------------------------------------------------------------------------------------


def make(
    folder: Path, students: Sequence[Student], sets: dict[tuple[int, str], list[Pair]], minutes: float, processes: int
) -> None:
    """Trains those that are not there yet, side by side."""
    missing = [s for s in students if not (folder / s.name / "model.json").exists()]
    with ProcessPoolExecutor(processes) as pool:
        done = [pool.submit(learn, folder / s.name, sets[s.generation, s.arm], minutes, s) for s in missing]
        for future in done:
            print(future.result(), flush=True)


def learn(folder: Path, pairs: list[Pair], minutes: float, student: Student) -> str:
    """Trains one student, from random weights or from the teacher's. The order of the pairs comes from the seed too."""
    torch.set_num_threads(1)
    torch.manual_seed(student.seed)
    tokenizer = load_weights(TEACHER).tokenizer
    model = load(TEACHER) if student.goes_on else Model(SHAPE)
    # What goes on begins near its end: full rates would unlearn it first.
    rates = {"matrix_rate": 0.004, "other_rate": 0.0008} if student.goes_on else {}
    shuffled = list(pairs)
    random.Random(student.seed).shuffle(shuffled)
    # Sorted by schema within a pass, so that questions about one schema share its computation.
    shuffled.sort(key=lambda pair: pair[0][-1]["content"].partition("\nQuestion:")[0])
    report = train(model, tokenizer, cycle(shuffled), minutes=minutes, seed=student.seed, quiet=True, **rates)
    facts = {"seed": student.seed, "steps": report.steps, "examples": report.examples, "loss": round(report.loss, 4)}
    save(model, tokenizer, folder, facts)
    return f"{folder.name}: {facts}"


# --- Measurement ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Measured:
    """Answers of one model to the held-out questions: greedy, and `DRAWS` at temperature 1."""

    greedy: list[Judged]
    sampled: list[Judged]

    def right(self) -> np.ndarray:
        """For each question: right when greedy, the share of right samples, and whether any is; (questions, 3)."""
        rows = [(g.right[0], mean(s.right), any(s.right)) for g, s in zip(self.greedy, self.sampled, strict=True)]
        return np.array(rows, float)


def measure(folder: Path, students: Sequence[Student], questions: int, processes: int) -> dict[str, list[Measured]]:
    """All models by what they learnt from, one entry for each seed; the teacher first."""
    folders = [TEACHER, *(folder / student.name for student in students)]
    with ProcessPoolExecutor(processes) as pool:
        measured = list(pool.map(_measured, folders, [questions] * len(folders)))
    by_name: dict[str, list[Measured]] = {"teacher": [measured[0]]}
    for student, one in zip(students, measured[1:], strict=True):
        by_name.setdefault(student.kind, []).append(one)
    return by_name


def _measured(folder: Path, questions: int) -> Measured:
    asked = list(islice(examples(EVALUATION, "heldout"), questions))
    return Measured(answer(folder, asked, 1, 0.0), answer(folder, asked, DRAWS, 1.0))


def table(judged: dict[str, list[Measured]]) -> dict[str, dict[str, Any]]:
    """Means over the seeds, their spread, and how many of the sampled answers don't run."""
    rows = {}
    for name, seeds in judged.items():
        scores = np.array([m.right().mean(axis=0) for m in seeds])
        rows[name] = {
            "seeds": len(seeds),
            **{key: round(float(scores[:, at].mean()), 4) for at, key in enumerate(_SCORES)},
            "sd_over_seeds": round(stdev(scores[:, 1]), 4) if len(seeds) > 1 else None,
            "fails_to_run": round(mean(1 - mean(j.runs) for m in seeds for j in m.sampled), 4),
            "distinct_texts": round(mean(len(set(j.texts)) for m in seeds for j in m.sampled), 2),
        }
    return rows


_SCORES = ("greedy", "sampled", "any")
_PAIRS = (
    ("generation 1, gated", "generation 1, ungated"),
    ("generation 1, gated", "generation 1, gold"),
    ("generation 2, gated", "generation 1, gated"),
    ("generation 1, gated", "teacher"),
    ("teacher, then gated", "teacher, then ungated"),
    ("teacher, then gated", "teacher, then gold"),
    ("teacher, then gated", "teacher"),
)


def differences(judged: dict[str, list[Measured]]) -> list[dict[str, Any]]:
    """Paired differences of the means over seeds, with 95% intervals from a bootstrap over schemas.

    Questions about one schema come in blocks of eight and are drawn together. The interval does not hold what another
    three seeds would change; `sd_over_seeds` shows that.
    """
    rows = []
    for left, right in _PAIRS:
        gap = mean_of(judged[left]) - mean_of(judged[right])
        blocks = gap.reshape(-1, 8, len(_SCORES)).mean(axis=1)
        draws = np.random.default_rng(0).integers(len(blocks), size=(10_000, len(blocks)))
        means = blocks[draws].mean(axis=1)
        low, high = np.quantile(means, (0.025, 0.975), axis=0)
        rows.append({"of": left, "less": right} | {
            key: [round(float(value), 4) for value in (gap[:, at].mean(), low[at], high[at])]
            for at, key in enumerate(_SCORES)
        })  # fmt: skip
    return rows


def mean_of(seeds: Sequence[Measured]) -> np.ndarray:
    return np.mean([m.right() for m in seeds], axis=0)


def _rate(successes: int, total: int) -> dict[str, float | None]:
    rate = wilson(successes, total)
    return {"share": _short(rate.rate), "low": _short(rate.low), "high": _short(rate.high)}


def _short(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


# --- Words ----------------------------------------------------------------------------------------------------------


def text(facts: dict[str, Any]) -> str:
    """The tables as Markdown."""
    return "\n\n".join("\n".join(_rows(*part)) for part in _tables(facts))


def _tables(facts: dict[str, Any]) -> Iterator[tuple[str, list[str]]]:
    yield (
        "set | rows | prompts | distinct answers",
        [f"{name} | {s['rows']:,} | {s['prompts']:,} | {s['distinct_answers']:,}" for name, s in facts["sets"].items()],
    )
    yield (
        "model | seeds | greedy | sampled | sd | any of 4 | fails to run | distinct of 4",
        [
            f"{name} | {m['seeds']} | {m['greedy']:.1%} | {m['sampled']:.1%} | {_percent(m['sd_over_seeds'])} |"
            f" {m['any']:.1%} | {m['fails_to_run']:.1%} | {m['distinct_texts']}"
            for name, m in facts["models"].items()
        ],
    )
    yield (
        "difference in points | greedy | sampled | any of 4",
        [
            f"{d['of']} − {d['less']} | "
            + " | ".join("{:+.1f} [{:+.1f}, {:+.1f}]".format(*_points(d[k])) for k in _SCORES)
            for d in facts["differences"]
        ],
    )
    first, second = facts["yield"].values()
    yield (
        "kind | prompts | accepted from the teacher | from the student",
        [f"{kind} | {row['prompts']} | {_interval(row)} | {_interval(second[kind])}" for kind, row in first.items()],
    )


def _rows(head: str, rows: Sequence[str]) -> Iterator[str]:
    yield f"| {head} |"
    yield "|---" * (head.count("|") + 1) + "|"
    yield from (f"| {row} |" for row in rows)


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1%}"


def _points(values: Sequence[float]) -> list[float]:
    return [100 * value for value in values]


def _interval(row: dict[str, Any]) -> str:
    return f"{row['share']:.1%} [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


if __name__ == "__main__":
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    main()
