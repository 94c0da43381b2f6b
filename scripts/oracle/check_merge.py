"""Loads every merged form with transformers and sets its logits beside base + adapter's, as the merge report does.

    python scripts/oracle/check_merge.py BASE ADAPTER_FOLDER MERGED_FOLDER... [--original]

BASE is a GGUF file or a folder, held as bitsandbytes' NF4 dequantises it (`--original`: as it is stored). Told per form:
the mean and largest KL divergence of base + adapter from it and the share of flipped words, on fixed prompts; for a
folder in 4 bits also how far the weights that bitsandbytes unpacks are from those that our report rounds to.
"""

import argparse
from pathlib import Path

import torch
from check_adapter import load_base
from peft import PeftModel
from transformers import AutoModelForCausalLM

SEED, PROMPTS, LENGTH = 17, 8, 48


def prompts(vocabulary: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(SEED)
    return torch.randint(0, vocabulary, (PROMPTS, LENGTH), generator=generator)


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return torch.stack([model(row[None]).logits[0].double().log_softmax(-1) for row in ids])


def load_form(folder: Path) -> torch.nn.Module:
    """In f32: 16-bit weights are widened, 4-bit ones stay with bitsandbytes, which then computes and unpacks in f32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            assert state.nested and state.quant_type == "nf4" and state.blocksize == 64, vars(state)
            state.dtype = module.compute_dtype = torch.float32
            module.compute_type_is_set = True
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("merged", type=Path, nargs="+")
    parser.add_argument("--original", action="store_true")
    arguments = parser.parse_args()
    if arguments.original:
        base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32, attn_implementation="eager")
    else:
        base = load_base(arguments.base.resolve())
    adapted = PeftModel.from_pretrained(base, arguments.adapter).eval()
    ids = prompts(base.config.vocab_size)
    reference = log_probabilities(adapted, ids)
    for folder in arguments.merged:
        model = load_form(folder)
        four_bit = sum(hasattr(module.weight, "quant_state") for module in model.modules() if hasattr(module, "weight"))
        other = log_probabilities(model, ids)
        divergence = (reference.exp() * (reference - other)).sum(-1)
        flipped = (reference.argmax(-1) != other.argmax(-1)).double().mean()
        print(
            f"{folder.name}: {four_bit} weights in 4 bits, KL mean {divergence.mean():.3e}, max {divergence.max():.3e}, "
            f"flipped {100 * flipped:.2f} %, log-probabilities at most {(reference - other).abs().max():.3e} apart"
        )


if __name__ == "__main__":
    main()
