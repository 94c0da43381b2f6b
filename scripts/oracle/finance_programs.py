#!/usr/bin/env python3
"""Writes tests/fixtures/finance_programs.json: what the published evaluation of ConvFinQA makes of programs, good and bad.

    scripts/oracle/finance_programs.py general_utils.py

`general_utils.py` is `code/utils/general_utils.py` of https://github.com/czyssrs/ConvFinQA; it is not kept here. Programs are
cut into tokens as `program_tokenization` of FinQA's evaluation does: at `, ` and at brackets.
"""

import importlib.util
import json
import pathlib
import random
import re
import sys
import types

TABLE = [
    ["", "2014", "2013", "2012"],
    ["net sales", "$ 1,200.5", "$ 900", "-4.1 ( 4.1 )"],
    ["share", "5%", "7.25%", "-1%"],
    ["odd", "n/a", "1", "2"],
]
NUMBERS = ["0", "1", "2", "-3", "0.5", "164", "189", "1,234", "16923076", "5%", "12.5%", "-0.1", "1e3", "x", "const_100", "const_m1", "const_1000000"]
OPERATIONS = ["add", "subtract", "multiply", "divide", "exp", "greater"]


def tokens(program):
    found = []
    for part in program.split(", "):
        found += [piece for piece in re.split(r"(?<=\()|(?=\))", part) if piece]
    return found + ["EOF"]


def step(number):
    if random.random() < 0.15:
        row = random.choice(["net sales", "share", "odd", "costs"])
        return "%s(%s, none)" % (random.choice(["table_max", "table_min", "table_sum", "table_average"]), row)
    argument = lambda: "#%d" % (random.randint(0, number - 1) + (random.random() < 0.03)) if number and random.random() < 0.5 else random.choice(NUMBERS)
    return "%s(%s, %s)" % (random.choice(OPERATIONS), argument(), argument())


def main():
    # Imported at the top of the file, used by other functions only.
    for name in ("numpy", "sympy"):
        sys.modules.setdefault(name, types.SimpleNamespace(simplify=None))
    spec = importlib.util.spec_from_file_location("general_utils", sys.argv[1])
    official = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(official)
    random.seed(17)
    programs = NUMBERS + ["subtract(164, 189), divide(#0, 189)", "greater(2, 2)", "exp(-1, 0.5)", "exp(10, 400)", "divide(1, 0)"]
    while len(programs) < 600:
        programs.append(", ".join(step(number) for number in range(random.randint(1, 4))))
    cases = []
    for program in programs:
        invalid, result = official.eval_program(tokens(program), TABLE)
        if invalid or result == "n/a" or isinstance(result, complex):
            result = None
        cases.append([program, result])
    path = pathlib.Path(__file__).parents[2] / "tests/fixtures/finance_programs.json"
    text = ",\n".join(json.dumps(case) for case in cases)
    path.write_text('{"table": %s,\n"cases": [\n%s\n]}\n' % (json.dumps(TABLE), text))


main()
