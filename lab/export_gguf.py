"""Write a trained model as a GGUF file, which llama.cpp (for instance through `xllamacpp`) serves.

python -m lab.export_gguf --model src/fastdistill/model/embedded --output teacher.gguf
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from gguf import GGMLQuantizationType, GGUFWriter, TokenType

from fastdistill.model.embedded.bpe import SPECIAL_TOKENS
from fastdistill.model.embedded.network import load_weights

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def main() -> None:
    parser = argparse.ArgumentParser(description="Write a trained model as GGUF (float16).")
    parser.add_argument("--model", type=Path, default=Path("src/fastdistill/model/embedded"))
    parser.add_argument("--output", type=Path, default=Path("teacher.gguf"))
    arguments = parser.parse_args()
    export(arguments.model, arguments.output)


def export(folder: Path, output: Path) -> None:
    """Write the model of a folder; matrices in float16, norms in float32 as llama.cpp wants them."""
    weights = load_weights(folder)
    shape, tokenizer = weights.architecture, weights.tokenizer
    letters = byte_letters()
    vocabulary = tokenizer.vocabulary
    plain = vocabulary[: -len(SPECIAL_TOKENS)]
    spelled = ["".join(letters[byte] for byte in token) for token in plain]

    writer = GGUFWriter(output, "qwen3")
    writer.add_name("fastdistill-embedded-teacher")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(shape.rope_theta)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list([*spelled, *SPECIAL_TOKENS])
    writer.add_token_types([TokenType.NORMAL] * len(plain) + [TokenType.CONTROL] * len(SPECIAL_TOKENS))
    writer.add_token_merges([f"{spelled[left]} {spelled[right]}" for left, right in tokenizer.merges])
    writer.add_eos_token_id(tokenizer.im_end)
    writer.add_pad_token_id(tokenizer.end_of_text)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    for name, tensor in weights.tensors.items():
        if tensor.ndim == 1:
            writer.add_tensor(name, tensor)
        else:
            writer.add_tensor(name, tensor.astype(np.float16), raw_dtype=GGMLQuantizationType.F16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def byte_letters() -> list[str]:
    """GPT-2's printable letter for each byte, in which `tokenizers` and GGUF files spell tokens."""
    plain = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


if __name__ == "__main__":
    main()
