"""Reference configs for the trainers that read a data set, and LLaMA-Factory's index of it. Imports no trainer.

Values are those for a student of 0.5 to 1.5 billion parameters and 1,000 to 10,000 rows. Trainers are run in the folder
above the data set's: `datasets` can't load `.`.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from fastdistill.data.export.dataset import FILES, Format

STUDENT = "Qwen/Qwen2.5-0.5B-Instruct"
LLAMAFACTORY = dict(zip(("fd_sft", "fd_preference", "fd_kto"), FILES[Format.LLAMAFACTORY].values(), strict=True))
"""The files of its data sets by name."""


def trainer_files(folder: str, files: Mapping[str, int]) -> dict[str, str]:
    """Text by path, for a data set's folder and the rows of the data files in it (`sft_pc/train.parquet` ...)."""
    texts = {
        f"configs/{name}.yaml": f"# {command} {folder}/configs/{name}.yaml\n{yaml.safe_dump(config, sort_keys=False)}"
        for name, command, config in _configs(folder, files)
    }
    if index := _llamafactory_index(files):
        texts["dataset_info.json"] = json.dumps(index, indent=2) + "\n"
    return texts


def _configs(folder: str, files: Mapping[str, int]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, command and content of each config."""
    sft: dict[str, Any] = {"learning_rate": 2e-4, "num_train_epochs": 2}
    dpo: dict[str, Any] = {"learning_rate": 5e-6, "num_train_epochs": 1}
    losses = {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
    kinds = {"sft": ("sft_pc", sft), "dpo": ("preference", dpo | losses), "kto": ("kto", dpo | {"beta": 0.1})}
    for kind, (config, how) in kinds.items():
        if f"{config}/train.parquet" in files:
            yield f"trl_{kind}", f"trl {kind} --config", _trl(folder, config, files) | how
    if "sft/train.parquet" in files:
        sets = _axolotl(folder, "sft", files, type="chat_template")
        yield "axolotl_sft", "axolotl train", {**sets, "learning_rate": 2e-4, "num_epochs": 2}
    if "preference/train.parquet" in files:
        sets = _axolotl(folder, "preference", files, type="chat_template.default", field_messages="prompt")
        how = {"rl": "dpo", "rl_beta": 0.1, "learning_rate": 5e-6, "num_epochs": 1}
        yield "axolotl_dpo", "axolotl train", sets | how
    beta, losses = {"pref_beta": 0.1}, {"pref_loss": "sigmoid", "pref_ftx": 0.2}
    stages = {"fd_sft": ("sft", sft), "fd_preference": ("dpo", dpo | beta | losses), "fd_kto": ("kto", dpo | beta)}
    for name, (stage, how) in stages.items():
        if LLAMAFACTORY[name].format(split="train") in files:
            sets = _llamafactory(folder, name, LLAMAFACTORY[name].format(split="validation") in files)
            yield f"llamafactory_{stage}", "llamafactory-cli train", {"stage": stage, **sets, **how}
    if rows := files.get("mlx/train.jsonl"):
        # `scale` is alpha / rank itself; it reads the folder, so the splits have no names here. A split with fewer
        # rows than a batch is refused, and the rest of an epoch that fills no batch is left out (tuner/trainer.py).
        batch = min(16, rows, files.get("mlx/valid.jsonl", rows))
        yield "mlx_lora", "mlx_lm.lora -c", {
            "model": STUDENT, "train": True, "data": f"./{folder}/mlx", "mask_prompt": True, "fine_tune_type": "lora",
            "num_layers": -1, "lora_parameters": {"rank": 16, "scale": 2.0, "dropout": 0.0},
            "learning_rate": 2e-4, "batch_size": batch, "iters": sft["num_train_epochs"] * (rows // batch),
            "max_seq_length": 1024, "seed": 42,
        }  # fmt: skip


def _trl(folder: str, config: str, files: Mapping[str, int]) -> dict[str, Any]:
    evaluated = {"dataset_test_split": "validation", "eval_strategy": "epoch"}
    return {
        "model_name_or_path": STUDENT,
        "dataset_name": f"./{folder}",
        "dataset_config": config,
        **(evaluated if f"{config}/validation.parquet" in files else {}),
        "use_peft": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_modules": ["all-linear"],
        "lr_scheduler_type": "cosine", "warmup_steps": 0.03, "max_length": 1024,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "bf16": True, "seed": 42,
        "output_dir": f"student-{config}",
    }  # fmt: skip


def _axolotl(folder: str, config: str, files: Mapping[str, int], **how: str) -> dict[str, Any]:
    splits = {"datasets": "train"} | (
        {"test_datasets": "validation"} if f"{config}/validation.parquet" in files else {}
    )
    return {
        "base_model": STUDENT,
        **{key: [{"path": f"./{folder}", "name": config, "split": split, **how}] for key, split in splits.items()},
        "adapter": "lora", "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target_linear": True,
        "lr_scheduler": "cosine", "warmup_ratio": 0.03, "sequence_len": 1024, "sample_packing": False,
        "micro_batch_size": 8, "gradient_accumulation_steps": 2, "bf16": True, "seed": 42,
        "output_dir": f"student-{config}",
    }  # fmt: skip


def _llamafactory(folder: str, dataset: str, evaluated: bool) -> dict[str, Any]:
    return {
        "model_name_or_path": STUDENT, "template": "qwen", "do_train": True,
        "dataset_dir": f"./{folder}", "dataset": dataset,
        **({"eval_dataset": f"{dataset}_valid", "eval_strategy": "epoch"} if evaluated else {}),
        "finetuning_type": "lora", "lora_rank": 16, "lora_alpha": 32, "lora_dropout": 0.0, "lora_target": "all",
        "lr_scheduler_type": "cosine", "warmup_ratio": 0.03, "cutoff_len": 1024, "packing": False,
        "per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "bf16": True, "seed": 42,
        "output_dir": f"student-{dataset}",
    }  # fmt: skip


def _llamafactory_index(files: Mapping[str, int]) -> dict[str, Any]:
    """`dataset_info.json`. Never `formatting: openai`, which adds words of its own to every system prompt.

    A `file_name` is a file: of a folder, everything in it would be read.
    """
    tags = {
        "role_tag": "role", "content_tag": "content",
        "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
    }  # fmt: skip
    pairs: dict[str, Any] = {"ranking": True, "columns": {name: name for name in ("messages", "chosen", "rejected")}}
    kinds = {"fd_preference": pairs, "fd_kto": {"columns": {"messages": "messages", "kto_tag": "label"}}}
    how = {"formatting": "sharegpt", "columns": {"messages": "messages"}, "tags": tags}
    return {
        name + suffix: {"file_name": path, **how, **kinds.get(name, {})}
        for name, file in LLAMAFACTORY.items()
        for split, suffix in (("train", ""), ("validation", "_valid"), ("test", "_test"))
        if (path := file.format(split=split)) in files
    }
