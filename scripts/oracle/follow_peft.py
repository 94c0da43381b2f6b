"""Trains with PEFT in float32 on the rows of a finished run, in its order, and sets the losses side by side.

The run must have been trained without dropout, with 32-bit AdamW and constant learning rate settings that metrics.jsonl
tells. Of each of its lines with `"event": "step"` the fields `step`, `loss`, `lr` and `rows` (row numbers of
train.parquet, in order) are read. The adapter starts from the program's own initial values, which are a function of
seed and name (src/model/init.rs) and are computed here again.

    python scripts/oracle/follow_peft.py RUN_FOLDER DATASET_FOLDER BASE.gguf [STEPS]
"""

import json
import sys
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from check_adapter import load_base
from peft import LoraConfig, get_peft_model

MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def mix(value: int) -> int:
    z = (value + GAMMA) & MASK
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


def uniform(seed: int, name: str, shape, bound: float) -> torch.Tensor:
    """Initial values as the program draws them."""
    stream = mix(seed)
    for byte in name.encode():
        stream = mix(stream ^ byte)
    index = np.arange(int(np.prod(shape)), dtype=np.uint64)
    with np.errstate(over="ignore"):
        z = np.uint64(stream) + index * np.uint64(GAMMA) + np.uint64(GAMMA)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        z = z ^ (z >> np.uint64(31))
    unit = ((z >> np.uint64(11)).astype(np.float64) + 0.5) / 2.0**53
    return torch.from_numpy(((2 * unit - 1) * bound).astype(np.float32)).reshape(tuple(shape))


def adapted(base: torch.nn.Module, recipe: dict):
    lora, seed = recipe["lora"], recipe["train"]["seed"]
    assert lora["dropout"] == 0, "the run has dropout: train with --set lora.dropout=0"
    config = LoraConfig(
        r=lora["rank"],
        lora_alpha=lora["alpha"],
        lora_dropout=0.0,
        use_rslora=lora["rslora"],
        target_modules=lora["targets"],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                key = name.removeprefix("base_model.model.").replace(".default.", ".")
                parameter.copy_(uniform(seed, key, parameter.shape, parameter.shape[1] ** -0.5))
    return model.train()


def sequences_of(row: dict):
    start = 0
    for length in row["seq_lengths"]:
        ids = torch.tensor(row["input_ids"][start : start + length])
        mask = torch.tensor(row["loss_mask"][start : start + length])
        yield ids, torch.where(mask, ids, -100)
        start += length


def step_of(model, rows: list[dict]) -> float:
    """Gradients of the mean over all supervised tokens of the step, one sequence at a time; the mean itself."""
    supervised = sum(int((labels[1:] != -100).sum()) for row in rows for _, labels in sequences_of(row))
    total = 0.0
    for row in rows:
        for ids, labels in sequences_of(row):
            if not (labels[1:] != -100).any():
                continue
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
            loss = torch.nn.functional.cross_entropy(logits, labels[1:], ignore_index=-100, reduction="sum")
            (loss / supervised).backward()
            total += loss.item()
    return total / supervised


def main() -> None:
    run, dataset, base = (Path(argument) for argument in sys.argv[1:4])
    recipe = tomllib.loads((run / "recipe.toml").read_text())
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event.get("event") == "step"]
    steps = steps[: int(sys.argv[4])] if len(sys.argv) > 4 else steps
    assert steps, f"{run / 'metrics.jsonl'} has no steps"
    assert "rows" in steps[0], "the metrics do not tell which rows a step took"
    table = parquet.read_table(dataset / "train.parquet").to_pylist()
    train = recipe["train"]
    model = adapted(load_base(base), recipe)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, betas=tuple(train["betas"]), eps=train["eps"], weight_decay=train["weight_decay"]
    )
    worst = 0.0
    print(f"{'step':>5} {'granite':>10} {'peft':>10} {'difference':>11}")
    for event in steps:
        for group in optimizer.param_groups:
            group["lr"] = event["lr"]
        optimizer.zero_grad()
        loss = step_of(model, [table[row] for row in event["rows"]])
        if train["max_grad_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(parameters, train["max_grad_norm"])
        optimizer.step()
        worst = max(worst, abs(event["loss"] - loss))
        print(f"{event['step']:>5} {event['loss']:>10.6f} {loss:>10.6f} {event['loss'] - loss:>11.2e}", flush=True)
    print(f"largest difference {worst:.2e}")


if __name__ == "__main__":
    main()
