"""Writes tests/fixtures/smollm2-gguf.json: SmolLM2's GGUF file as two other readers see it.

    python scripts/oracle/gguf_smollm2.py SMOLLM2.gguf [TEST_DATA]

- `tokens`: a byte-level BPE written out below from the gguf package's metadata, over strings of this file and,
  as a count and a hash, over the first records of Dolly and CodeAlpaca in TEST_DATA.
- `tensors`: hashes of weights as transformers' own GGUF loader dequantises and reorders them.
"""

import hashlib
import json
import sys
from pathlib import Path

import gguf
import numpy as np
import regex

PIECES = regex.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
STRINGS = [
    "", " ", "  ", "a", " a", "\n", "\n\n\n", "\t\tx", "Hello, world!", "don't we'll I'VE it's",
    "1", "12", "1234567890", "in 2024, 3.14 or 1,000,000", "a  12", "x=  7", "½ ² ٣ 四 Ⅷ",
    "def f(x):\n    return x ** 2  # squared\n", "SELECT count(*) FROM t WHERE a >= 10;", "{\"k\": [1, 2.5, null]}",
    "naïve café Straße Ελληνικά кириллица 日本語テキスト 한국어 עברית العربية", "😀👩‍👩‍👧 emoji",
    "e\u0301 \u200b zero\u00a0width\ufeff", "\x00\x01\x7f control", "trailing   ", "   leading",
    "<|im_start|>user\nHi<|im_end|>\n", "<|im_start|><|im_end|>", "<|im_start", "a<|endoftext|>b", "<repo_name>x<file_sep>",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "supercalifragilisticexpialidocious", "\r\nwindows\r\n",
]


def byte_letters() -> dict[int, str]:
    """GPT-2's printable letter of each byte."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}


class Tokenizer:
    """Special tokens, single digits, GPT-2's pieces, merges by rank."""

    def __init__(self, reader: gguf.GGUFReader):
        field = lambda key: reader.fields[f"tokenizer.ggml.{key}"].contents()
        tokens, types = field("tokens"), field("token_type")
        self.ids = {token: id for id, token in enumerate(tokens)}
        self.ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(field("merges"))}
        special = sorted((token for token, kind in zip(tokens, types) if kind in (3, 4)), key=len, reverse=True)
        self.special = regex.compile("(" + "|".join(map(regex.escape, special)) + ")")
        self.letters = byte_letters()

    def encode(self, text: str) -> list[int]:
        ids = []
        for part in self.special.split(text):
            if self.special.fullmatch(part):
                ids.append(self.ids[part])
            else:
                for run in regex.findall(r"\p{N}|\P{N}+", part):
                    for piece in PIECES.findall(run):
                        ids += self.merge(piece)
        return ids

    def merge(self, piece: str) -> list[int]:
        parts = [self.letters[byte] for byte in piece.encode()]
        while len(parts) > 1:
            pairs = list(zip(parts, parts[1:]))
            best = min(pairs, key=lambda pair: self.ranks.get(pair, 1 << 60))
            if best not in self.ranks:
                break
            merged, at = [], 0
            while at < len(parts):
                whole = tuple(parts[at : at + 2]) == best
                merged.append("".join(parts[at : at + 2]) if whole else parts[at])
                at += 2 if whole else 1
            parts = merged
        return [self.ids[part] for part in parts]


def real_strings(data: Path):
    """As tests/checkpoint/smollm2.rs takes them."""
    dolly = (data / "dumps/dolly/databricks-dolly-15k.jsonl").read_text().split("\n")[:200]
    for line in dolly:
        record = json.loads(line)
        yield from (record["instruction"], record["context"], record["response"])
    for record in json.loads((data / "dumps/codealpaca/code_alpaca_2k.json").read_text())[:200]:
        yield from (record["instruction"], record["input"], record["output"])


def digest(encoded) -> dict:
    sha, tokens, strings = hashlib.sha256(), 0, 0
    for ids in encoded:
        sha.update(np.array([len(ids), *ids], dtype="<u4").tobytes())
        tokens, strings = tokens + len(ids), strings + 1
    return {"strings": strings, "tokens": tokens, "sha256": sha.hexdigest()}


def tensor_hashes(path: Path) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    names = ["model.embed_tokens.weight", "model.norm.weight"]
    for layer in (0, 29):
        block = f"model.layers.{layer}"
        names += [f"{block}.self_attn.{p}_proj.weight" for p in "qkvo"]
        names += [f"{block}.mlp.{p}_proj.weight" for p in ("gate", "up", "down")]
        names += [f"{block}.input_layernorm.weight", f"{block}.post_attention_layernorm.weight"]
    state = model.state_dict()
    return {name: hashlib.sha256(state[name].contiguous().numpy().tobytes()).hexdigest() for name in names}


def main():
    path = Path(sys.argv[1])
    tokenizer = Tokenizer(gguf.GGUFReader(path))
    result = {"strings": [{"text": text, "ids": tokenizer.encode(text)} for text in STRINGS]}
    if len(sys.argv) > 2:
        result["real"] = digest(map(tokenizer.encode, real_strings(Path(sys.argv[2]))))
    result["tensors"] = tensor_hashes(path)
    Path("tests/fixtures/smollm2-gguf.json").write_text(json.dumps(result, indent=1, ensure_ascii=True) + "\n")


if __name__ == "__main__":
    main()
