"""Writes tests/fixtures/nf4.safetensors: NF4 as bitsandbytes stores it, on small and odd inputs.

Needs torch, numpy, safetensors and bitsandbytes (scripts/oracle/README.md). Run from the repository root:

    python scripts/oracle/nf4.py

What comes from where:
- 4-bit codes, scales and both maps: bitsandbytes.
- 8-bit codes of the scales: a binary search in float32 that ends where the CUDA kernel's ends. bitsandbytes' CPU
  library finds them through a table of 65,536 steps and so misses a few; this script asserts that it differs only
  beside a boundary.
- Dequantised weights: bitsandbytes, from these codes.
"""

import hashlib
import json
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import numpy as np
import torch
from safetensors.torch import save_file

BLOCK, NESTED_BLOCK = 64, 256


def searched_codes(quotient: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
    """Codes as a binary search in float32 finds them: 127 first, seven halvings, then the middle to the neighbour decides.

    The middle itself is rounded to float32, and a quotient on it stays where the search ended: an exact search in
    float64 answers differently about once in a million scales.
    """
    pivot = torch.full(quotient.shape, 127)
    lower, upper = torch.zeros_like(pivot), torch.full_like(pivot, 255)
    for step in (64, 32, 16, 8, 4, 2, 1):
        above = quotient > levels[pivot]
        lower, upper = torch.where(above, pivot, lower), torch.where(above, upper, pivot)
        pivot = pivot + torch.where(above, step, -step)
    value = levels[pivot]
    up = (quotient > value) & (quotient > (levels[upper] + value) * 0.5)
    down = (quotient <= value) & (quotient < (levels[lower] + value) * 0.5)
    return torch.where(up, upper, torch.where(down, lower, pivot)).to(torch.uint8)


def nearest_codes(scales: torch.Tensor, offset: torch.Tensor, levels: torch.Tensor):
    """8-bit codes and nested scales of `scales - offset`."""
    centred = scales - offset
    codes, absmax = [], []
    for block in centred.split(NESTED_BLOCK):
        largest = block.abs().max()
        codes.append(searched_codes(block * (1.0 / largest.clamp(min=1e-38)), levels))
        absmax.append(largest)
    return torch.cat(codes), torch.stack(absmax)


def check_against_library(codes, scales, offset, levels):
    """The library's own 8-bit codes may differ by one level, within a step of its table of a boundary."""
    centred = scales - offset
    theirs, _ = bnb.quantize_blockwise(centred, code=levels, blocksize=NESTED_BLOCK)
    largest = torch.cat([block.abs().max().expand(len(block)) for block in centred.split(NESTED_BLOCK)])
    quotient = centred / largest.clamp(min=1e-38)
    middles = (levels[1:] + levels[:-1]) / 2
    # Where all scales are equal, any code times a nested scale of zero is right.
    for at in ((theirs != codes) & (largest > 0)).nonzero().flatten().tolist():
        assert abs(int(theirs[at]) - int(codes[at])) == 1, f"scale {at} differs by more than a level"
        distance = (quotient[at] - middles).abs().min()
        assert distance <= 2 / 65536, f"scale {at} lies {distance} from a boundary"


def quantised(weight: torch.Tensor):
    """All parts of one weight, and what they dequantise to."""
    packed, state = bnb.quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
    levels = bnb.create_dynamic_map(signed=True)
    scales = state.absmax
    offset = scales.double().mean().float()
    codes, nested = nearest_codes(scales, offset, levels)
    check_against_library(codes, scales, offset, levels)
    restored_scales = levels[codes.long()] * nested.repeat_interleave(NESTED_BLOCK)[: len(codes)] + offset
    state.absmax = restored_scales
    restored = {}
    for name, dtype in [("f32", torch.float32), ("bf16", torch.bfloat16), ("f16", torch.float16)]:
        state.dtype = dtype
        restored[name] = bnb.dequantize_4bit(packed, state)
    return {
        "weight": weight,
        "packed": packed.flatten(),
        "absmax": codes,
        "nested_absmax": nested,
        "offset": offset.reshape(1),
        "dequantized": restored["f32"],
        "dequantized_bf16": restored["bf16"],
        "dequantized_f16": restored["f16"],
    }


def edge_values() -> torch.Tensor:
    """Blocks that are zero, tie on every boundary, denormal, huge, of one sign, or a single spike."""
    levels = bnb.get_4bit_type("nf4", device="cpu")[:16]
    ties = (levels[1:] + levels[:-1]) / 2
    blocks = torch.zeros(12, BLOCK)
    blocks[1, :15], blocks[1, 15] = ties, 1.0
    blocks[2, :15], blocks[2, 15] = torch.nextafter(ties, torch.tensor(2.0)), -1.0
    blocks[3, :15], blocks[3, 15] = torch.nextafter(ties, torch.tensor(-2.0)), 1.0
    blocks[4] = torch.linspace(-1e-40, 1e-40, BLOCK)
    blocks[5] = torch.linspace(-1, 1, BLOCK) * 1e37
    blocks[6] = torch.linspace(0, 1, BLOCK)
    blocks[7] = -blocks[6]
    blocks[8, 63] = -7.25
    blocks[9] = -0.0
    blocks[10] = 1e-30
    blocks[11, :16] = levels * 0.013
    return blocks


def million() -> dict:
    """Hashes of the parts on 2^20 values that Rust makes again from the same generator."""
    state = np.uint64(0x9E3779B97F4A7C15)
    index = np.arange(1 << 20, dtype=np.uint64)
    with np.errstate(over="ignore"):
        bits = (index + np.uint64(1)) * state
        bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        bits = bits ^ (bits >> np.uint64(31))
    # A sum of four 16-bit numbers: near to a bell, exact in float32, the same in every language.
    parts = [(bits >> np.uint64(16 * k)) & np.uint64(0xFFFF) for k in range(4)]
    values = (sum(parts).astype(np.int64) - 2 * 0xFFFF).astype(np.float32) * np.float32(2.0**-21)
    parts = quantised(torch.from_numpy(values).reshape(1024, 1024))
    sha = {n: hashlib.sha256(t.contiguous().view(torch.uint8).numpy().tobytes()).hexdigest() for n, t in parts.items()}
    return {"values": 1 << 20, "sha256": sha}


def main():
    torch.manual_seed(20)
    fixtures = Path("tests/fixtures")
    cases = {
        "edge": edge_values().reshape(12, 64),
        "normal": torch.randn(96, 64 * 5) * 0.02,
        "bf16": (torch.randn(3, 64 * 7) * 0.5).bfloat16(),
        "f16": (torch.randn(1, 64) * 3).half(),
    }
    tensors = {"levels": bnb.get_4bit_type("nf4", device="cpu")[:16].clone(), "dynamic_map.signed": bnb.create_dynamic_map(signed=True),
               "dynamic_map.unsigned": bnb.create_dynamic_map(signed=False)}
    for case, weight in cases.items():
        tensors |= {f"{case}.{part}": tensor.contiguous() for part, tensor in quantised(weight).items()}
    save_file(tensors, fixtures / "nf4.safetensors")
    (fixtures / "nf4_million.json").write_text(json.dumps(million(), indent=2) + "\n")


if __name__ == "__main__":
    sys.exit(main())
