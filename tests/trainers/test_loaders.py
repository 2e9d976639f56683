"""What the trainers' own loaders make of an export. `make test-trainers` installs them; `make test` leaves this out.

Trainers are imported in the tests: they read the environment when they are, and warn.
"""

import json
import math
import sys
from argparse import Namespace
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from fastdistill.control.config import parse_pipeline
from fastdistill.data.export.dataset import Format
from fastdistill.data.export.preference import ExportPreference
from fastdistill.data.export.sft import ExportSFT
from tests.servers import choose, openai_server
from tests.world import ANSWERS, config, make_database, write_records

pytestmark = pytest.mark.filterwarnings("ignore")  # those of the trainers

Columns = dict[str, tuple[list[str], str]]
"""By the column of our rows with the answer: a trainer's columns of the whole conversation, and that of the answer."""

CHAT = """\
{% for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@dataclass(frozen=True)
class Exported:
    """A data set `dist`, and beside it `student`: a tiny random model, whose tokenizer learnt from the data."""

    folder: Path
    tokenizer: Any

    def rows(self, path: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "dist" / path).read_bytes().splitlines()]

    def config(self, name: str) -> Any:
        return yaml.safe_load((self.folder / "dist" / "configs" / f"{name}.yaml").read_bytes())

    def taught(self, seen: Iterable[dict[str, Any]], whole: list[str], learnt: str) -> list[tuple[str, str]]:
        """What a trainer made of rows: the conversation, and what of it the loss is on (-100 is not), sorted."""
        tokens = [
            ([token for name in whole for token in row[name]], [t for t in row[learnt] if t != -100]) for row in seen
        ]
        return sorted((self.tokenizer.decode(both), self.tokenizer.decode(answer)) for both, answer in tokens)

    def written(self, path: str, answer: str) -> list[tuple[str, str]]:
        """The same, as the file at `path` says it; `answer` is the column with the answer."""
        found = []
        for row in self.rows(path):
            last = row[answer] if isinstance(row[answer], list) else [row[answer]]
            messages = last if answer == "messages" else row["prompt" if "prompt" in row else "messages"] + last
            text = self.tokenizer.apply_chat_template(messages, tokenize=False)
            found.append((text, messages[-1]["content"] + "<|im_end|>\n"))
        assert found
        return sorted(found)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    folder = tmp_path_factory.mktemp("exported")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_HOME", str(folder / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("DISABLE_VERSION_CHECK", "1")  # LLaMA-Factory's, which wants an older TRL beside it
        with openai_server(choose(ANSWERS)) as server:
            made = config(server.url, write_records(folder), make_database(folder), num_generations=4)
            made["steps"].pop()
            for export, more in ((ExportSFT, {}), (ExportPreference, {"length_ratio": [0, 9]})):
                formats = [name for name in Format if name in export.offered()]
                options = {"formats": formats, "validation": 0.2, "test": 0.2, **more}
                made["steps"].append({export.__name__: options})
            result = parse_pipeline(made).run(output_dir=folder / "artifacts")
        patch.chdir(folder)
        (folder / "dist").symlink_to(result.dataset)
        rows = [json.loads(line) for line in (result.dataset / "sft" / "train.jsonl").read_bytes().splitlines()]
        yield Exported(folder, make_student(folder / "student", rows))


def make_student(folder: Path, rows: list[dict[str, Any]]) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

    tokens = Tokenizer(models.BPE())
    tokens.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokens.decoder = decoders.ByteLevel()
    special, letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], pre_tokenizers.ByteLevel.alphabet()
    how = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=letters, show_progress=False)
    tokens.train_from_iterator((message["content"] for row in rows for message in row["messages"]), how)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, eos_token=special[2], pad_token=special[0])
    tokenizer.chat_template = CHAT
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    student = Qwen2Config(vocab_size=len(tokenizer), max_position_embeddings=1024, **sizes, **heads)
    Qwen2ForCausalLM(student).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return tokenizer


@pytest.mark.parametrize(
    ("kind", "folder", "columns"),
    [
        ("sft", "sft_pc", {"completion": (["input_ids"], "labels")}),
        (
            "dpo",
            "preference",
            {name: (["prompt_ids", f"{name}_ids"], f"{name}_ids") for name in ("chosen", "rejected")},
        ),
        ("kto", "kto", {"completion": (["prompt_ids", "completion_ids"], "completion_ids")}),
    ],
)
def test_trl_learns_the_answers(exported: Exported, kind: str, folder: str, columns: Columns) -> None:
    import datasets
    import trl

    config_class, trainer_class = (getattr(trl, f"{kind.upper()}{name}") for name in ("Config", "Trainer"))
    parser = trl.TrlParser((trl.ScriptArguments, config_class, trl.ModelConfig))
    small = "--model_name_or_path student --max_steps 1 --eval_strategy steps --eval_steps 1 --logging_steps 1"
    here = "--use_cpu true --bf16 false --report_to none --disable_tqdm true"
    command = ["--config", f"dist/configs/trl_{kind}.yaml", *small.split(), *here.split()]
    script, how, model = parser.parse_args_and_config(command)
    data = datasets.load_dataset(script.dataset_name, script.dataset_config)
    assert script.dataset_test_split == "validation"
    trainer = trainer_class(
        model=model.model_name_or_path,
        args=how,
        train_dataset=data["train"],
        eval_dataset={name: data[name] for name in ("validation", "test")},
        peft_config=trl.get_peft_config(model),
    )
    for split, seen in {"train": trainer.train_dataset, **trainer.eval_dataset}.items():
        for answer, (whole, learnt) in columns.items():
            assert exported.taught(seen, whole, learnt) == exported.written(f"{folder}/{split}.jsonl", answer)
        if kind == "kto":
            assert list(seen["label"]) == [row["label"] for row in exported.rows(f"kto/{split}.jsonl")]
    trainer.train()
    log = {key: value for entry in trainer.state.log_history for key, value in entry.items()}
    assert log["grad_norm"] > 0
    assert all(math.isfinite(log[name]) for name in ("loss", "eval_validation_loss", "eval_test_loss"))


def test_mlx_lm_learns_the_answers(exported: Exported) -> None:
    from mlx_lm.lora import CONFIG_DEFAULTS
    from mlx_lm.tokenizer_utils import TokenizerWrapper
    from mlx_lm.tuner.datasets import CacheDataset, ChatDataset, load_dataset
    from mlx_lm.tuner.trainer import iterate_batches

    config = exported.config("mlx_lora")
    assert config.keys() <= CONFIG_DEFAULTS.keys()
    how = Namespace(**CONFIG_DEFAULTS | config)
    splits = dict(zip(("train", "valid", "test"), load_dataset(how, TokenizerWrapper(exported.tokenizer)), strict=True))
    for name, read in splits.items():
        assert type(read) is ChatDataset
        seen = [{"whole": tokens, "learnt": tokens[start:]} for tokens, start in map(read.process, read)]
        assert exported.taught(seen, ["whole"], "learnt") == exported.written(f"mlx/{name}.jsonl", "messages")
    batches = {
        name: len(list(iterate_batches(CacheDataset(read), how.batch_size, how.max_seq_length)))
        for name, read in splits.items()
        if name != "test"  # which it reads in a run of its own
    }
    assert batches["valid"] > 0
    assert how.iters == 2 * batches["train"]


@pytest.mark.parametrize(
    ("stage", "name", "file", "columns"),
    [
        ("sft", "fd_sft", "sft/{}.jsonl", {"messages": (["input_ids"], "labels")}),
        (
            "dpo",
            "fd_preference",
            "lf/preference_{}.jsonl",
            {name: ([f"{name}_input_ids"], f"{name}_labels") for name in ("chosen", "rejected")},
        ),
        ("kto", "fd_kto", "lf/kto_{}.jsonl", {"messages": (["input_ids"], "labels")}),
    ],
)
def test_llamafactory_learns_the_answers(
    exported: Exported, stage: str, name: str, file: str, columns: Columns, monkeypatch: pytest.MonkeyPatch
) -> None:
    import peft  # noqa: F401  asks what is installed, so before the next line

    # It imports this for sounds, and its wheel needs the libraries of CUDA.
    monkeypatch.setitem(sys.modules, "torchaudio", ModuleType("torchaudio"))
    from llamafactory.data import get_dataset, get_template_and_fix_tokenizer
    from llamafactory.hparams import get_train_args

    config = exported.config(f"llamafactory_{stage}") | {"model_name_or_path": "student", "bf16": False}
    del config["warmup_ratio"]  # of the versions of transformers that it is made for, not of the one here
    found: dict[str, Any] = {}
    for split in ("validation", "test"):
        config["eval_dataset"] = {"validation": f"{name}_valid", "test": f"{name}_test"}[split]
        model, data, training, _, _ = get_train_args(config)
        template = get_template_and_fix_tokenizer(exported.tokenizer, data)
        kind = "rm" if stage == "dpo" else stage  # as its own DPO calls it
        read = get_dataset(template, model, data, training, stage=kind, tokenizer=exported.tokenizer)
        found |= {"train": read["train_dataset"], split: read["eval_dataset"]}
    for split, seen in found.items():
        for answer, (whole, learnt) in columns.items():
            assert exported.taught(seen, whole, learnt) == exported.written(file.format(split), answer)
        if stage == "kto":
            assert list(seen["kto_tags"]) == [row["label"] for row in exported.rows(file.format(split))]
