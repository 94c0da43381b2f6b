"""Trains with PEFT on the rows of a finished run, in its order, and sets the losses side by side.

The run must have been trained without dropout, with 32-bit AdamW and constant learning rate settings that metrics.jsonl
tells. Of each of its lines with `"event": "step"` the fields `step`, `loss`, `lr` and `rows` (row numbers of
train.parquet, in order) are read. The adapter starts from the program's own initial values, which are a function of
seed and name (src/model/init.rs) and are computed here again.

    python scripts/oracle/follow_peft.py RUN_FOLDER DATASET_FOLDER BASE.gguf [--steps N]

In float32 on the CPU, one sequence at a time. With `--gpu` as people train: bitsandbytes' 4-bit layers and bfloat16
autocast, the sequences of a step padded into one batch; `--attention` chooses transformers' implementation, and two of them
show how far PEFT is from itself.

In bfloat16 PEFT rounds the base's product and the adapter's and rounds their sum again: what a young adapter adds is lost
below half a unit in the last place of the base's. `--adapter-sum f32` keeps both in float32 until their sum is rounded, as
the program does, and leaves all else to PEFT: it tells that loss from other differences. `--elementwise once` also rounds
norms, rotary embedding and the gated activation once each, as the program does, where transformers rounds every operation.
`--quantize-from f32` has bitsandbytes quantise the weights as the file holds them, as the program does, where transformers
casts them to the compute dtype first.
"""

import argparse
import functools
import itertools
import json
import tempfile
import tomllib
from pathlib import Path

import numpy as np
import pyarrow.parquet as parquet
import torch
from check_adapter import load_base
from peft import LoraConfig, get_peft_model
from peft.tuners.lora import LoraLayer
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


def forward_in_f32(layer: LoraLayer, x: torch.Tensor) -> torch.Tensor:
    """A LoRA layer's output, rounded once. The adapter's inner product is rounded to the activations' dtype, as under autocast."""
    weight = layer.base_layer.weight
    if hasattr(weight, "quant_state"):
        from bitsandbytes.functional import dequantize_4bit

        weight = dequantize_4bit(weight.data, weight.quant_state).to(x.dtype)
    a, b = (getattr(layer, name)["default"].weight.to(x.dtype) for name in ("lora_A", "lora_B"))
    with torch.autocast(x.device.type, enabled=False):
        inner = (x @ a.T).float()
        return (x.float() @ weight.float().T + layer.scaling["default"] * (inner @ b.float().T)).to(x.dtype)


def sum_in_f32(model: torch.nn.Module) -> None:
    # The operands of these products are bfloat16 values, which TF32 holds: they are exact, and sums are float32. The switch
    # is for the whole process: the rotary embedding's angles, a float32 product, may be rounded by it too. With inverse
    # frequencies rounded to TF32 the losses of three rows moved by 4e-5 at most.
    torch.backends.cuda.matmul.allow_tf32 = True
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module.forward = functools.partial(forward_in_f32, module)


def round_once() -> None:
    """Llama's norms, rotary embedding and gated activation in float32, rounded to the activations' dtype at their end."""
    from transformers.models.llama import modeling_llama as llama

    def norm(self, x):
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight.float() * scaled).to(x.dtype)

    angles = llama.LlamaRotaryEmbedding.forward

    def rotate(q, k, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        turned = lambda x: (x.float() * cos + llama.rotate_half(x.float()) * sin).to(x.dtype)
        return turned(q), turned(k)

    def gated(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj((torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype))

    llama.LlamaRMSNorm.forward = norm
    llama.LlamaRotaryEmbedding.forward = lambda self, x, position_ids: angles(self, x.float(), position_ids)
    llama.apply_rotary_pos_emb = rotate
    llama.LlamaMLP.forward = gated


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


def load_4bit(base: Path, attention: str, dtype: torch.dtype) -> torch.nn.Module:
    """The base in bitsandbytes' 4-bit layers on the GPU, by way of a folder, because GGUF files cannot be quantised.

    The weights are quantised from `dtype`; what is not quantised is bfloat16.
    """
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
        model = AutoModelForCausalLM.from_pretrained(
            folder, quantization_config=quantization, dtype=dtype, attn_implementation=attention, device_map={"": 0}
        )
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


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
    parser.add_argument("--attention", nargs="+", default=["sdpa"], choices=["sdpa", "eager"])
    parser.add_argument("--adapter-sum", default="peft", choices=["peft", "f32"])
    parser.add_argument("--elementwise", default="peft", choices=["peft", "once"])
    parser.add_argument("--quantize-from", default="bf16", choices=["bf16", "f32"])
    parser.add_argument("--losses", type=Path, help="where PEFT's losses go, as JSON")
    return parser.parse_args()


def follow(model, steps: list[dict], table: list[dict], train: dict, step_of_rows) -> list[float]:
    """Trains on the rows of each step, at its rate; the losses."""
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
        loss = step_of_rows(model, [table[row] for row in event["rows"]])
        if train["max_grad_norm"] > 0:
            torch.nn.utils.clip_grad_norm_(parameters, train["max_grad_norm"])
        optimizer.step()
        losses.append(loss)
        print(f"{event['step']:>5} {event['loss']:>10.6f} {loss:>10.6f} {event['loss'] - loss:>11.2e}", flush=True)
    return losses


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
    if options.elementwise == "once":
        round_once()
    losses = {"granite": [event["loss"] for event in steps]}
    stored = torch.float32 if options.quantize_from == "f32" else torch.bfloat16
    for attention in options.attention if options.gpu else ["f32"]:
        model = adapted(load_4bit(base.resolve(), attention, stored) if options.gpu else load_base(base), recipe)
        if options.adapter_sum == "f32":
            sum_in_f32(model)
        losses[attention] = follow(model, steps, table, train, padded_step if options.gpu else step_of)
    for (one, first), (other, second) in itertools.combinations(losses.items(), 2):
        differences = [abs(a - b) for a, b in zip(first, second)]
        print(f"{one} and {other}: mean {sum(differences) / len(differences):.2e}, largest {max(differences):.2e}")
    if options.losses:
        options.losses.write_text(json.dumps(losses))


if __name__ == "__main__":
    main()
