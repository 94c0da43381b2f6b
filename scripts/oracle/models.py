"""Writes the tiny models of tests/fixtures and what transformers, PEFT and bitsandbytes make of them.

Every reference value is computed twice: in float32 with the libraries as they are, and in float64 with
their float32 islands (RMSNorm, rotary angles, softmax) lifted. The fixture holds the float64 value, rounded
once to float32, and the largest distance of the float32 run from it. A test may be off by twice that
distance, so its tolerance is the reference's own error and never a literal.

    python scripts/oracle/models.py [FOLDER]
"""

import json
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from nf4 import nearest_codes
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"
PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IGNORE = -100
# 256 bytes and three special tokens: odd on purpose, like Granite's 49,155.
SPECIAL = ["<|end_of_text|>", "<|start_of_role|>", "<|end_of_role|>"]
VOCAB = 256 + len(SPECIAL)
# A packed row: lengths 1, odd, even; where each supervised stretch begins and ends (token positions).
LENGTHS = [1, 7, 13, 16, 5]
SUPERVISED = [(0, 1), (3, 7), (4, 9), (1, 16), (5, 5)]
ADAMW = {"lr": 1e-2, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.1}
STEPS = 3


@dataclass(frozen=True)
class Tiny:
    """One tiny model and its adapter."""

    name: str
    config: dict
    stored: torch.dtype
    rank: int
    alpha: int
    rslora: bool
    seed: int


# The keys are those of the published Granite 3.1 configuration. Every multiplier differs from 1, the attention
# multiplier from 1/sqrt(head_dim) = 0.25; the head is tied; two query heads share a key head.
GRANITE = Tiny(
    name="tiny-granite",
    config={
        "architectures": ["GraniteForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.1,
        "attention_multiplier": 0.11,
        "bos_token_id": 0,
        "embedding_multiplier": 1.3,
        "eos_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": 64,
        "initializer_range": 0.02,
        "intermediate_size": 112,
        "logits_scaling": 1.7,
        "max_position_embeddings": 4096,
        "mlp_bias": False,
        "model_type": "granite",
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "num_key_value_heads": 2,
        "pad_token_id": 0,
        "residual_multiplier": 0.6,
        "rms_norm_eps": 1e-05,
        "rope_scaling": None,
        "rope_theta": 10000000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "transformers_version": "4.47.0",
        "use_cache": True,
        "vocab_size": VOCAB,
    },
    stored=torch.bfloat16,
    rank=4,
    alpha=16,
    rslora=False,
    seed=1,
)

# Llama in the newer form of the configuration (`rope_parameters`, `dtype`). Three query heads share one key head,
# and the heads together are wider (96) than the residual stream (48); the head is not tied.
LLAMA = Tiny(
    name="tiny-llama",
    config={
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "dtype": "float32",
        "eos_token_id": 2,
        "head_dim": 32,
        "hidden_act": "silu",
        "hidden_size": 48,
        "initializer_range": 0.02,
        "intermediate_size": 80,
        "max_position_embeddings": 512,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": 3,
        "num_hidden_layers": 2,
        "num_key_value_heads": 1,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-06,
        "rope_parameters": {"rope_theta": 500.0, "rope_type": "default"},
        "tie_word_embeddings": False,
        "transformers_version": "5.17.0",
        "use_cache": True,
        "vocab_size": VOCAB,
    },
    stored=torch.float32,
    rank=8,
    alpha=16,
    rslora=True,
    seed=2,
)


def weights(tiny: Tiny) -> dict[str, torch.Tensor]:
    """Random weights under checkpoint names, scaled so that every branch matters and logits spread by about 2."""
    random = torch.Generator().manual_seed(tiny.seed)
    config = AutoConfig.for_model(**tiny.config)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in AutoModelForCausalLM.from_config(config).named_parameters()}
    out = {}
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=random)
        if name == "model.norm.weight":
            pass  # Signs mixed: else a tied head mostly predicts the token it has just read.
        elif name.endswith("norm.weight"):
            value = 1.0 + 0.3 * value
        elif "embed_tokens" in name:
            value = 0.5 * value
        else:
            value = 1.5 * value / shape[-1] ** 0.5
        out[name] = value.to(tiny.stored)
    return out


