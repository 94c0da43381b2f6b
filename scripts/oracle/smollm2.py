"""Writes tests/fixtures/smollm2-logits.json: what transformers makes of SmolLM2-135M-Instruct on ten prompts.

The GGUF file is read by transformers' own reader (through the gguf package), dequantised to float32 and run in
float32 and, with the model cast up, in float64. For each prompt the last position's twenty largest logits, some at
fixed ids and the log of the summed exponentials are kept, with the distance of the float32 run.

    python scripts/oracle/smollm2.py FILE.gguf
"""

import json
import sys
from pathlib import Path

import torch
from models import lift_to_float64
from transformers import AutoModelForCausalLM, AutoTokenizer

FIXTURE = Path(__file__).resolve().parents[2] / "tests" / "fixtures" / "smollm2-logits.json"
# One token, plain text, chats, code, figures, another script, and one that is longer than the others.
PROMPTS = [
    "The",
    "The capital of France is",
    "<|im_start|>user\nWhat is a balance sheet?<|im_end|>\n<|im_start|>assistant\n",
    "SELECT name, balance FROM accounts WHERE",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "Revenue rose from 1,204 to 1,377 million, an increase of",
    "Die Bank erhöht die Zinsen um",
    "<|im_start|>system\nAnswer in one word.<|im_end|>\n<|im_start|>user\nIs 17 prime?<|im_end|>\n<|im_start|>assistant\n",
    "   \n\n\t indented",
    "A loan of ten thousand is repaid in equal monthly parts over five years. " * 8 + "Each month the borrower pays",
]
FIXED = [0, 1, 2, 17, 198, 1000, 28, 30, 12345, 49151]


def last_logits(model, ids: list[list[int]]) -> list[torch.Tensor]:
    with torch.no_grad():
        return [model(input_ids=torch.tensor([row]), use_cache=False).logits[0, -1].double() for row in ids]


def reference(prompts: list[str], ids: list[list[int]], single: list, double: list) -> dict:
    """What tests/model/peft_files.rs reads: parts of the float64 logits, and how far the float32 ones are off."""
    out = []
    for prompt, row, rough, logits in zip(prompts, ids, single, double, strict=True):
        top = logits.topk(20)
        out.append(
            {
                "prompt": prompt,
                "input_ids": row,
                "top_ids": top.indices.tolist(),
                "top": top.values.tolist(),
                "fixed": logits[FIXED].tolist(),
                "logsumexp": logits.logsumexp(0).item(),
                "error": (rough - logits).abs().max().item(),
            }
        )
    return {"fixed_ids": FIXED, "prompts": out}


def main() -> None:
    path = Path(sys.argv[1])
    source = {"pretrained_model_name_or_path": str(path.parent), "gguf_file": path.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, attn_implementation="eager").eval()
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in PROMPTS]
    single = last_logits(model, ids)
    model.set_attn_implementation("exact")
    written = reference(PROMPTS, ids, single, last_logits(lift_to_float64(model), ids))
    FIXTURE.write_text(json.dumps(written, indent=1) + "\n")
    print(f"{FIXTURE}: largest float32 error {max(p['error'] for p in written['prompts']):.2e}", file=sys.stderr)


if __name__ == "__main__":
    main()
