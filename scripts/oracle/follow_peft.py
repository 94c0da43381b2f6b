"""Trains with PEFT on the rows of a finished run, in its order, and sets the losses side by side.

The run must have been trained without dropout, with 32-bit AdamW and constant learning rate settings that metrics.jsonl
tells. Of each of its lines with `"event": "step"` the fields `step`, `loss`, `lr` and `rows` (row numbers of
train.parquet, in order) are read. The adapter starts from the program's own initial values, which are a function of
seed and name (src/model/init.rs) and are computed here again.

    python scripts/oracle/follow_peft.py RUN_FOLDER DATASET_FOLDER BASE.gguf [--steps N]

In float32 on the CPU, one sequence at a time. With `--gpu` as people train: bitsandbytes' 4-bit layers and bfloat16
autocast, the sequences of a step padded into one batch; `--attention` chooses transformers' implementation, and two runs
with different ones show how far PEFT is from itself.
"""

import argparse

import json
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from check_adapter import load_base
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

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


def load_4bit(base: Path, attention: str) -> torch.nn.Module:
    """The base in bitsandbytes' 4-bit layers on the GPU, by way of a folder, because GGUF files cannot be quantised."""
    with tempfile.TemporaryDirectory() as folder:
        read = AutoModelForCausalLM.from_pretrained(base.parent, gguf_file=base.name, dtype=torch.float32)
        config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        plain.load_state_dict(read.state_dict())
        plain.save_pretrained(folder)
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
        return AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=torch.bfloat16, attn_implementation=attention, device_map={"": 0}
        )


def padded_step(model, rows: list[dict]) -> float:
    """As `step_of`, with all sequences in one batch."""
    sequences = [(ids, labels) for row in rows for ids, labels in sequences_of(row)]
    pad = torch.nn.utils.rnn.pad_sequence
    ids = pad([ids for ids, _ in sequences], batch_first=True).cuda()
    labels = pad([labels for _, labels in sequences], batch_first=True, padding_value=-100)[:, 1:].cuda()
    mask = pad([torch.ones_like(ids) for ids, _ in sequences], batch_first=True).cuda()
    with torch.autocast("cuda", dtype=torch.bfloat16):
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, :-1]
    supervised = labels != -100
    loss = torch.nn.functional.cross_entropy(logits[supervised].float(), labels[supervised])
    loss.backward()
    return loss.item()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("run", "dataset", "base"):
        parser.add_argument(name, type=Path)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--gpu", action="store_true")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--losses", type=Path, help="where PEFT's losses go, as JSON")
    return parser.parse_args()


def main() -> None:
    options = arguments()
    run, dataset, base = options.run, options.dataset, options.base
    recipe = tomllib.loads((run / "recipe.toml").read_text())
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [event for event in events if event.get("event") == "step"]
    steps = steps[: options.steps]
    assert steps, f"{run / 'metrics.jsonl'} has no steps"
    assert "rows" in steps[0], "the metrics do not tell which rows a step took"
    table = parquet.read_table(dataset / "train.parquet").to_pylist()
    train = recipe["train"]
    model = adapted(load_4bit(base.resolve(), options.attention) if options.gpu else load_base(base), recipe)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(
        parameters, lr=1.0, betas=tuple(train["betas"]), eps=train["eps"], weight_decay=train["weight_decay"]
    )
    losses = []
    print(f"{'step':>5} {'granite':>10} {'peft':>10} {'difference':>11}")
    for event in steps:
        for group in optimizer.param_groups:
            group["lr"] = event["lr"]
        optimizer.zero_grad()
        loss = (padded_step if options.gpu else step_of)(model, [table[row] for row in event["rows"]])
        if train["max_grad_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(parameters, train["max_grad_norm"])
        optimizer.step()
        losses.append(loss)
        print(f"{event['step']:>5} {event['loss']:>10.6f} {loss:>10.6f} {event['loss'] - loss:>11.2e}", flush=True)
    differences = [abs(event["loss"] - loss) for event, loss in zip(steps, losses)]
    print(f"differences: mean {sum(differences) / len(differences):.2e}, largest {max(differences):.2e}")
    if options.losses:
        options.losses.write_text(json.dumps({"granite": [event["loss"] for event in steps], "peft": losses}))


if __name__ == "__main__":
    main()
