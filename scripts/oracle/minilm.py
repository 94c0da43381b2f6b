"""Writes what the sentence encoder is held to.

    python scripts/oracle/minilm.py MINILM_FOLDER

- `tests/fixtures/minilm/embeddings.json`: texts and their embeddings by all-MiniLM-L6-v2 through sentence-transformers.
- `tests/fixtures/encoder-tiny/`: a random two-layer encoder in the folder layout of sentence-transformers, small enough
  to be committed, with `embeddings.json` beside it: the forward pass is then tested where the real weights are not.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer, models
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

FIXTURES = Path(__file__).resolve().parents[2] / "tests" / "fixtures"

WORDS = """the a of and to in is on by net present value cash flow rate per year revenue income tax bond price risk
select from where join count group order table list python return sum total profit loss growth share debt equity
interest what how many was were which company filing statement balance sheet margin cost""".split()

TEXTS = [
    "",
    " ",
    "a",
    "What is net present value?",
    "what is NET present VALUE?",
    "The company reported revenue of $12.4 billion in fiscal 2019, up 7% year over year.",
    "SELECT name, count(*) FROM singer GROUP BY name ORDER BY count(*) DESC LIMIT 3;",
    "def npv(rate, flows):\n    return sum(f / (1 + rate) ** t for t, f in enumerate(flows))",
    "Zinsänderungsrisiko und Währungsabsicherung für Anleihen",
    "Naïve café déjà-vu coöperation",
    "Quel est le taux d'intérêt réel après inflation ?",
    "純利益は前年比で増加した。",
    "процентная ставка по облигациям",
    "مخاطر السوق",
    "emoji 📈📉 and a family 👨‍👩‍👧 in one line",
    "zero\u200bwidth, non\u00a0breaking, soft\u00adhyphen, tab\tand null\u0000byte",
    "x" * 400,
    "[CLS] tokens spelled out [SEP] in the text [MASK]",
    "!!! ??? ... ,,, ((( )))",
    "Duration measures the sensitivity of a bond's price to its yield. " * 40,
    "word " * 254,
    "word " * 255,
]


def embeddings(model: SentenceTransformer) -> dict:
    vectors = model.encode(TEXTS, batch_size=1, convert_to_numpy=True)
    alone = [[float(f"{x:.8g}") for x in vector] for vector in vectors]
    return {"texts": TEXTS, "max_seq_length": model.max_seq_length, "embeddings": alone}


def write(path: Path, value: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=True, separators=(",", ":")) + "\n")


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    letters = [chr(c) for c in range(33, 127) if not chr(c).isupper()]
    pieces = [f"##{c}" for c in letters if c.isalnum()]
    vocab = {token: i for i, token in enumerate(special + letters + pieces + [w for w in WORDS if len(w) > 1])}
    tokenizer = Tokenizer(WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", pad_token="[PAD]", mask_token="[MASK]"
    )


def tiny_encoder() -> None:
    torch.manual_seed(17)
    tokenizer = tiny_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=24,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=40,
        max_position_embeddings=64,
        type_vocab_size=2,
        initializer_range=0.4,
        layer_norm_eps=1e-6,
    )
    bert = BertModel(config).eval()
    with torch.no_grad():
        # Biases start at zero and norms at one: any of them left out would go unseen.
        for parameter in bert.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    with tempfile.TemporaryDirectory() as folder:
        bert.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        transformer = models.Transformer(folder, max_seq_length=48)
        width = config.hidden_size
        model = SentenceTransformer(
            modules=[transformer, models.Pooling(width, pooling_mode="mean"), models.Normalize()], device="cpu"
        )
        target = FIXTURES / "encoder-tiny"
        shutil.rmtree(target, ignore_errors=True)
        model.save(str(target), create_model_card=False)
        for extra in ("README.md", ".gitattributes"):
            (target / extra).unlink(missing_ok=True)
        write(target / "embeddings.json", embeddings(SentenceTransformer(str(target), device="cpu")))


def main() -> None:
    torch.set_num_threads(1)
    real = SentenceTransformer(sys.argv[1], device="cpu")
    write(FIXTURES / "minilm" / "embeddings.json", embeddings(real))
    tiny_encoder()


if __name__ == "__main__":
    main()
