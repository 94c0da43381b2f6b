#!/usr/bin/env python3
"""Writes tests/fixtures/columns: one table with every type of column as pyarrow, the reference implementation of both
formats, writes it to parquet and Arrow files in their several versions, and `rows.json`: the JSON values that were put
in, which src/data/reader/columns.rs must read out of all of them."""

import datetime
import decimal
import json
import math
import pathlib
import random
import zoneinfo

import pyarrow as pa
import pyarrow.ipc
import pyarrow.parquet as pq

FOLDER = pathlib.Path(__file__).parents[2] / "tests/fixtures/columns"
ROWS = 40
EPOCH = datetime.datetime(1970, 1, 1, tzinfo=datetime.timezone.utc)
NANOSECONDS = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}


def fraction(nanoseconds):
    """No digits, three, six or nine, as many as are needed."""
    for digits in (0, 3, 6, 9):
        if nanoseconds % 10 ** (9 - digits) == 0:
            return f".{nanoseconds // 10 ** (9 - digits):0{digits}}" if digits else ""


def moment(ticks, unit, zone=None):
    """RFC 3339; without an offset where the column has no zone."""
    seconds, rest = divmod(ticks * NANOSECONDS[unit], 10**9)
    at = EPOCH + datetime.timedelta(seconds=seconds)
    if zone:
        at = at.astimezone(zoneinfo.ZoneInfo(zone))
    offset = at.isoformat()[19:].replace("+00:00", "Z") if zone else ""
    return at.strftime("%Y-%m-%dT%H:%M:%S") + fraction(rest) + offset


def time(ticks, unit):
    seconds, rest = divmod(ticks * NANOSECONDS[unit], 10**9)
    return f"{seconds // 3600:02}:{seconds // 60 % 60:02}:{seconds % 60:02}" + fraction(rest)


def same(value):
    return value


def columns(rng):
    """Name, type, a value for pyarrow, the JSON value that it is."""
    def text():
        return "".join(rng.choice("aé\n\"😀 z") for _ in range(rng.randrange(20)))

    def ticks(unit):
        # 1970 to 2029, in summer and in winter.
        return rng.randrange(0, 1_860_000_000 * 10**9) // NANOSECONDS[unit]

    def whole(bits, signed):
        low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if signed else (0, 2**bits - 1)
        return rng.choice([low, high, rng.randint(low, high)])

    def price(digits, scale):
        return decimal.Decimal(rng.randint(-(10**digits) + 1, 10**digits - 1)).scaleb(-scale, decimal.Context(prec=80))

    yield "text", pa.string(), text, same
    yield "large", pa.large_string(), text, same
    yield "category", pa.dictionary(pa.int32(), pa.string()), lambda: rng.choice(["one", "two", ""]), same
    yield "bytes", pa.binary(), lambda: rng.choice([b"text", b"\xff\xfe", b""]), lambda value: None if b"\xff" in value else value.decode()
    yield "four", pa.binary(4), lambda: rng.choice([b"text", b"mode"]), bytes.decode
    yield "good", pa.bool_(), lambda: rng.random() < 0.5, same
    for bits in (8, 16, 32, 64):
        yield f"int{bits}", pa.type_for_alias(f"int{bits}"), lambda bits=bits: whole(bits, True), same
        yield f"uint{bits}", pa.type_for_alias(f"uint{bits}"), lambda bits=bits: whole(bits, False), same
    for kind in (pa.float32(), pa.float64()):
        yield str(kind), kind, lambda: rng.choice([0.1, -2.5, 1e10, math.nan, math.inf]), lambda value: value if math.isfinite(value) else None
    yield "half", pa.float16(), lambda: rng.choice([0.5, -1.25]), same
    yield "price", pa.decimal128(9, 2), lambda: price(9, 2), lambda value: f"{value:.2f}"
    yield "wide", pa.decimal256(60, 10), lambda: price(60, 10), lambda value: f"{value:.10f}"
    yield "day", pa.date32(), lambda: datetime.date(1969, 12, 1) + datetime.timedelta(rng.randrange(30_000)), datetime.date.isoformat
    for unit in NANOSECONDS:
        yield f"local_{unit}", pa.timestamp(unit), lambda unit=unit: ticks(unit), lambda value, unit=unit: moment(value, unit)
        for zone in ("UTC", "Europe/Zurich"):
            yield f"{zone}_{unit}", pa.timestamp(unit, zone), lambda unit=unit: ticks(unit), lambda value, unit=unit, zone=zone: moment(value, unit, zone)
    yield "time_ms", pa.time32("ms"), lambda: rng.randrange(86_400_000), lambda value: time(value, "ms")
    yield "time_ns", pa.time64("ns"), lambda: rng.randrange(86_400 * 10**9), lambda value: time(value, "ns")
    yield "words", pa.list_(pa.string()), lambda: [rng.choice(["a", None, "é"]) for _ in range(rng.randrange(4))], same
    yield "pair", pa.list_(pa.int32(), 2), lambda: [rng.randrange(9), None], same
    yield "table", pa.list_(pa.list_(pa.float64())), lambda: [[0.5] * rng.randrange(3) for _ in range(rng.randrange(3))], same
    turn = pa.struct([("role", pa.string()), ("content", pa.struct([("text", pa.string()), ("tokens", pa.int64())]))])
    yield "turns", pa.list_(turn), lambda: [{"role": role, "content": {"text": text(), "tokens": rng.randrange(99)}} for role in ("user", "assistant")], same
    yield "counts", pa.map_(pa.string(), pa.int64()), lambda: [(name, rng.randrange(9)) for name in ("b", "a")], dict
    yield "nothing", pa.null(), lambda: None, same


