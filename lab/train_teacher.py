"""Train a small text-to-SQL model from random weights: tokenizer, network, and the package's weight files.

    python -m lab.train_teacher --pairs 42000 --seed 0 --noise 0.15 --output src/fastdistill/model/embedded

`train` is the training loop by itself, over any iterator of (prompt messages, answer): students use it too.
"""

from __future__ import annotations

import argparse
import random
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from fastdistill.model.embedded.bpe import Tokenizer
from fastdistill.model.embedded.network import Architecture
from lab.grammar import Example, examples
from lab.model import Model, save
from lab.muon import Muon
from lab.tokens import learn_merges

Messages = list[dict[str, str]]
Pair = tuple[Messages, str]

VOCABULARY = 768
SHAPE = Architecture(
    vocabulary=VOCABULARY, hidden=160, layers=4, heads=5, kv_heads=5, head_dim=32, ffn=448, context=512,
    rope_theta=10_000.0, norm_epsilon=1e-6,
)  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded teacher.")
    parser.add_argument("--pairs", type=int, default=42_000, help="how many to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", type=float, default=0.15, help="share of the labels that are corrupted")
    parser.add_argument("--output", type=Path, default=Path("src/fastdistill/model/embedded"))
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    torch.manual_seed(arguments.seed)
    tokenizer = Tokenizer(learn_merges(chat_texts(arguments.seed, 4000), VOCABULARY))
    model = Model(SHAPE)
    pairs = teacher_pairs(arguments.seed, arguments.noise)
    report = train(model, tokenizer, pairs, arguments.pairs, seed=arguments.seed)
    facts = {"seed": arguments.seed, "label_noise": arguments.noise, "cpu_minutes": round(report.cpu_minutes, 2),
             "steps": report.steps, "examples": report.examples, "final_loss": round(report.loss, 4)}  # fmt: skip
    save(model, tokenizer, arguments.output, facts)
    print(facts)


# --- The task -------------------------------------------------------------------------------------------------------


def prompt(schema: str, question: str, *, system: bool = True) -> Messages:
    """The messages that FastDistill's text-to-SQL pipelines send to a teacher."""
    user = {"role": "user", "content": f"Schema: {schema}\nQuestion: {question}\nSQL:"}
    return [{"role": "system", "content": "Return SQL only."}, user] if system else [user]


def teacher_pairs(seed: int, noise: float) -> Iterator[Pair]:
    """Endless training pairs with corrupted labels among them; a tenth of the schemas come without system message."""
    rng = random.Random(f"teacher:{seed}")
    stream = examples(seed, "train")
    while True:
        system = rng.random() > 0.1
        for example in islice(stream, GROUP):
            sql = corrupt(example, rng) if rng.random() < noise else example.gold_sql
            yield prompt(example.schema, example.question, system=system), sql


def chat_texts(seed: int, count: int) -> Iterator[str]:
    """What a tokenizer gets to see of the task: the turns of the chats."""
    for example in islice(examples(seed, "train"), count):
        yield from ("system\n", "assistant\n")
        for message in prompt(example.schema, example.question):
            yield f"{message['role']}\n{message['content']}"
        yield example.gold_sql


_SWAPS = {
    ">": "<", "<": ">", ">=": "<=", "<=": ">=", "AND": "OR", "OR": "AND", "MAX": "MIN", "MIN": "MAX", "AVG": "SUM",
    "SUM": "AVG", "DESC": "ASC", "ASC": "DESC", "DISTINCT": "", "WHERE": "", "COUNT": "SUM", "BY": "", "FROM": "",
}  # fmt: skip


def corrupt(example: Example, rng: random.Random) -> str:
    """The gold query with one mistake of the kind that models make.

    Another column in place of the right one (40 %), another operator or a lost keyword (30 %), or a condition lost
    (30 %); if the mistake does not apply, another column.
    """
    sql = example.gold_sql
    chance = rng.random()
    if chance < 0.3 and " WHERE " in sql and "(" not in sql:
        return sql[: sql.rindex(" AND " if " AND " in sql else " WHERE ")]
    swappable = [match for match in re.finditer(r"[A-Z]+|[<>]=?", sql) if match[0] in _SWAPS]
    if chance < 0.6 and swappable:
        at = rng.choice(swappable)
        return f"{sql[: at.start()]}{_SWAPS[at[0]]}{sql[at.end() :]}"
    names = sorted({column.name for table in example.db.tables for column in table.columns})
    used = [match for match in re.finditer(r"\w+", sql) if match[0] in names]
    if not used:
        return sql.replace("*", rng.choice(names))
    at = rng.choice(used)
    return sql[: at.start()] + rng.choice([name for name in names if name != at[0]]) + sql[at.end() :]


# --- The training loop ----------------------------------------------------------------------------------------------

GROUP = 4  # pairs in a row that share a prompt's beginning and so its computation
NOTHING = -100  # the target where a row has fewer answer tokens than the longest


@dataclass(frozen=True, slots=True)
class Report:
    """What a training run did. `loss` is the mean over its last steps, in nats a token of the answers."""

    steps: int
    examples: int
    cpu_minutes: float
    loss: float


@dataclass(frozen=True, slots=True)
class Group:
    """Pairs packed into one sequence: their common prefix once, then each pair's rest as a branch of its own."""

    prefix: list[int]
    branches: list[tuple[list[int], int]]  # the rest of the prompt and the answer; how long the answer is

    def __len__(self) -> int:
        return len(self.prefix) + sum(len(tokens) for tokens, _ in self.branches)


