#!/usr/bin/env python3
"""Sets `granite eval`'s Spider verdicts beside those of the published evaluation, on thousands of damaged gold queries.

    python scripts/oracle/check_spider.py OUTSIDE SPIDER [--granite granite] [--rounds 3] [--seed 17]

`OUTSIDE` is a checkout of https://github.com/taoyds/test-suite-sql-eval; it is not kept here. `SPIDER` is a folder with
`dev.json`, `tables.json` and `database/`. Needs sqlparse, nltk and tqdm, which that code imports.

Each usable question of `dev.json` gets one mutant of its gold query a round. Three things are compared:

- predictions: the mutant as an answer, judged against the gold query (`eval_exec_match` with its defaults: no values
  lent, DISTINCT removed), as correct, wrong, or an error of the mutant;
- golds: the mutant as gold and the gold query as the answer, which tries the reading of the gold's ORDER BY;
- hardness: of every gold query and of every mutant that runs and that the published parser takes.

The published code runs as it is, but for three replacements, without which it could not be run on such queries:
databases are opened read-only (a mutant may write) and interrupted after the time that ours allows (a join without its
condition may have 10^9 rows; the timeout of the published code cannot interrupt SQLite); a result is read up to the
number of rows that ours allows; and sentences are not split before words, which would need nltk's downloaded `punkt`
model and changes nothing in text without sentences.

Where the two differ the reason is looked for among `KNOWN`, each of which is a choice of ours or an accident of theirs,
with its test. Exits with 1 when a difference is left without one.
"""

import argparse
import asyncio
import json
import os
import random
import re
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

TIME, ROWS = 30, 100_000  # as `QueryLimits::default()`
TOKEN = re.compile(r"'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|\w+(?:\.\w+)*|[<>!]=|<>|\s+|.", re.S)


# --- damage ---------------------------------------------------------------------------------------------------------

class Query:
    """A gold query as tokens, with what its database knows."""

    def __init__(self, text, schema, rng):
        # Some gold queries end with a semicolon, behind which nothing could be added.
        self.text, self.schema, self.rng = text.rstrip("; "), schema, rng
        self.tokens = TOKEN.findall(self.text)

    def places(self, test):
        return [at for at, token in enumerate(self.tokens) if test(token)]

    def replaced(self, at, text):
        return "".join(self.tokens[:at] + [text] + self.tokens[at + 1:])

    def at_one(self, test, change):
        """The query with one token changed, or None where there is none to change."""
        places = self.places(test)
        if not places:
            return None
        at = self.rng.choice(places)
        return self.replaced(at, change(self.tokens[at]))

    def word(self, *words):
        return lambda token: token.lower() in words

    def part(self, first, *ends):
        """Begin and end of what follows a clause's first word, in the outermost query."""
        depth, start = 0, None
        for at, token in enumerate(self.tokens):
            depth += (token == "(") - (token == ")")
            word = token.lower()
            if start is not None and (depth < 0 or depth == 0 and word in ends + ("union", "intersect", "except")):
                return start, at
            if start is None and depth == 0 and word == first:
                start = at + 1
        return None if start is None else (start, len(self.tokens))

    def pieces(self, span, separator):
        """The tokens of a part, split at a separator outside of brackets."""
        found, depth = [[]], 0
        for token in self.tokens[span[0]:span[1]]:
            depth += (token == "(") - (token == ")")
            if depth == 0 and token.lower() == separator:
                found.append([])
            else:
                found[-1].append(token)
        return ["".join(piece).strip() for piece in found]

    def with_part(self, span, text):
        return "".join(self.tokens[:span[0]]) + " " + text + " " + "".join(self.tokens[span[1]:])

    def column(self):
        return self.rng.choice([name for _, name in self.schema["column_names_original"][1:]])


def is_number(token):
    return token.replace(".", "", 1).isdigit()


def is_text(token):
    return token[0] in "'\""


