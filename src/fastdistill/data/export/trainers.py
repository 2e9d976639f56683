"""Reference configs for the trainers that read a data set, and LLaMA-Factory's index of it. Imports no trainer.

Values are those for a student of 0.5 to 1.5 billion parameters and 1,000 to 10,000 rows. Trainers are run in the folder
above the data set's: `datasets` can't load `.`.
"""

import json
from collections.abc import Collection, Iterator
from typing import Any

import yaml

STUDENT = "Qwen/Qwen2.5-0.5B-Instruct"


def trainer_files(folder: str, files: Collection[str]) -> dict[str, str]:
    """Text by path, for a data set's folder and the data files in it (`sft_pc/train.parquet` ...)."""
    texts = {
        f"configs/{name}.yaml": f"# {command} {folder}/configs/{name}.yaml\n{yaml.safe_dump(config, sort_keys=False)}"
        for name, command, config in _configs(folder, files)
    }
    if index := _llamafactory_index(files):
        texts["dataset_info.json"] = json.dumps(index, indent=2) + "\n"
    return texts


def _configs(folder: str, files: Collection[str]) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, command and content of each config."""
    sft: dict[str, Any] = {"learning_rate": 2e-4, "num_train_epochs": 2}
    dpo: dict[str, Any] = {"learning_rate": 5e-6, "num_train_epochs": 1}
    if "sft_pc/train.parquet" in files:
        yield "trl_sft", "trl sft --config", _trl(folder, "sft_pc", files) | sft
    if "preference/train.parquet" in files:
        losses = {"beta": 0.1, "loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.2]}
        yield "trl_dpo", "trl dpo --config", _trl(folder, "preference", files) | dpo | losses
        yield "axolotl_dpo", "axolotl train", {
            **_axolotl(folder, "preference", files, type="chat_template.default", field_messages="prompt"),
            "rl": "dpo", "rl_beta": 0.1, "learning_rate": 5e-6, "num_epochs": 1,
        }  # fmt: skip
    if "kto/train.parquet" in files:
        yield "trl_kto", "trl kto --config", _trl(folder, "kto", files) | dpo | {"beta": 0.1}
    if "sft/train.parquet" in files:
        sets = _axolotl(folder, "sft", files, type="chat_template")
        yield "axolotl_sft", "axolotl train", {**sets, "learning_rate": 2e-4, "num_epochs": 2}
        llamafactory = {"stage": "sft", **_llamafactory(folder, "fd_sft", "sft/validation.parquet" in files)}
        yield "llamafactory_sft", "llamafactory-cli train", llamafactory | sft
    if "lf/preference_train.jsonl" in files:
        llamafactory = _llamafactory(folder, "fd_preference", "lf/preference_validation.jsonl" in files)
        losses = {"pref_beta": 0.1, "pref_loss": "sigmoid", "pref_ftx": 0.2}
        yield "llamafactory_dpo", "llamafactory-cli train", {"stage": "dpo", **llamafactory, **losses, **dpo}
    if "mlx/train.jsonl" in files:
        # `scale` is alpha / rank itself; it reads the folder, so the splits have no names here.
        yield "mlx_lora", "mlx_lm.lora -c", {
            "model": STUDENT, "train": True, "data": f"./{folder}/mlx", "mask_prompt": True, "fine_tune_type": "lora",
            "num_layers": -1, "lora_parameters": {"rank": 16, "scale": 2.0, "dropout": 0.0},
            "learning_rate": 2e-4, "batch_size": 16, "iters": 1000, "max_seq_length": 1024, "seed": 42,
        }  # fmt: skip


def _trl(folder: str, config: str, files: Collection[str]) -> dict[str, Any]:
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


def _axolotl(folder: str, config: str, files: Collection[str], **how: str) -> dict[str, Any]:
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


def _llamafactory_index(files: Collection[str]) -> dict[str, Any]:
    """`dataset_info.json`. Never `formatting: openai`, which adds words of its own to every system prompt.

    A `file_name` is a file: of a folder, everything in it would be read.
    """
    tags = {
        "role_tag": "role", "content_tag": "content",
        "user_tag": "user", "assistant_tag": "assistant", "system_tag": "system",
    }  # fmt: skip
    sets = {
        "fd_sft": ("sft/train.parquet", ("messages",), {}),
        "fd_sft_valid": ("sft/validation.parquet", ("messages",), {}),
        "fd_preference": ("lf/preference_train.jsonl", ("messages", "chosen", "rejected"), {"ranking": True}),
        "fd_preference_valid": (
            "lf/preference_validation.jsonl",
            ("messages", "chosen", "rejected"),
            {"ranking": True},
        ),
    }
    return {
        name: {"file_name": file, "formatting": "sharegpt", **more, "columns": {c: c for c in columns}, "tags": tags}
        for name, (file, columns, more) in sets.items()
        if file in files
    }
