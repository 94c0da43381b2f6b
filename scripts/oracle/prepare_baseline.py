#!/usr/bin/env python3
"""What `granite prepare` is compared with: the fair Python pipeline, batched and on all cores.

Standard json, the fast tokenizer of transformers with one batched call per thousand examples, best-fit
decreasing packing, parquet with zstd when pyarrow is there. It reads the same dumps and takes as many examples of
each source, but not the same ones; its schema text and prompts are as long as ours to within a few per cent.

    prepare_baseline.py --tokenizer FOLDER --dumps FOLDER [--length 2048] [--repeat 3]
"""

import argparse
import bisect
import json
import random
import resource
import time
from pathlib import Path

from transformers import AutoTokenizer


def chat(user, *rest):
    roles = ["user", "assistant"]
    return [{"role": roles[at % 2], "content": text} for at, text in enumerate((user, *rest))]


def alpaca(record):
    context = record.get("input") or ""
    user = record["instruction"] + ("\n\n" + context if context else "")
    return chat(user, record["output"])


def dolly(record):
    context = record["context"]
    return chat(record["instruction"] + ("\n\n" + context if context else ""), record["response"])


def schema(database):
    tables = []
    columns, types = database["column_names_original"], database["column_types"]
    names = database["table_names_original"]
    for at, name in enumerate(names):
        parts = [f"{column} {kind}" for (table, column), kind in zip(columns, types) if table == at]
        keys = [columns[key][1] for key in database["primary_keys"] if columns[key][0] == at]
        if keys:
            parts.append(f"PRIMARY KEY ({', '.join(keys)})")
        for source, target in database["foreign_keys"]:
            if columns[source][0] == at:
                other = names[columns[target][0]]
                parts.append(f"FOREIGN KEY ({columns[source][1]}) REFERENCES {other}({columns[target][1]})")
        tables.append(f"CREATE TABLE {name} ({', '.join(parts)});")
    return "\n".join(tables)


def convfinqa(record):
    table = "\n".join("| " + " | ".join(row) + " |" for row in record["table"])
    page = "\n\n".join([" ".join(record["pre_text"]), table, " ".join(record["post_text"])])
    turns = []
    notes = record["annotation"]
    for question, program, answer in zip(notes["dialogue_break"], notes["turn_program"], notes["exe_ans_list"]):
        turns += [question, f"{program}\nAnswer: {answer}"]
    return chat(page + "\n\nQuestion: " + turns[0], *turns[1:])


def read(dumps):
    rng = random.Random(17)
    with open(dumps / "dolly/databricks-dolly-15k.jsonl") as file:
        records = [json.loads(line) for line in file]
    chats = [dolly(record) for record in rng.sample(records, 10_000)]
    chats += [alpaca(record) for record in json.loads((dumps / "finance-alpaca/Cleaned_date.json").read_text())]
    chats += [convfinqa(record) for record in json.loads((dumps / "convfinqa/train.json").read_text())]
    tables = json.loads((dumps / "spider/tables.json").read_text())
    schemas = {database["db_id"]: schema(database) for database in tables}
    for record in rng.sample(json.loads((dumps / "spider/train_spider.json").read_text()), 1_500):
        chats.append(chat(f"{schemas[record['db_id']]}\n\nQuestion: {record['question']}", record["query"]))
    code = json.loads((dumps / "codealpaca/code_alpaca_2k.json").read_text())
    chats += [alpaca(record) for record in rng.sample(code, 1_500)]
    return chats


def encode(tokenizer, chats, length):
    header, end = "<|start_of_role|>assistant<|end_of_role|>", "<|end_of_text|>"
    rows = []
    for at in range(0, len(chats), 1000):
        texts = tokenizer.apply_chat_template(chats[at : at + 1000], tokenize=False)
        batch = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True)
        for text, ids, offsets in zip(texts, batch["input_ids"], batch["offset_mapping"]):
            if len(ids) > length:
                continue
            mask, start = [False] * len(ids), 0
            begins = [begin for begin, _ in offsets]
            while (found := text.find(header, start)) >= 0:
                first = found + len(header)
                start = text.index(end, first) + len(end)
                low, high = bisect.bisect_left(begins, first), bisect.bisect_left(begins, start)
                mask[low:high] = [True] * (high - low)
            rows.append((ids, mask))
    return rows


def pack(rows, length):
    """Best-fit decreasing, the open rows kept sorted by the room they have left."""
    rooms, bins, packed = [], [], []
    for row in sorted(rows, key=lambda row: -len(row[0])):
        at = bisect.bisect_left(rooms, len(row[0]))
        if at == len(rooms):
            packed.append([])
            room, bin_ = length, len(packed) - 1
        else:
            room, bin_ = rooms.pop(at), bins.pop(at)
        packed[bin_].append(row)
        room -= len(row[0])
        at = bisect.bisect_left(rooms, room)
        rooms.insert(at, room)
        bins.insert(at, bin_)
    return packed


def store(packed, path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        return "not written: no pyarrow"
    ids = [[token for row, _ in rows for token in row] for rows in packed]
    masks = [[on for _, mask in rows for on in mask] for rows in packed]
    table = pyarrow.table({"input_ids": pyarrow.array(ids, pyarrow.list_(pyarrow.uint32())), "loss_mask": masks})
    pyarrow.parquet.write_table(table, path, compression="zstd")
    return "written"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--dumps", type=Path, required=True)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("/tmp/prepare-baseline.parquet"))
    args = parser.parse_args()
    for _ in range(args.repeat):
        laps = [time.perf_counter()]
        tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
        laps.append(time.perf_counter())
        chats = read(args.dumps)
        laps.append(time.perf_counter())
        rows = encode(tokenizer, chats, args.length)
        laps.append(time.perf_counter())
        packed = pack(rows, args.length)
        laps.append(time.perf_counter())
        written = store(packed, args.out)
        laps.append(time.perf_counter())
        tokens = sum(len(ids) for ids, _ in rows)
        stages = ["load", "read", "encode", "pack", "write"]
        seconds = {stage: round(b - a, 2) for stage, a, b in zip(stages, laps, laps[1:])}
        print(
            json.dumps(
                {
                    "seconds": seconds,
                    "total": round(laps[-1] - laps[0], 2),
                    "examples": len(rows),
                    "tokens": tokens,
                    "packing_efficiency": round(tokens / (len(packed) * args.length), 4),
                    "parquet": written,
                    "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                }
            )
        )


if __name__ == "__main__":
    main()
