"""Lets PEFT read a run's adapter and transformers its merged folder, and sets their logits side by side.

The base is dequantised from NF4 as in models.py, so the adapter on it and the merged model are one function, up to the
dtype that the merged weights are stored in. Then a test of ours is told where the values lie, to compare our own:

    python scripts/oracle/check_adapter.py BASE.gguf ADAPTER_FOLDER MERGED_FOLDER OUT_FOLDER
    GRANITE_CHECK_LOGITS=OUT_FOLDER/check.json cargo test --release --test model a_runs_files
"""

import json
import sys
from pathlib import Path

import torch
from models import PROJECTIONS, lift_to_float64, nf4
from peft import PeftModel
from smollm2 import PROMPTS, last_logits, reference
from transformers import AutoModelForCausalLM, AutoTokenizer


def load_base(path: Path) -> torch.nn.Module:
    """A GGUF file or a folder in float32, its projections through NF4."""
    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name} if path.is_file() else {
        "pretrained_model_name_or_path": path
    }
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.split(".")[-2] in PROJECTIONS:
                parameter.copy_(nf4(parameter)[0])
    return model


def both_precisions(model: torch.nn.Module, ids) -> tuple[list, list]:
    single = last_logits(model, ids)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    base.set_attn_implementation("exact")
    lift_to_float64(base)
    return single, last_logits(model.double(), ids)


def main() -> None:
    base, adapter, merged, out = (Path(argument).resolve() for argument in sys.argv[1:5])
    out.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    adapted = both_precisions(PeftModel.from_pretrained(load_base(base), adapter).eval(), ids)
    whole = AutoModelForCausalLM.from_pretrained(merged, dtype=torch.float32, attn_implementation="eager").eval()
    joined = both_precisions(whole, ids)
    for name, (single, double) in (("adapter", adapted), ("merged", joined)):
        (out / f"{name}.json").write_text(json.dumps(reference(PROMPTS, ids, single, double), indent=1) + "\n")
    for prompt, one, other in zip(PROMPTS, adapted[1], joined[1], strict=True):
        print(f"adapter and merged differ by {(one - other).abs().max():.2e} of {one.abs().max():.1f}: {prompt[:40]!r}")
    paths = {"base": base, "adapter": adapter, "merged": merged}
    paths |= {"adapter_logits": out / "adapter.json", "merged_logits": out / "merged.json"}
    (out / "check.json").write_text(json.dumps({key: str(path) for key, path in paths.items()}, indent=1) + "\n")
    print(f"now: GRANITE_CHECK_LOGITS={out / 'check.json'} cargo test --release --test model a_runs_files")


if __name__ == "__main__":
    main()