def table():
    rng = random.Random(17)
    arrays, rows = {}, [{} for _ in range(ROWS)]
    for name, kind, value, as_json in columns(rng):
        values = [None if rng.random() < 0.2 else value() for _ in range(ROWS)]
        arrays[name] = pa.array(values, kind)
        for row, value in zip(rows, values):
            row[name] = None if value is None else as_json(value)
    return pa.table(arrays), rows


def parquet(table, name, **options):
    # Parquet has no seconds: the column becomes another, of which not all readers restore the zone.
    table = table.drop_columns([column for column in table.column_names if column == "Europe/Zurich_s"])
    # Pages of a few values, so that a column has many.
    pq.write_table(table, FOLDER / f"{name}.parquet", write_batch_size=4, data_page_size=64, **options)


def arrow(table, name, new, compression=None):
    options = pa.ipc.IpcWriteOptions(compression=compression)
    with new(str(FOLDER / name), table.schema, options=options) as writer:
        writer.write_table(table, max_chunksize=17)


def main():
    FOLDER.mkdir(exist_ok=True)
    for path in FOLDER.iterdir():
        path.unlink()
    whole, rows = table()
    # Version 1.0 has no nanoseconds and no unsigned 32 bits.
    coarse = whole.select([name for name in whole.column_names if not name.endswith("_ns")])
    parquet(coarse, "first", version="1.0", compression="none", use_dictionary=False)
    parquet(whole, "plain", compression="zstd", use_dictionary=False, row_group_size=16)
    parquet(whole, "pages_v2", data_page_version="2.0", compression="snappy")
    parquet(whole, "indexed", compression="gzip", write_page_index=True, write_page_checksum=True)
    # Without the note of Arrow's types that pyarrow leaves in a file: zones are gone then.
    zoneless = whole.select([name for name in whole.column_names if not name.startswith("Europe")])
    parquet(zoneless, "stranger", compression="lz4", store_schema=False)
    # Times in 96 bits.
    parquet(whole.select(["text", "local_ms", "UTC_us"]), "spark", flavor="spark")
    parquet(whole.select(["int64", "UTC_ms", "double"]), "packed", use_dictionary=False,
            column_encoding={"int64": "DELTA_BINARY_PACKED", "UTC_ms": "DELTA_BINARY_PACKED", "double": "BYTE_STREAM_SPLIT"})
    parquet(whole.select(["text", "large"]), "prefixes", use_dictionary=False,
            column_encoding={"text": "DELTA_BYTE_ARRAY", "large": "DELTA_LENGTH_BYTE_ARRAY"})
    arrow(whole, "file.arrow", pa.ipc.new_file)
    arrow(whole, "file_lz4.arrow", pa.ipc.new_file, "lz4")
    arrow(whole, "stream.arrows", pa.ipc.new_stream)
    arrow(whole, "stream_zstd.arrows", pa.ipc.new_stream, "zstd")
    (FOLDER / "rows.json").write_text(json.dumps(rows, ensure_ascii=False, indent=0) + "\n")


main()