def other(words, q):
    return lambda token: q.rng.choice([word for word in words if word != token.lower()])


AGGREGATES = ("max", "min", "avg", "sum", "count")
COMPARISONS = ("=", "!=", "<", ">", "<=", ">=", "<>", "LIKE", "> =", "< =", "! =")


def select_list(q):
    span = q.part("select", "from")
    return (span, q.pieces(span, ",")) if span else (None, [])


def change_select(q, change):
    span, columns = select_list(q)
    return q.with_part(span, ", ".join(change(columns))) if columns else None


def shuffled(q, columns):
    return q.rng.sample(columns, len(columns))


def change_where(q, change):
    span = q.part("where", "group", "order", "limit")
    conditions = q.pieces(span, "and") if span else []
    return q.with_part(span, change(conditions)) if len(conditions) > 1 else None


def without_part(q, first, *ends):
    span = q.part(first, *ends)
    return "".join(q.tokens[:span[0] - 1] + q.tokens[span[1]:]) if span else None


def without_join_condition(q):
    places = q.places(q.word("on"))
    if not places:
        return None
    at = q.rng.choice(places)
    ends = q.word("where", "group", "order", "limit", "join", "union", "intersect", "except", ")")
    end = next((i for i in range(at, len(q.tokens)) if ends(q.tokens[i])), len(q.tokens))
    return "".join(q.tokens[:at] + q.tokens[end:])


def renamed_alias(q, everywhere):
    places = q.places(lambda token: re.match(r"t\d(\.|$)", token, re.I))
    if not places:
        return None
    if everywhere:
        return re.sub(r"\b[tT](\d)\b", r"alias_\1", q.text)
    at = q.rng.choice(places)
    return q.replaced(at, "other" + q.tokens[at][2:])


def changed_ends(q):
    return q.text.replace(" ASC", " DESC") if " ASC" in q.text else q.text + " DESC" if "ORDER BY" in q.text else None


def cut(q):
    words = q.text.split(" ")
    return " ".join(words[:q.rng.randrange(1, len(words))])


def misspelt(q):
    return q.at_one(q.word("select", "from", "where", "group", "order", "join", "by"), lambda token: token[:-1])


def no_bracket(q):
    return q.at_one(lambda token: token in "()", lambda _: "")


