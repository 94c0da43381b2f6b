"""Writes tests/fixtures/optimizers.safetensors and schedules.json: AdamW as torch and as bitsandbytes step it, learning
rates as transformers gives them.

AdamW8bit runs on the CPU, where bitsandbytes rounds moments through a table of 65,536 entries; its CUDA kernel and
`nearest.*` here take the nearest level itself.
"""

import json
import math
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.backends.cpu import ops as cpu_ops
from bitsandbytes.optim import AdamW8bit
from safetensors.torch import save_file
from transformers import (get_constant_schedule_with_warmup, get_cosine_schedule_with_warmup,
                          get_linear_schedule_with_warmup)

STEPS = 4
RATES = [0.0, 1e-3, 2e-3, 1.5e-3]
SETTINGS = {"betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}
# Whole blocks, a broken last block, too small for 8 bits.
SHAPES = {"whole": (32, 160), "broken": (61, 77), "small": (5, 7)}


def inputs() -> dict:
    generator = torch.Generator().manual_seed(4)
    tensors = {f"initial.{n}": torch.randn(s, generator=generator) * 0.1 for n, s in SHAPES.items()}
    for step in range(STEPS):
        for name, shape in SHAPES.items():
            spread = torch.exp(torch.randn(shape[0], 1, generator=generator))
            tensors[f"gradient.{step}.{name}"] = torch.randn(shape, generator=generator) * spread * 1e-3
    # As lora_A's gradient is while lora_B is zero, and a block that never moves.
    tensors["gradient.0.broken"].zero_()
    for step in range(STEPS):
        tensors[f"gradient.{step}.whole"].view(-1)[256:512] = 0
    return tensors


def stepped(tensors: dict, make, dtype=torch.float32):
    parameters = {n: torch.nn.Parameter(tensors[f"initial.{n}"].to(dtype, copy=True)) for n in SHAPES}
    optimizer = make(list(parameters.values()))
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = RATES[step]
        for name, parameter in parameters.items():
            parameter.grad = tensors[f"gradient.{step}.{name}"].to(dtype, copy=True)
        optimizer.step()
    return {n: p.detach() for n, p in parameters.items()}, {n: optimizer.state[p] for n, p in parameters.items()}


def nearest(moment, code, absmax_out, codes_out, block):
    """The level nearest to each value over its block's largest: what bitsandbytes' table approximates."""
    padded = torch.nn.functional.pad(moment.flatten(), (0, -moment.numel() % block)).view(-1, block)
    absmax = padded.abs().amax(1)
    normed = padded / torch.where(absmax > 0, absmax, 1.0).unsqueeze(1)
    codes = torch.bucketize(normed, (code[1:] + code[:-1]) / 2)
    codes_out.copy_(codes.flatten()[: moment.numel()].view(moment.shape).to(torch.uint8))
    absmax_out.copy_(absmax)


def eight_bit(tensors: dict, label: str) -> dict:
    values, state = stepped(tensors, lambda p: AdamW8bit(p, lr=1.0, **SETTINGS))
    assert state["small"]["state1"].dtype == torch.float32 and state["broken"]["state1"].dtype == torch.uint8
    result = {f"{label}.{n}": v for n, v in values.items()}
    for name in ["whole", "broken"]:
        for moment in [1, 2]:
            result[f"{label}.{name}.moment{moment}.codes"] = state[name][f"state{moment}"].flatten().clone()
            result[f"{label}.{name}.moment{moment}.absmax"] = state[name][f"absmax{moment}"].clone()
    return result


def schedules() -> list:
    cases = []
    for kind, make in [("linear", get_linear_schedule_with_warmup), ("cosine", get_cosine_schedule_with_warmup),
                       ("constant", get_constant_schedule_with_warmup)]:
        for total, warmup in [(10, 0), (10, 3), (7, 0.3), (60, 0.03), (5, 5), (4, 9), (1, 0)]:
            ahead = math.ceil(total * warmup) if warmup < 1 else int(warmup)
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
            schedule = make(optimizer, ahead) if kind == "constant" else make(optimizer, ahead, total)
            rates = []
            for _ in range(total):
                rates.append(optimizer.param_groups[0]["lr"])
                optimizer.step()
                schedule.step()
            cases.append({"schedule": kind, "total": total, "warmup": warmup, "lr": 2e-4, "rates": rates})
    return cases


def main():
    tensors = inputs()
    make = lambda p: torch.optim.AdamW(p, lr=1.0, foreach=False, **SETTINGS)
    exact, _ = stepped(tensors, make, torch.float64)
    single, _ = stepped(tensors, make)
    result = tensors | {f"exact.{n}": t.float() for n, t in exact.items()}
    result |= {f"error.{n}": (single[n].double() - exact[n]).abs().amax().float().reshape(1) for n in SHAPES}
    result |= eight_bit(tensors, "library")
    cpu_ops._quant_blockwise_fp32_direct = nearest
    result |= eight_bit(tensors, "nearest")
    norms = torch.stack([tensors[f"gradient.3.{n}"].norm() for n in SHAPES])
    result["norm"] = norms.norm().reshape(1)
    result |= {f"code.{s}": bnb.create_dynamic_map(signed=s == "signed") for s in ["signed", "unsigned"]}
    fixtures = Path("tests/fixtures")
    save_file({n: t.contiguous() for n, t in result.items()}, fixtures / "optimizers.safetensors")
    (fixtures / "schedules.json").write_text(json.dumps(schedules(), indent=1) + "\n")
    for name in ["whole", "broken"]:
        for moment in [1, 2]:
            a, b = (result[f"{label}.{name}.moment{moment}.codes"].int() for label in ["library", "nearest"])
            print(name, moment, "codes that differ:", (a != b).sum().item(), "of", a.numel(), "by at most", (a - b).abs().max().item())


if __name__ == "__main__":
    main()
