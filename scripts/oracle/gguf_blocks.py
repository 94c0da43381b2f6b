"""Writes tests/fixtures/gguf_blocks.safetensors and tests/fixtures/gguf/tiny-*.gguf with the gguf package.

Run from the repository root, after models.py:

    python scripts/oracle/gguf_blocks.py

- Every packed format: random bytes with chosen scales (ordinary, zero, negative, denormal), and what
  gguf.quants.dequantize makes of them.
- tiny-granite and tiny-llama as llama.cpp's converter would write them: its key and tensor names, rows of
  queries and keys reordered, F32 and BF16 (where that loses nothing) mixed.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.numpy import save_file
from safetensors.torch import load_file

FIXTURES = Path("tests/fixtures")
# Byte offsets of the half-precision scales in a block.
SCALES = {
    Type.Q4_0: [0], Type.Q4_1: [0, 2], Type.Q5_0: [0], Type.Q5_1: [0, 2], Type.Q8_0: [0],
    Type.Q4_K: [0, 2], Type.Q5_K: [0, 2], Type.Q6_K: [208],
}
VALUES = [0.0123, -0.5, 0.0, 6e-8, 1.0, -3.7e-4, 61000.0, 2.0 / 3.0]


def blocks(kind: Type, rng: np.random.Generator):
    """Packed rows of one format, and their values."""
    length, size = gguf.GGML_QUANT_SIZES[kind]
    packed = rng.integers(0, 256, (len(VALUES), size), dtype=np.uint8)
    for at, block in enumerate(packed):
        for shift, offset in enumerate(SCALES[kind]):
            scale = np.float16(VALUES[(at + 3 * shift) % len(VALUES)])
            block[offset : offset + 2] = np.frombuffer(scale.tobytes(), dtype=np.uint8)
    packed[0, -16:], packed[1, -16:] = packed[0, -16:] | 0xF0, 0xFF
    if kind == Type.Q6_K:
        packed[:2, 208:] = np.frombuffer(np.float16(0.0123).tobytes(), dtype=np.uint8)
    return packed, gguf.quants.dequantize(packed, kind).astype(np.float32)


def reorder(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a head's two halves become neighbours, as llama.cpp rotates them."""
    out, rest = weight.shape[0], weight.shape[1:]
    return weight.reshape(heads, 2, out // heads // 2, *rest).swapaxes(1, 2).reshape(weight.shape)


def write_model(family: str):
    """A tiny model as one GGUF file."""
    folder = FIXTURES / f"tiny-{family}"
    config = json.loads((folder / "config.json").read_text())
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    arch = {"granite": gguf.MODEL_ARCH.GRANITE, "llama": gguf.MODEL_ARCH.LLAMA}[family]
    (FIXTURES / "gguf").mkdir(exist_ok=True)
    writer = gguf.GGUFWriter(FIXTURES / "gguf" / f"tiny-{family}.gguf", family)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base((config.get("rope_parameters") or config)["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_rope_dimension_count(head_dim)
    writer.add_key_length(head_dim)
    if family == "granite":
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    write_tokenizer(writer, config, tokenizer)
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    for index, (name, tensor) in enumerate(sorted(load_file(folder / "model.safetensors").items())):
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        values = tensor.float().numpy()
        if name.endswith("q_proj.weight"):
            values = reorder(values, config["num_attention_heads"])
        if name.endswith("k_proj.weight"):
            values = reorder(values, config["num_key_value_heads"])
        target = names.get_name(name, try_suffixes=(".weight",))
        exact_in_bf16 = torch.equal(tensor.float().bfloat16().float(), tensor.float())
        if exact_in_bf16 and values.ndim == 2 and index % 2:
            packed = gguf.quants.quantize(values, Type.BF16)
            writer.add_tensor(target, packed, raw_dtype=Type.BF16)
        else:
            writer.add_tensor(target, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter, config: dict, tokenizer: dict):
    added = {token["id"]: token["content"] for token in tokenizer["added_tokens"]}
    vocab = {id: token for token, id in tokenizer["model"]["vocab"].items()} | added
    tokens = [vocab.get(id, f"[PAD{id}]") for id in range(config["vocab_size"])]
    types = [3 if id in added else 1 if id in vocab else 5 for id in range(config["vocab_size"])]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    settings = json.loads((FIXTURES / f"tiny-{writer.arch}" / "tokenizer_config.json").read_text())
    writer.add_chat_template(settings["chat_template"])


def main():
    rng = np.random.default_rng(20)
    tensors = {}
    for kind in SCALES:
        packed, values = blocks(kind, rng)
        tensors[f"{kind.name}.packed"], tensors[f"{kind.name}.values"] = packed, values
    save_file(tensors, FIXTURES / "gguf_blocks.safetensors")
    for family in ["granite", "llama"]:
        write_model(family)


if __name__ == "__main__":
    main()