def nf4(weight: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """A weight through bitsandbytes' NF4 with double quantisation: dequantised, and the parts as it stores them.

    The 8-bit codes of the scales are the nearest levels, as its CUDA kernel finds them; its CPU library misses some
    (nf4.py tells the story).
    """
    packed, state = bnb.quantize_4bit(weight.float(), blocksize=64, compress_statistics=True, quant_type="nf4")
    _, plain = bnb.quantize_4bit(weight.float(), blocksize=64, quant_type="nf4")
    state.offset = plain.absmax.double().mean().float()
    state.absmax, state.state2.absmax = nearest_codes(plain.absmax, state.offset, state.state2.code)
    parts = {
        "packed": packed.flatten(),
        "absmax": state.absmax,
        "nested_absmax": state.state2.absmax,
        "nested_offset": state.offset.reshape(1),
    }
    return bnb.dequantize_4bit(packed, state, quant_type="nf4").float(), parts


def exact_attention(module, query, key, value, attention_mask, scaling, dropout=0.0, **_):
    """Eager attention whose softmax stays in the dtype of its input."""
    groups = module.num_key_value_groups
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    scores = query @ key.transpose(2, 3) * scaling
    length = scores.shape[-1]
    future = torch.ones(scores.shape[-2], length, dtype=torch.bool).triu(1 + length - scores.shape[-2])
    weights_ = scores.masked_fill(future, float("-inf")).softmax(-1)
    return (weights_ @ value).transpose(1, 2).contiguous(), weights_


ALL_ATTENTION_FUNCTIONS.register("exact", exact_attention)


def lift_to_float64(model: torch.nn.Module) -> torch.nn.Module:
    """Casts a model to float64 and replaces the parts that transformers computes in float32 whatever the dtype."""
    model = model.double()
    theta = model.config.rope_parameters["rope_theta"]
    for module in model.modules():
        kind = type(module).__name__
        if kind.endswith("RMSNorm"):

            def norm(x, self=module):
                return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

            module.forward = norm
        elif kind.endswith("RotaryEmbedding"):
            width = getattr(model.config, "head_dim", None)
            width = width or model.config.hidden_size // model.config.num_attention_heads

            def rotary(x, position_ids, width=width):
                inverse = theta ** -(torch.arange(0, width, 2, dtype=torch.float64) / width)
                angles = position_ids[:, :, None].double() * inverse
                angles = torch.cat((angles, angles), dim=-1)
                return angles.cos(), angles.sin()

            module.forward = rotary
    return model


def build(tiny: Tiny, state: dict[str, torch.Tensor], dtype: torch.dtype) -> torch.nn.Module:
    """The transformers model with these weights, in `dtype`."""
    exact = dtype == torch.float64
    config = AutoConfig.for_model(**tiny.config)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="exact" if exact else "eager").float()
    missing, unexpected = model.load_state_dict({k: v.float() for k, v in state.items()}, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}, (missing, unexpected)
    model.tie_weights()
    model.eval()
    return lift_to_float64(model) if exact else model


def lora_config(tiny: Tiny) -> LoraConfig:
    return LoraConfig(
        r=tiny.rank,
        lora_alpha=tiny.alpha,
        lora_dropout=0.0,
        use_rslora=tiny.rslora,
        target_modules=list(PROJECTIONS),
        bias="none",
        task_type="CAUSAL_LM",
    )