MUTATIONS = {
    "number": lambda q: q.at_one(is_number, lambda n: q.rng.choice([str(float(n)), n + "0", f"'{n}'", f"{n} + 1", "0", f"-{n}"])),
    "text": lambda q: q.at_one(is_text, lambda t: q.rng.choice([t.upper(), t.lower(), t[:-2] + t[-1], "NULL", f"'{t[1:-1]}'", "'%a%'"])),
    "operator": lambda q: q.at_one(lambda t: t in COMPARISONS or t.lower() == "like", other(COMPARISONS, q)),
    "column": lambda q: q.at_one(lambda t: re.match(r"[tT]\d\.\w", t), lambda t: t[:3] + q.column()),
    "any column": lambda q: q.at_one(lambda t: t.lower() in {n.lower() for _, n in q.schema["column_names_original"]}, lambda _: q.column()),
    "table": lambda q: q.at_one(lambda t: t.lower() in {n.lower() for n in q.schema["table_names_original"]}, lambda _: q.rng.choice(q.schema["table_names_original"])),
    "add distinct": lambda q: q.at_one(q.word("select"), lambda t: t + " DISTINCT"),
    "drop distinct": lambda q: q.at_one(q.word("distinct"), lambda _: ""),
    "distinct in aggregate": lambda q: re.sub(r"(count|sum|avg|COUNT|SUM|AVG)\s*\((?!\s*\*)", r"\1(DISTINCT ", q.text) if re.search(r"(?i)(count|sum|avg)\s*\((?!\s*\*)", q.text) else None,
    "add order": lambda q: f"{q.text} ORDER BY {q.rng.choice(['1', '1 DESC', q.column()])}" if "order by" not in q.text.lower() else None,
    "drop order": lambda q: without_part(q, "order", "limit"),
    "turn order": changed_ends,
    "add limit": lambda q: f"{q.text} LIMIT {q.rng.choice(['0', '1', '2', '1000', '3 OFFSET 1'])}" if "limit" not in q.text.lower() else None,
    "drop limit": lambda q: without_part(q, "limit"),
    "aggregate": lambda q: q.at_one(q.word(*AGGREGATES), other(AGGREGATES, q)),
    "add aggregate": lambda q: change_select(q, lambda c: [f"{q.rng.choice(AGGREGATES)}({c[0]})"] + c[1:]),
    "drop join condition": without_join_condition,
    "outer join": lambda q: q.at_one(q.word("join"), lambda t: q.rng.choice(["LEFT JOIN", "CROSS JOIN", "NATURAL JOIN", "RIGHT JOIN", ","])),
    "rename alias": lambda q: renamed_alias(q, True),
    "break alias": lambda q: renamed_alias(q, False),
    "swap tables": lambda q: q.at_one(lambda t: re.match(r"[tT]\d\.", t), lambda t: ("T2" if t[1] == "1" else "T1") + t[2:]),
    "reorder columns": lambda q: change_select(q, lambda c: shuffled(q, c)) if len(select_list(q)[1]) > 1 else None,
    "repeat column": lambda q: change_select(q, lambda c: c + [q.rng.choice(c)]),
    "drop column": lambda q: change_select(q, lambda c: c[1:]) if len(select_list(q)[1]) > 1 else None,
    "add column": lambda q: change_select(q, lambda c: c + [q.column()]),
    "star": lambda q: change_select(q, lambda _: ["*"]),
    "reorder conditions": lambda q: change_where(q, lambda c: " AND ".join(reversed(c))),
    "or for and": lambda q: change_where(q, lambda c: " OR ".join(c)),
    "drop condition": lambda q: change_where(q, lambda c: " AND ".join(c[1:])),
    "negate": lambda q: q.at_one(q.word("where"), lambda t: t + " NOT"),
    "set operation": lambda q: q.at_one(q.word("union", "intersect", "except"), other(("union", "intersect", "except", "union all"), q)),
    "float": lambda q: change_select(q, lambda c: [c[0] + q.rng.choice([" + 0.0", " * 1.0", " + 0.0000000000001", " / 1"])] + c[1:]),
    "rounding": lambda q: change_select(q, lambda c: [f"({c[0]}) / 7.0 * 7.0"] + c[1:]),
    "cast": lambda q: change_select(q, lambda c: [f"CAST({c[0]} AS {q.rng.choice(['TEXT', 'INTEGER', 'REAL', 'BLOB'])})"] + c[1:]),
    "nested": lambda q: f"SELECT * FROM ({q.text})",
    "with": lambda q: f"WITH answer AS ({q.text}) SELECT * FROM answer",
    "in itself": lambda q: f"{q.text} {q.rng.choice(['UNION', 'INTERSECT', 'UNION ALL'])} {q.text}",
    "lower case": lambda q: "".join(t if is_text(t) else t.lower() for t in q.tokens),
    "white space": lambda q: q.text.replace(" ", q.rng.choice(["  ", "\t", "\n"])),
    "comment": lambda q: q.text + " -- " + q.rng.choice(["distinct", "order by", "it's"]),
    "text with keywords": lambda q: change_select(q, lambda c: c + [q.rng.choice(["'distinct'", "'order by'", "'> ='", "\"DISTINCT\"", "';'"])]),
    "semicolon": lambda q: q.text + q.rng.choice([";", " ; ", ";;"]),
    "two statements": lambda q: f"{q.text}; {q.text}",
    "cut": cut,
    "misspelt": misspelt,
    "bracket": no_bracket,
    "unknown column": lambda q: change_select(q, lambda c: ["no_such_column"] + c[1:]),
    "no query": lambda q: q.rng.choice(["", " ", "I do not know", "SELECT", ";", "NULL", "SELECT ?", "EXPLAIN " + q.text, "PRAGMA table_info(singer)"]),
    "writes": lambda q: q.rng.choice(["DELETE FROM {}", "DROP TABLE {}", "INSERT INTO {} DEFAULT VALUES", "CREATE TABLE {}_2 (a)", "UPDATE {} SET rowid = 1"]).format(q.schema["table_names_original"][0]),
}


