"""Loads every merged form with transformers and sets its logits beside base + adapter's, as the merge report does.

    python scripts/oracle/check_merge.py BASE ADAPTER_FOLDER MERGED_FOLDER... [--original] [--rows VALIDATION.parquet N]

BASE is a GGUF file or a folder, held as bitsandbytes' NF4 dequantises it (`--original`: as it is stored). Told per form:
the mean and largest KL divergence of base + adapter from it and the share of flipped words, on fixed
prompts, or on the first N rows that a merge report measured: the report's own figures then, from another program.
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


def measured(path: Path, rows: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Sequences of packed rows, with the positions from which a supervised token is predicted."""
    import pyarrow.parquet

    sequences = []
    for row in pyarrow.parquet.read_table(path).slice(0, rows).to_pylist():
        start = 0
        for length in row["seq_lengths"]:
            ids = torch.tensor(row["input_ids"][start : start + length])
            mask = torch.tensor(row["loss_mask"][start : start + length])
            sequences.append((ids, mask[1:].nonzero()[:, 0]))
            start += length
    return sequences


@torch.no_grad()
def log_probabilities(model: torch.nn.Module, sequences) -> torch.Tensor:
    each = [model(ids[None]).logits[0, positions].double().log_softmax(-1) for ids, positions in sequences]
    return torch.cat(each)


def load_form(folder: Path) -> torch.nn.Module:
    """In f32: 16-bit weights are widened, 4-bit ones stay with bitsandbytes, which then computes and unpacks in f32."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager").eval()
    for module in model.modules():
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is not None:
            assert state.nested and state.quant_type == "nf4" and state.blocksize == 64, vars(state)
            state.dtype = module.compute_dtype = torch.float32
            module.compute_type_is_set = True
            # Its kernel for processors with AVX512-BF16 rounds to bf16 whatever the compute dtype.
            module.support_avx512bf16_for_cpu = False
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("merged", type=Path, nargs="+")
    parser.add_argument("--original", action="store_true")
    parser.add_argument("--rows", nargs=2, metavar=("FILE", "N"))
    arguments = parser.parse_args()
    if arguments.original:
        base = AutoModelForCausalLM.from_pretrained(arguments.base, dtype=torch.float32, attn_implementation="eager")
    else:
        base = load_base(arguments.base.resolve())
    adapted = PeftModel.from_pretrained(base, arguments.adapter).eval()
    if arguments.rows:
        sequences = measured(Path(arguments.rows[0]), int(arguments.rows[1]))
    else:
        sequences = [(ids, torch.arange(LENGTH)) for ids in prompts(base.config.vocab_size)]
    labels = torch.cat([ids[(positions + 1) % len(ids)] for ids, positions in sequences])
    reference = log_probabilities(adapted, sequences)
    print(f"base + adapter: {len(labels)} tokens, loss {-reference.gather(1, labels[:, None]).mean():.4f}")
    for folder in arguments.merged:
        model = load_form(folder)
        four_bit = sum(hasattr(module.weight, "quant_state") for module in model.modules() if hasattr(module, "weight"))
        other = log_probabilities(model, sequences)
        divergence = (reference.exp() * (reference - other)).sum(-1)
        flipped = (reference.argmax(-1) != other.argmax(-1)).double().mean()
        print(
            f"{folder.name}: {four_bit} weights in 4 bits, loss {-other.gather(1, labels[:, None]).mean():.4f}, "
            f"KL mean {divergence.mean():.3e}, max {divergence.max():.3e}, "
            f"flipped {100 * flipped:.2f} %, log-probabilities at most {(reference - other).abs().max():.3e} apart"
        )


if __name__ == "__main__":
    main()