def adapt(tiny: Tiny, model: torch.nn.Module, dtype: torch.dtype) -> torch.nn.Module:
    """Attaches the adapter, with random `lora_B` so that no gradient is zero by construction."""
    adapted = get_peft_model(model, lora_config(tiny))
    random = torch.Generator().manual_seed(100 + tiny.seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                draw = torch.randn(parameter.shape, generator=random) / parameter.shape[-1] ** 0.5
                parameter.copy_(draw * (0.15 if "lora_B" in name else 0.5))
    return adapted.to(dtype).eval()


def packed_batch(tiny: Tiny) -> dict[str, torch.Tensor]:
    """A packed row: ids, shifted labels, positions, and where its sequences lie."""
    random = torch.Generator().manual_seed(200 + tiny.seed)
    total = sum(LENGTHS)
    ids = torch.randint(0, VOCAB, (total,), generator=random)
    labels, positions, starts = torch.full((total,), IGNORE), [], [0]
    for length, (begin, end) in zip(LENGTHS, SUPERVISED):
        start = starts[-1]
        # The label of a position is the next token, where that one is supervised; the first token never is.
        for at in range(max(begin, 1), end):
            labels[start + at - 1] = ids[start + at]
        positions += range(length)
        starts.append(start + length)
    return {
        "input_ids": ids,
        "labels": labels,
        "position_ids": torch.tensor(positions),
        "cu_seqlens": torch.tensor(starts),
    }


def spans(batch):
    starts = batch["cu_seqlens"].tolist()
    return list(zip(starts[:-1], starts[1:]))


def logits_of(model, batch) -> torch.Tensor:
    """Logits of the packed row, each sequence run on its own."""
    parts = [model(input_ids=batch["input_ids"][None, a:b], use_cache=False).logits[0] for a, b in spans(batch)]
    return torch.cat(parts)


def losses_of(logits, batch) -> torch.Tensor:
    """Loss sum of each sequence in nats."""
    token = torch.nn.functional.cross_entropy(logits, batch["labels"], ignore_index=IGNORE, reduction="none")
    return torch.stack([token[a:b].sum() for a, b in spans(batch)])


def adapter_tensors(model, what) -> dict[str, torch.Tensor]:
    """LoRA tensors under the program's names, without PEFT's prefix and the adapter's name."""
    out = {}
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            key = name.removeprefix("base_model.model.").replace(".default.", ".")
            out[key] = what(parameter).detach().clone()
    return out


def run(tiny, state, batch, dtype) -> dict[str, torch.Tensor]:
    """Everything the fixture refers to, in one dtype."""
    supervised = int((batch["labels"] != IGNORE).sum())
    model = build(tiny, state, dtype)
    with torch.no_grad():
        base = logits_of(model, batch)
    out = {"base.logits": base, "base.loss": losses_of(base, batch)}
    model = adapt(tiny, model, dtype)
    with torch.no_grad():
        out["logits"] = logits_of(model, batch)
    parameters = [p for name, p in model.named_parameters() if "lora_" in name]
    optimizer = torch.optim.AdamW(parameters, **ADAMW)
    for step in range(STEPS):
        optimizer.zero_grad()
        losses = losses_of(logits_of(model, batch), batch)
        (losses.sum() / supervised).backward()
        out[f"loss.{step}"] = losses.detach()
        if step == 0:
            out |= {f"grad.{k}": v for k, v in adapter_tensors(model, lambda p: p.grad).items()}
        optimizer.step()
    out |= {f"after.{k}": v for k, v in adapter_tensors(model, lambda p: p).items()}
    return {name: value.detach() for name, value in out.items()}


def generate(tiny, state, batch) -> dict:
    """Sixteen greedy tokens after a prompt, with the key-value cache and the adapter; no token may be a near tie."""
    model = adapt(tiny, build(tiny, state, torch.float32), torch.float32)
    prompt = batch["input_ids"][None, 8:21]
    out = model.generate(
        input_ids=prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=16,
        do_sample=False,
        use_cache=True,
        eos_token_id=None,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    top = torch.stack(out.logits).squeeze(1).topk(2).values
    margin = (top[:, 0] - top[:, 1]).min().item()
    tokens = out.sequences[0, prompt.shape[1] :].tolist()
    assert margin > 1e-3 and len(set(tokens)) > 6, (margin, tokens)
    return {"prompt": prompt[0].tolist(), "tokens": tokens, "margin": margin}


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges: the special tokens first, then the 256 bytes in their printable form."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: at for at, token in enumerate(SPECIAL + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    template = (
        "{%- for message in messages %}"
        "{{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\\n' }}"
        "{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{%- endif %}"
    )
    settings = {
        "add_bos_token": False,
        "bos_token": SPECIAL[0],
        "chat_template": template,
        "clean_up_tokenization_spaces": False,
        "eos_token": SPECIAL[0],
        "model_max_length": 4096,
        "pad_token": SPECIAL[0],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def write_adapter(tiny, state, folder: Path) -> None:
    """The adapter as PEFT writes it; the base's path and the generated model card do not belong in a fixture."""
    shutil.rmtree(folder, ignore_errors=True)
    adapt(tiny, build(tiny, state, torch.float32), torch.float32).save_pretrained(folder)
    (folder / "README.md").unlink()
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    settings["base_model_name_or_path"] = tiny.name
    settings["target_modules"] = sorted(settings["target_modules"])
    path.write_text(json.dumps(settings, indent=2) + "\n")


def write(tiny: Tiny, root: Path) -> None:
    folder = root / tiny.name
    folder.mkdir(parents=True, exist_ok=True)
    state = weights(tiny)
    (folder / "config.json").write_text(json.dumps(tiny.config, indent=2) + "\n")
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    write_tokenizer(folder)
    write_adapter(tiny, state, folder / "adapter")

    batch = packed_batch(tiny)
    tensors = {f"batch.{name}": value for name, value in batch.items()}
    errors = {}
    quantised = {}
    dequantised = dict(state)
    for name, value in state.items():
        if name.split(".")[-2] in PROJECTIONS:
            dequantised[name], parts = nf4(value)
            quantised |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
    for variant, base in (("none", state), ("nf4", dequantised)):
        single, double = run(tiny, base, batch, torch.float32), run(tiny, base, batch, torch.float64)
        for name, reference in double.items():
            # The adapter after the steps is kept once: NF4 changes the weights, not the optimiser.
            if variant == "nf4" and (name.startswith("after.") or name == "base.logits"):
                continue
            tensors[f"{variant}.{name}"] = reference.float()
            errors[f"{variant}.{name}"] = (single[name].double() - reference).abs().max().item()
    tensors |= {f"nf4.weight.{name}": value for name, value in quantised.items()}
    save_file({name: value.contiguous() for name, value in tensors.items()}, folder / "oracle.safetensors")
    notes = {
        "lora": {"rank": tiny.rank, "alpha": tiny.alpha, "rslora": tiny.rslora},
        "adamw": ADAMW,
        "steps": STEPS,
        "generation": generate(tiny, state, batch),
        "errors": errors,
    }
    (folder / "oracle.json").write_text(json.dumps(notes, indent=1) + "\n")
    spread = tensors["none.logits"].std().item()
    print(f"{folder}: logits spread {spread:.2f}, losses {tensors['none.loss.0'].tolist()}", file=sys.stderr)


def main() -> None:
    torch.set_num_threads(1)
    root = Path(sys.argv[1]) if len(sys.argv) > 1 else FIXTURES
    for tiny in (GRANITE, LLAMA):
        write(tiny, root)


if __name__ == "__main__":
    main()