def mutant(question, schema, rng, names):
    """Some damage that changes the query's text, by name; `names` is the round's pack, dealt evenly."""
    query = Query(question["query"], schema, rng)
    for index, name in enumerate(names):
        text = MUTATIONS[name](query)
        if text is not None and text not in (query.text, question["query"]):
            names.append(names.pop(index))
            return name, text
    raise AssertionError("every query can be cut")


# --- the published evaluation -----------------------------------------------------------------------------------------

class Cursor:
    """A read-only cursor that ends when ours would."""

    rounded = False

    def __init__(self, path):
        self.connection = sqlite3.connect(f"file:{path}?mode=ro", uri=True)
        self.connection.text_factory = lambda data: data.decode(errors="ignore")
        end = time.monotonic() + TIME
        self.connection.set_progress_handler(lambda: time.monotonic() > end, 10_000)
        self.cursor = self.connection.cursor()
        self.execute, self.close = self.cursor.execute, self.cursor.close

    def fetchall(self):
        rows = self.cursor.fetchmany(ROWS + 1)
        if len(rows) > ROWS:
            raise sqlite3.OperationalError("too many rows")
        return [tuple(map(rounded, row)) for row in rows] if Cursor.rounded else rows


def rounded(value):
    """Floats to ten digits; a whole one is written as the whole number that it is equal to."""
    return float(f"{value:.9e}") if isinstance(value, float) else value


class Outside:
    def __init__(self, checkout):
        sys.path.insert(0, str(checkout))
        import evaluation
        import exec_eval
        import nltk
        import process_sql
        process_sql.word_tokenize = partial(nltk.word_tokenize, preserve_line=True)
        exec_eval.get_cursor_from_path = Cursor
        self.evaluation, self.exec_eval, self.process_sql = evaluation, exec_eval, process_sql

    def runs(self, path, query):
        """Whether a query runs as the evaluation runs it; the text of what goes wrong otherwise."""
        query = self.exec_eval.remove_distinct(self.exec_eval.postprocess(query))
        flag, result = asyncio.run(self.exec_eval.exec_on_db(str(path), query))
        return None if flag == "result" else str(result)

    def verdict(self, path, gold, predicted):
        try:
            if self.runs(path, gold) is not None:
                return "gold_failed", "the gold query fails"
            score = self.exec_eval.eval_exec_match(str(path), predicted, gold, False, False, False)
            error = self.runs(path, predicted)
        except Exception as error:  # noqa: BLE001 - sqlparse gives no tokens for an empty query
            return "crashed", repr(error)
        if error is not None and score == 0:
            return "failed", error
        return ("correct" if score else "wrong"), ""

    def verdict_if_rounded(self, path, gold, predicted):
        Cursor.rounded = True
        try:
            return self.verdict(path, gold, predicted)[0]
        finally:
            Cursor.rounded = False

    def hardness(self, path, query):
        """None where the published parser does not take the query."""
        try:
            schema = self.process_sql.Schema(self.process_sql.get_schema(str(path)))
            return self.evaluation.Evaluator().eval_hardness(self.process_sql.get_sql(schema, query))
        except Exception:  # noqa: BLE001 - it fails by assertions, indices and keys
            return None


# --- ours ---------------------------------------------------------------------------------------------------------------

RECIPE = """name = "oracle"
[model]
base = "none"
[eval.spider]
path = "{questions}"
tables = "{spider}/tables.json"
databases = "{spider}/database"
"""