def train(
    model: Model,
    tokenizer: Tokenizer,
    pairs: Iterator[Pair],
    count: int,
    *,
    seed: int = 0,
    batch: int = 12,
    matrix_rate: float = 0.02,
    other_rate: float = 0.004,
    quiet: bool = False,
) -> Report:
    """Train on so many pairs; the loss is on the answers alone.

    The rates follow the count, so pairs that end early end the training with rates still high: cycle a finite set.
    `batch` counts groups of up to four pairs. Muon trains the matrices of the blocks, AdamW the rest; both rates warm
    up over the first 3 % and fall to zero over the last 60 % of the pairs.
    """
    matrices = [parameter for name, parameter in model.named_parameters() if is_block_matrix(name)]
    others = [parameter for name, parameter in model.named_parameters() if not is_block_matrix(name)]
    muon = Muon(matrices, matrix_rate)
    adam = torch.optim.AdamW(others, lr=other_rate, betas=(0.9, 0.95), weight_decay=0.0)
    rng = random.Random(f"batches:{seed}")
    started = time.process_time()
    losses: list[float] = []
    seen = 0
    for groups in batches(grouped(pairs, tokenizer), batch, rng):
        progress = seen / count
        if progress >= 1:
            break
        factor = min(progress / 0.03 + 0.01, 1.0, (1 - progress) / 0.6)
        muon.rate = matrix_rate * factor
        adam.param_groups[0]["lr"] = other_rate * factor
        loss = loss_of(model, groups)
        model.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        muon.step()
        adam.step()
        losses.append(loss.item())
        seen += sum(len(group.branches) for group in groups)
        if len(losses) % 25 == 0 and not quiet:
            print(f"step {len(losses):5d}  {progress:4.0%}  {seen:6d} pairs  loss {np.mean(losses[-25:]):.4f}",
                  flush=True)  # fmt: skip
    return Report(len(losses), seen, (time.process_time() - started) / 60, float(np.mean(losses[-25:])))


def is_block_matrix(name: str) -> bool:
    return name.startswith("blk.") and "norm" not in name


def grouped(pairs: Iterator[Pair], tokenizer: Tokenizer) -> Iterator[Group]:
    """Pack pairs that follow each other and share at least half of their prompts."""
    members: list[tuple[list[int], list[int]]] = []
    shared = 0
    for messages, answer in pairs:
        tokens = tokenizer.encode_chat(messages)
        target = [*tokenizer.encode(answer), tokenizer.im_end]
        common = common_length(members[0][0], tokens) if members else 0
        common = min(common, shared)
        if members and (len(members) == GROUP or common < len(tokens) // 2):
            yield group_of(members, shared)
            members = []
        shared = common if members else len(tokens) - 1
        members.append((tokens, target))
    if members:
        yield group_of(members, shared)


def group_of(members: Sequence[tuple[list[int], list[int]]], shared: int) -> Group:
    return Group(members[0][0][:shared], [(tokens[shared:] + target, len(target)) for tokens, target in members])


def common_length(left: Sequence[int], right: Sequence[int]) -> int:
    """How many tokens two prompts have in common at their start; their last tokens always stay apart."""
    length = 0
    for one, other in zip(left[:-1], right[:-1], strict=False):
        if one != other:
            break
        length += 1
    return length


def batches(groups: Iterator[Group], size: int, rng: random.Random) -> Iterator[list[Group]]:
    """Batches of groups of like length, in random order within a pool of eight batches."""
    while pool := list(islice(groups, 8 * size)):
        pool.sort(key=len)
        ready = [pool[at : at + size] for at in range(0, len(pool), size)]
        rng.shuffle(ready)
        yield from ready


def loss_of(model: Model, groups: Sequence[Group]) -> torch.Tensor:
    """The mean cross-entropy of the answers' tokens.

    A branch sees the prefix and itself, at the positions that it would have alone: the loss is exactly that of the
    separate sequences.
    """
    length = max(len(group) for group in groups)
    tokens = np.zeros((len(groups), length), np.int64)
    positions = np.zeros((len(groups), length), np.int64)
    branch_of = np.full((len(groups), length), -1)
    sources: list[list[int]] = []  # for each row, the places that answers are predicted from
    targets: list[list[int]] = []
    for row, group in enumerate(groups):
        end = len(group.prefix)
        tokens[row, :end] = group.prefix
        positions[row, :end] = range(end)
        branch_of[row, :end] = 0
        sources.append([])
        targets.append([])
        for number, (branch, answer) in enumerate(group.branches, start=1):
            start, end = end, end + len(branch)
            tokens[row, start:end] = branch
            positions[row, start:end] = range(len(group.prefix), len(group.prefix) + len(branch))
            branch_of[row, start:end] = number
            sources[row] += range(end - answer - 1, end - 1)
            targets[row] += branch[-answer:]
    sees = (branch_of[:, None, :] == 0) | (branch_of[:, None, :] == branch_of[:, :, None])
    sees &= np.tri(length, dtype=bool)
    bias = torch.where(torch.from_numpy(sees), 0.0, -1e9)[:, None]
    places = max(map(len, targets))
    wanted = torch.tensor([row + [0] * (places - len(row)) for row in sources])
    expected = torch.tensor([row + [NOTHING] * (places - len(row)) for row in targets])
    logits = model(torch.from_numpy(tokens), torch.from_numpy(positions), bias, wanted)
    return F.cross_entropy(logits.flatten(0, 1), expected.flatten(), ignore_index=NOTHING)


if __name__ == "__main__":
    main()
