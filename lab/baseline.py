"""The whole loop on a small, real model: a teacher distils, gates filter, students learn, and all are compared.

    python -m lab.baseline --output demo/lab

The embedded teacher answers questions about schemas of the training split, through a FastDistill pipeline. A base is
trained that can write SQL over a schema and has never seen a question. Students go on from it on three sets that are
equal in rows and in distinct answers: what the gates passed, what came first without any gate, and the gold queries. A
second generation has a student for its teacher. All are measured on held-out schemas. What is already in the output
folder is not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
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
ARMS = ("gated", "ungated", "gold")
SEEDS = (42, 43, 44)
EVALUATION = 1000  # the seed of the held-out questions
DRAWS = 4  # sampled answers to each of them, at temperature 1


@dataclass(frozen=True, slots=True)
class Student:
    """One training run from the base: which generation, on what, and the seed of the order of its pairs."""

    generation: int
    arm: str
    seed: int

    @property
    def kind(self) -> str:
        return f"generation {self.generation}, {self.arm}"

    @property
    def name(self) -> str:
        return f"generation-{self.generation}-{self.arm}-{self.seed}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Distil, filter, train and compare, on a small model.")
    parser.add_argument("--output", type=Path, default=Path("demo/lab"))
    parser.add_argument("--prompts", type=int, default=5000)
    parser.add_argument("--base", type=int, default=36_000, help="queries that the base learns from")
    parser.add_argument("--student", type=int, default=12_000, help="pairs that each student learns from, with repeats")
    parser.add_argument("--questions", type=int, default=480, help="held-out questions")
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    begun = time.perf_counter()
    folder: Path = arguments.output
    records = folder / "data" / "train.jsonl"
    if not records.exists():
        write_synthetic(records.parent, arguments.prompts, seed=7, split="train")

    # The pipeline runs here, beside what the pool trains: whatever is ready takes a free core.
    with ProcessPoolExecutor(arguments.processes) as pool:
        base = pool.submit(pretrain, folder, arguments.base)
        samples = distil(folder, records, generation=0, teacher=TEACHER)
        sets = {(1, arm): pairs for arm, pairs in arms(samples).items()}
        print(base.result(), flush=True)

        def start(students: Sequence[Student]) -> list[Future[str]]:
            return [pool.submit(learn, folder, s, sets[s.generation, s.arm], arguments.student) for s in students]

        first, *others = [Student(1, arm, seed) for seed in SEEDS for arm in ARMS]
        training = start([first, *others])
        print(training[0].result(), flush=True)
        again = distil(folder, records, generation=1, teacher=folder / first.name)
        sets[2, first.arm] = born_again(samples, again, sets[1, first.arm])
        born = [Student(2, first.arm, seed) for seed in SEEDS]
        for trained in [*training[1:], *start(born)]:
            print(trained.result(), flush=True)
        judged = measure(pool, folder, [first, *others, *born], arguments.questions)

    facts = {
        "prompts": arguments.prompts,
        "base_queries": arguments.base,
        "pairs_a_student": arguments.student,
        "held_out_questions": arguments.questions,
        "yield": {f"generation-{g}": yields(s) for g, s in ((0, samples), (1, again))},
        "sets": {f"generation-{g}-{arm}": size(pairs) for (g, arm), pairs in sets.items()},
        "models": table(judged),
        "differences": differences(judged),
    }
    (folder / "baseline.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    print(text(facts))
    used = (resource.getrusage(whose) for whose in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    cpu, clock = sum(one.ru_utime + one.ru_stime for one in used), time.perf_counter() - begun
    print(f"{cpu / 60:.1f} CPU minutes, {clock / 60:.1f} minutes by the clock; {folder / 'baseline.json'}")


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
    """Sets of as many pairs and as many distinct answers each: only where the answers come from differs.

    The gated set takes the first attempt that passed, the ungated one the first attempt, so both are draws from the
    teacher and neither prefers its commonest texts. The gated set has only prompts that passed; the others have any.
    """
    pools = {
        "gated": [_pair(s, s.chosen[0].answer) for s in samples if s.chosen],
        "ungated": [_pair(s, s.candidates[0].answer) for s in samples],
        "gold": [_pair(s, str(s.record["gold_sql"])) for s in samples],
    }
    # A twentieth less than there is, so that the second generation has as many too.
    distinct = int(0.95 * min(len({answer for _, answer in pairs}) for pairs in pools.values()))
    repeats = min(len(drawn(pairs, distinct)) for pairs in pools.values()) - distinct
    return {arm: drawn(pairs, distinct, repeats) for arm, pairs in pools.items()}


def drawn(pairs: Sequence[Pair], distinct: int, repeats: int | None = None) -> list[Pair]:
    """A random choice with so many distinct answers, and so many pairs more that repeat one of them (None: all)."""
    shuffled = random.Random("drawn").sample(pairs, len(pairs))
    first: dict[str, Pair] = {}
    for pair in shuffled:
        if len(first) < distinct:
            first.setdefault(pair[1], pair)
    again = [pair for pair in shuffled if pair[1] in first and pair is not first[pair[1]]]
    return [*first.values(), *again[:repeats]]


def born_again(before: Sequence[Sample], after: Sequence[Sample], like: Sequence[Pair]) -> list[Pair]:
    """Half of the prompts with the first teacher's answer, half with the student's; a set of the size of `like`."""
    first = {s.sample_id: _pair(s, s.chosen[0].answer) for s in before if s.chosen}
    second = {s.sample_id: _pair(s, s.chosen[0].answer) for s in after if s.chosen}
    pairs = []
    for at, sample_id in enumerate({**first, **second}):
        own, other = (first, second) if at % 2 else (second, first)
        pairs.append(own.get(sample_id) or other[sample_id])
    distinct = len({answer for _, answer in like})
    return drawn(pairs, distinct, len(like) - distinct)


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


# --- The base and the students --------------------------------------------------------------------------------------


def queries(seed: int) -> Iterator[Pair]:
    """Endless queries over schemas of the training split, each asked for by its names and values in random order.

    What a base may know before it is taught: schemas, SQL, and to use what it is given. There is no question here, no
    word of English, and nothing says which name is compared, counted or shown.
    """
    rng = random.Random(f"queries:{seed}")
    for example in examples(seed, "train"):
        found = re.findall(r"'[^']*'|\d[\d.]*|[A-Z]?[a-z]\w*", example.gold_sql)
        words = list(dict.fromkeys(word.strip("'%") for word in found))
        rng.shuffle(words)
        yield prompt(example.schema, " ".join(words)), example.gold_sql


def pretrain(folder: Path, count: int) -> str:
    """Trains the base from random weights."""
    torch.manual_seed(0)
    return _trained(folder / "base", Model(SHAPE), queries(seed=5), count, seed=0)


def learn(folder: Path, student: Student, pairs: Sequence[Pair], count: int) -> str:
    """Trains one student from the base."""
    # Questions about one schema stand together, and share its computation; the schemas' order is random.
    by_schema: dict[str, list[Pair]] = defaultdict(list)
    for pair in random.Random(student.seed).sample(pairs, len(pairs)):
        by_schema[pair[0][-1]["content"].partition("\nQuestion:")[0]].append(pair)
    together = [pair for group in by_schema.values() for pair in group]
    # Small batches: so short a training is better off with more steps.
    rates = {"batch": 6, "matrix_rate": 0.015, "other_rate": 0.003}
    return _trained(folder / student.name, load(folder / "base"), cycle(together), count, student.seed, **rates)


def _trained(folder: Path, model: Model, pairs: Iterator[Pair], count: int, seed: int, **rates: Any) -> str:
    """Trains a model if it is not there yet; what there is to say of it."""
    if (folder / "model.json").exists():
        return f"{folder.name}: already there"
    torch.set_num_threads(1)
    tokenizer = load_weights(TEACHER).tokenizer
    report = train(model, tokenizer, pairs, count, seed=seed, quiet=True, **rates)
    facts = {"seed": seed, "examples": report.examples, "loss": round(report.loss, 4)}
    save(model, tokenizer, folder, facts)
    return f"{folder.name}: {facts}, {report.cpu_minutes:.1f} CPU minutes"


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


def measure(
    pool: ProcessPoolExecutor, folder: Path, students: Sequence[Student], questions: int
) -> dict[str, list[Measured]]:
    """All models by what they learnt from, one entry for each seed; the teacher and the base first."""
    folders = [TEACHER, folder / "base", *(folder / student.name for student in students)]
    kinds = ["teacher", "base", *(student.kind for student in students)]
    measured: dict[str, list[Measured]] = defaultdict(list)
    for kind, one in zip(kinds, pool.map(_measured, folders, [questions] * len(folders)), strict=True):
        measured[kind].append(one)
    return measured


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
    ("generation 2, gated", "teacher"),
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
        [f"{kind} | {row['prompts']:,} | {_interval(row)} | {_interval(second[kind])}" for kind, row in first.items()],
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