def ours(granite, folder, spider, questions, answers):
    """The results' lines of each set of answers, by name and question."""
    (folder / "dev.json").write_text(json.dumps(questions))
    (folder / "recipe.toml").write_text(RECIPE.format(questions=folder / "dev.json", spider=spider))
    command = [granite, "eval", "--quiet", "--recipe", folder / "recipe.toml", "--out", folder / "out", "--device", "cpu"]
    for name, lines in answers.items():
        (folder / name).mkdir()
        text = "".join(json.dumps({"id": identity, "answer": answer}) + "\n" for identity, answer in lines.items())
        (folder / name / "spider.jsonl").write_text(text)
        command += ["--answers", folder / name]
    subprocess.run(command, check=True)
    lines = {name: (folder / "out" / name / "spider.jsonl").read_text().splitlines() for name in answers}
    return {name: {line["id"]: line for line in map(json.loads, of)} for name, of in lines.items()}


# --- side by side -------------------------------------------------------------------------------------------------------

def ends_early(case, outside):
    """Ours takes an answer up to its first `;` or empty line, as a model goes on to explain; the rest is judged alike."""
    cut = case["extracted"] != case["predicted"].strip()
    return cut and outside.verdict(case["path"], case["gold"], case["extracted"])[0] == case["ours"]


def differs_by_rounding(case, outside):
    """Ours takes two floats that differ by 10^-9 of their size, or less, as one: the order of a sum makes such."""
    return outside.verdict_if_rounded(case["path"], case["gold"], case["predicted"]) == case["ours"]


def runs_first_statement(case, _):
    """Theirs forgets what is behind the first `;` as it removes DISTINCT; to ours two statements are no gold query."""
    statement, _, rest = case["gold"].partition(";")
    return bool(rest.strip("; ")) and case["ours"] == "gold_failed"


def is_nothing(case, _):
    """An empty query fails in ours; theirs ends with an IndexError, and takes `;` as a query that finds no row."""
    nothing = not case["gold"].strip("; ") or not case["predicted"].strip("; ")
    return nothing and case["ours"] in ("failed", "gold_failed") and case["theirs"] in ("crashed", "wrong")


def is_no_reading(case, _):
    """Ours refuses what is no query although it writes nothing (PRAGMA, EXPLAIN of what writes)."""
    return "only reading is allowed" in case["errors"][0] and case["ours"] in ("failed", "gold_failed")


KNOWN = [ends_early, differs_by_rounding, runs_first_statement, is_nothing, is_no_reading]


def explained(case, outside):
    found = (known.__doc__ for known in KNOWN if known(case, outside))
    return next(found, None)


def table(title, counts, rows, columns):
    print(f"\n{title}")
    print("ours, theirs".ljust(16) + "".join(f"{column:>13}" for column in columns))
    for row in rows:
        print(f"{row:16}" + "".join(f"{counts[row, column]:13}" for column in columns))


def compare_verdicts(title, cases, outside):
    counts = Counter((case["ours"], case["theirs"]) for case in cases)
    verdicts = sorted({verdict for pair in counts for verdict in pair})
    table(title, counts, verdicts, verdicts)
    same_score = sum((case["ours"] == "correct") == (case["theirs"] == "correct") for case in cases)
    differing = [case | {"reason": explained(case, outside)} for case in cases if case["ours"] != case["theirs"]]
    print(f"{len(cases)} compared, {same_score} score alike ({same_score / len(cases):.2%}), {len(cases) - len(differing)} have the same verdict")
    for reason, count in Counter(case["reason"] for case in differing).most_common():
        print(f"  {count:5}  {reason or 'NO REASON KNOWN'}")
    unexplained = [case for case in differing if case["reason"] is None]
    for case in unexplained:
        print("      ", json.dumps(case, default=str))
    return len(unexplained)


