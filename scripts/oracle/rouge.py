#!/usr/bin/env python3
"""Writes tests/fixtures/rouge.json: ROUGE-L by the `rouge-score` package (pip install rouge-score), which src/eval/rouge.rs is held against."""

import json
import pathlib
import random

from rouge_score import rouge_scorer

PAIRS = [
    ("the cat sat on the mat", "the cat was on the mat"),
    ("The cat.", "the CAT"),
    ("a", "a"),
    ("a", "b"),
    ("", ""),
    ("", "a"),
    ("a", ""),
    ("...", "..."),
    ("don't stop", "dont stop"),
    ("don't stop", "don t stop"),
    ("1,234.5 dollars", "1234.5 dollars"),
    ("größer als 5", "groesser als 5"),
    ("naïve café", "naive cafe"),
    ("İstanbul ΑΒΓ ſ K", "istanbul k"),
    ("a b c d e f", "f e d c b a"),
    ("snake_case and kebab-case", "snake case and kebab case"),
    ("one\ntwo\tthree", "one two three"),
    ("x " * 300, "x " * 100 + "y " * 100),
]


def main():
    random.seed(17)
    words = "a b c d the of to 1 2".split()
    pairs = list(PAIRS)
    for _ in range(20):
        pairs.append(tuple(" ".join(random.choices(words, k=random.randint(1, 30))) for _ in range(2)))
    scorer = rouge_scorer.RougeScorer(["rougeL"], use_stemmer=False)
    cases = [[one, other, scorer.score(one, other)["rougeL"].fmeasure] for one, other in pairs]
    path = pathlib.Path(__file__).parents[2] / "tests/fixtures/rouge.json"
    path.write_text(json.dumps(cases, indent=0) + "\n")


main()