def compare_hardness(title, pairs):
    counts = Counter((one, two) for one, two, _ in pairs)
    classes = ["easy", "medium", "hard", "extra"]
    table(title, counts, classes, classes)
    differing = [query for one, two, query in pairs if one != two]
    print(f"{len(pairs)} compared, {len(pairs) - len(differing)} agree")
    for query in differing:
        print(f"  {query}")
    return len(differing)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("outside", type=Path)
    parser.add_argument("spider", type=Path)
    parser.add_argument("--granite", default="granite")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=17)
    arguments = parser.parse_args()
    outside = Outside(arguments.outside.resolve())
    spider = arguments.spider.resolve()
    rng = random.Random(arguments.seed)
    schemas = {schema["db_id"]: schema for schema in json.loads((spider / "tables.json").read_text())}
    questions = json.loads((spider / "dev.json").read_text())
    path_of = lambda question: spider / "database" / question["db_id"] / f"{question['db_id']}.sqlite"

    names = list(MUTATIONS)
    rng.shuffle(names)
    rounds = [[mutant(one, schemas[one["db_id"]], rng, names) for one in questions] for _ in range(arguments.rounds)]
    slim = lambda question, query: {"db_id": question["db_id"], "question": question["question"], "query": query}

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        numbered = lambda texts: {str(at + 1): text for at, text in enumerate(texts)}
        answers = {f"round-{at}": numbered(text for _, text in mutants) for at, mutants in enumerate(rounds)}
        answers["gold"] = numbered(question["query"] for question in questions)
        (folder / "predictions").mkdir()
        judged = ours(arguments.granite, folder / "predictions", spider, questions, answers)
        turned = []
        for at, mutants in enumerate(rounds):
            (folder / f"golds-{at}").mkdir()
            as_gold = [slim(one, text) for one, (_, text) in zip(questions, mutants)]
            turned.append(ours(arguments.granite, folder / f"golds-{at}", spider, as_gold, {"gold": answers["gold"]})["gold"])

    correct = sum(line["verdict"] == "correct" for line in judged["gold"].values())
    print(f"gold against gold: {correct} of {len(judged['gold'])} correct")

    predictions, golds, hardness = [], [], []
    for at, mutants in enumerate(rounds):
        for identity, line in judged[f"round-{at}"].items():
            question = questions[int(identity) - 1]
            kind, text = mutants[int(identity) - 1]
            path, gold = path_of(question), question["query"]
            case = {"kind": kind, "path": path, "gold": gold, "predicted": text, "extracted": line["extracted"]}
            theirs, error = outside.verdict(path, gold, text)
            predictions.append(case | {"ours": line["verdict"], "theirs": theirs, "errors": [line.get("error", ""), error]})
            line = turned[at][identity]
            theirs, error = outside.verdict(path, text, gold)
            case = {"kind": kind, "path": path, "gold": text, "predicted": gold, "extracted": gold}
            golds.append(case | {"ours": line["verdict"], "theirs": theirs, "errors": [line.get("error", ""), error]})
            if theirs != "gold_failed" and (theirs := outside.hardness(path, text)) is not None:
                hardness.append((line["group"], theirs, text))

    kinds = Counter(case["kind"] for case in predictions)
    print(f"{len(predictions)} mutants of {len(judged['gold'])} questions, {min(kinds.values())} to {max(kinds.values())} of each of {len(kinds)} kinds")
    left = compare_verdicts("Predictions: a mutant judged against its gold query", predictions, outside)
    left += compare_verdicts("Golds: the gold query judged against its mutant", golds, outside)
    of_gold = [(line["group"], outside.hardness(path_of(questions[int(at) - 1]), line["reference"]), line["reference"]) for at, line in judged["gold"].items()]
    left += compare_hardness("Hardness of gold queries", of_gold)
    left += compare_hardness("Hardness of mutants that run and that the published parser takes", hardness)
    print(f"\n{left} differences without a known reason")
    sys.exit(1 if left else 0)


if __name__ == "__main__":
    main()
