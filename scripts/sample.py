#!/usr/bin/env python3
"""Writes the generated half of datasets/sample: ConvFinQA conversations and the Spider questions with their databases.

Companies, people and figures are invented; a fixed seed makes them, so every run writes the same bytes (but for the
version that SQLite stamps into a database). Programs are executed to get their answers, and every query is run before
it is written. The other files of the sample are written by hand. Only the standard library is needed:

    python3 scripts/sample.py [FOLDER]
"""

import json
import random
import re
import sqlite3
import sys
from pathlib import Path

SAMPLE = Path(__file__).resolve().parents[1] / "datasets" / "sample"


# --- ConvFinQA ---------------------------------------------------------------------------------------------------

COMPANIES = [
    ("ALDR", "alder rail freight"),
    ("BRKW", "brookwater utilities"),
    ("CNDL", "candlewick stores"),
    ("DRFT", "driftline shipping"),
    ("EMBR", "ember kitchens"),
    ("FNLD", "fenland insurance"),
    ("GRVL", "gravel lane quarries"),
    ("HTHR", "heather biotech"),
    ("INKW", "inkwell publishing"),
    ("JUNP", "juniper hotels"),
    ("KSTR", "kestrel avionics"),
    ("LNTN", "lantern software"),
]
LINES = [
    ("net revenue", "cost of revenue", "operating expenses", "operating income"),
    ("premiums earned", "claims paid", "acquisition costs", "underwriting result"),
    ("net sales", "cost of goods sold", "selling expenses", "operating profit"),
]
OPERATIONS = {
    "add": lambda a, b: a + b,
    "subtract": lambda a, b: a - b,
    "multiply": lambda a, b: a * b,
    "divide": lambda a, b: a / b,
    "greater": lambda a, b: "yes" if a > b else "no",
}


def execute(program: str):
    """Runs a program such as `subtract(5, 3), divide(#0, 3)`; a bare number is its own answer."""
    results = []
    calls = re.findall(r"(\w+)\(([^,]+), ([^)]+)\)", program)
    for operation, *arguments in calls:
        values = [results[int(a[1:])] if a.startswith("#") else float(a) for a in arguments]
        results.append(OPERATIONS[operation](*values))
    answer = results[-1] if calls else float(program)
    return answer if isinstance(answer, str) else round(answer, 5)


def steps_of(program: str) -> list[dict]:
    calls = re.findall(r"(\w+)\(([^,]+), ([^)]+)\)", program)
    out = []
    for at, (operation, first, second) in enumerate(calls):
        so_far = ", ".join(f"{o}({a}, {b})" for o, a, b in calls[: at + 1])
        out.append({"op": f"{operation}{len(calls)}-{at + 1}", "arg1": first, "arg2": second, "res": str(execute(so_far))})
    return out


def nested(program: str) -> str:
    """`subtract(5, 3), divide(#0, 3)` as `divide(subtract(5, 3), 3)`."""
    parts = []
    for call in re.findall(r"\w+\([^)]*\)", program):
        parts.append(re.sub(r"#(\d+)", lambda match: parts[int(match.group(1))], call))
    return parts[-1]


def percent(answer) -> str:
    return answer if isinstance(answer, str) else f"{100 * answer:.1f}%"


def statement(index: int, rng: random.Random):
    """Two years of an income statement; every figure in tenths of a million."""
    year = 2012 + index % 6
    lines = LINES[2] if index % 3 == 2 else LINES[1] if "insurance" in COMPANIES[index][1] else LINES[0]
    columns = []
    base = rng.randint(3000, 9000)
    for _ in range(2):
        sales = base + rng.randint(-400, 900)
        cost = round(sales * rng.uniform(0.5, 0.62))
        # Some years close with a loss, which the upstream tables write as `-4.1 ( 4.1 )`.
        expenses = round(sales * (rng.uniform(0.42, 0.48) if index % 4 == 1 and not columns else rng.uniform(0.2, 0.3)))
        columns.append([sales, cost, expenses, sales - cost - expenses])
    return year, lines, columns


def cell(tenths: int) -> str:
    return f"{tenths / 10:.1f}" if tenths >= 0 else f"{tenths / 10:.1f} ( {-tenths / 10:.1f} )"


def ori(tenths: int) -> str:
    return f"$ {tenths / 10:,.1f}" if tenths >= 0 else f"({-tenths / 10:,.1f})"


def dialogue(index: int, year: int, lines, columns):
    """Questions and programs of one conversation: figures, difference, relative change, then a second theme."""
    now, before = columns
    at = index % 3
    a, b = (f"{column[at] / 10:.1f}" for column in (now, before))
    turns = [
        (f"what was the {lines[at]} in {year}?", a),
        (f"and what was it in {year - 1}?", b),
        ("what was, then, the change over the year?", f"subtract({a}, {b})"),
        (f"and what does this change represent in relation to the {year - 1} figure, as a percentage?",
         f"subtract({a}, {b}), divide(#0, {b})"),
    ]
    qa = [(f"what was the percentage change in {lines[at]} from {year - 1} to {year}?", turns[-1][1])]
    split = [0] * len(turns)
    if index % 3 == 0:
        sales, cost = f"{now[0] / 10:.1f}", f"{now[1] / 10:.1f}"
        margin = f"subtract({sales}, {cost}), divide(#0, {sales})"
        extra = [
            (f"what was the {lines[0]} less the {lines[1]} in {year}?", f"subtract({sales}, {cost})"),
            (f"how much is that of the {lines[0]}?", margin),
        ]
        qa.append((f"what share of {lines[0]} remained after {lines[1]} in {year}?", margin))
        turns += extra
        split += [1] * len(extra)
    elif index % 3 == 1:
        x, y = (f"{column[3] / 10:.1f}" for column in (now, before))
        turns.append((f"was the {lines[3]} greater in {year} than in {year - 1}?", f"greater({x}, {y})"))
        split.append(0)
        qa = [(f"did the {lines[3]} grow in {year}?", f"greater({x}, {y})")]
    return turns, split, qa


def annotate(question: str, program: str, rows: list[int]) -> dict:
    answer = execute(program)
    return {
        "question": question,
        "answer": percent(answer),
        "explanation": "",
        "ann_table_rows": rows,
        "ann_text_rows": [],
        "steps": steps_of(program),
        "program": program,
        "gold_inds": {f"table_{row}": "" for row in rows},
        "exe_ans": answer,
        "program_re": nested(program),
    }


def conversation(index: int, rng: random.Random) -> dict:
    ticker, company = COMPANIES[index]
    year, lines, columns = statement(index, rng)
    header = ["", str(year), str(year - 1)]
    table = [header] + [[line, *(cell(column[row]) for column in columns)] for row, line in enumerate(lines)]
    shown = [header] + [[line.capitalize(), *(ori(column[row]) for column in columns)] for row, line in enumerate(lines)]
    turns, split, qa = dialogue(index, year, lines, columns)
    people = rng.randint(2, 40) * 100
    before = [
        f"{company} , inc . results of operations ( in millions ) .",
        f"the following table sets out the results of {company} for the years ended december 31 , {year} and {year - 1} .",
    ]
    after = [
        f"at the end of {year} the company had about {people} employees .",
        f"figures for {year - 1} were not restated .",
    ]
    page = rng.randint(21, 98)
    name = f"{ticker}/{year}/page_{page}.pdf"
    html = "".join(
        f"<tr><td>{row + 1}</td>" + "".join(f"<td>{value}</td>" for value in cells) + "</tr>"
        for row, cells in enumerate(table)
    )
    answers = [execute(program) for _, program in turns]
    double = len(qa) == 2
    annotation = {
        "amt_table": f"<table class='wikitable'>{html}</table>",
        "amt_pre_text": " ".join(before),
        "amt_post_text": " ".join(after),
        **({f"original_program_{i}": q[1] for i, q in enumerate(qa)} if double else {"original_program": qa[0][1]}),
        "step_list": [f"Step {at + 1}: {program}" for at, (_, program) in enumerate(turns)],
        "answer_list": [str(answer) for answer in answers],
        "dialogue_break": [question for question, _ in turns],
        "turn_program": [program for _, program in turns],
        "qa_split": split,
        "exe_ans_list": answers,
    }
    rows = list(range(1, len(table)))
    questions = {f"qa_{i}": annotate(*q, rows) for i, q in enumerate(qa)} if double else {"qa": annotate(*qa[0], rows)}
    return {
        "pre_text": before,
        "post_text": after,
        "filename": name,
        "table_ori": shown,
        "table": table,
        **questions,
        "id": f"{'Double' if double else 'Single'}_{name}{'' if double else f'-{index % 4 + 1}'}",
        "annotation": annotation,
    }


def write_convfinqa(folder: Path) -> None:
    rng = random.Random(11)
    folder.mkdir(parents=True, exist_ok=True)
    conversations = [conversation(index, rng) for index in range(len(COMPANIES))]
    (folder / "train.json").write_text(json.dumps(conversations, indent=1) + "\n")


# --- Spider ------------------------------------------------------------------------------------------------------

# Per database: tables with their columns (name, type, words), the primary key first; foreign keys as column pairs.
SCHEMAS = {
    "loan_book": {
        "tables": {
            "branch": [("branch_id", "number"), ("city", "text"), ("opened_year", "number")],
            "customer": [("customer_id", "number"), ("name", "text"), ("branch_id", "number"), ("income", "number")],
            "loan": [
                ("loan_id", "number"), ("customer_id", "number"), ("amount", "number"), ("rate", "number"),
                ("purpose", "text"), ("start_date", "time"), ("status", "text"),
            ],
            "payment": [("payment_id", "number"), ("loan_id", "number"), ("paid_on", "time"), ("amount", "number")],
        },
        "foreign": [("customer.branch_id", "branch.branch_id"), ("loan.customer_id", "customer.customer_id"),
                    ("payment.loan_id", "loan.loan_id")],
    },
    "warehouse": {
        "tables": {
            "supplier": [("supplier_id", "number"), ("name", "text"), ("country", "text")],
            "product": [("product_id", "number"), ("name", "text"), ("category", "text"), ("unit_price", "number"),
                        ("supplier_id", "number")],
            "site": [("site_id", "number"), ("city", "text"), ("capacity", "number")],
            "stock": [("product_id", "number"), ("site_id", "number"), ("quantity", "number")],
        },
        "foreign": [("product.supplier_id", "supplier.supplier_id"), ("stock.product_id", "product.product_id"),
                    ("stock.site_id", "site.site_id")],
    },
}
SQL_TYPES = {"number": "REAL", "text": "TEXT", "time": "TEXT"}

# Questions: database, question, query. Doubled spaces, trailing semicolons and double-quoted strings are upstream's.
TRAIN = [
    ("loan_book", "How many customers are there?", "SELECT count(*) FROM customer"),
    ("loan_book", "List the cities of all branches.", "SELECT city FROM branch"),
    ("loan_book", "What are the names of customers ordered by income from high to low?", "SELECT name FROM customer ORDER BY income DESC"),
    ("loan_book", "What is the total amount of all loans?", "SELECT sum(amount) FROM loan"),
    ("loan_book", "What is the average rate of loans for a car?", "SELECT avg(rate) FROM loan WHERE purpose  =  'car'"),
    ("loan_book", "How many loans are late ?", "SELECT count(*) FROM loan WHERE status  =  \"late\""),
    ("loan_book", "Find the largest and smallest loan amount.", "SELECT max(amount) ,  min(amount) FROM loan"),
    ("loan_book", "For each purpose, how many loans are there?", "SELECT purpose ,  count(*) FROM loan GROUP BY purpose"),
    ("loan_book", "Which purposes have more than three loans?", "SELECT purpose FROM loan GROUP BY purpose HAVING count(*)  >  3"),
    ("loan_book", "What are the names of the customers of the branch in Harwick?", "SELECT T1.name FROM customer AS T1 JOIN branch AS T2 ON T1.branch_id  =  T2.branch_id WHERE T2.city  =  'Harwick'"),
    ("loan_book", "Show each branch city with its number of customers.", "SELECT T2.city ,  count(*) FROM customer AS T1 JOIN branch AS T2 ON T1.branch_id  =  T2.branch_id GROUP BY T2.branch_id"),
    ("loan_book", "Who has the highest income?", "SELECT name FROM customer ORDER BY income DESC LIMIT 1;"),
    ("loan_book", "List the names of customers who have no loan.", "SELECT name FROM customer WHERE customer_id NOT IN (SELECT customer_id FROM loan)"),
    ("loan_book", "What are the amounts of loans above the average amount?", "SELECT amount FROM loan WHERE amount  >  (SELECT avg(amount) FROM loan)"),
    ("loan_book", "How much has been paid back in total?", "SELECT sum(amount) FROM payment"),
    ("loan_book", "For each loan, how much has been paid?", "SELECT loan_id ,  sum(amount) FROM payment GROUP BY loan_id"),
    ("loan_book", "Which different purposes of loans exist?", "SELECT DISTINCT purpose FROM loan"),
    ("loan_book", "Which branches opened after 2005?", "SELECT city FROM branch WHERE opened_year  >  2005"),
    ("loan_book", "What is the total loan amount of each customer, by name?", "SELECT T1.name ,  sum(T2.amount) FROM customer AS T1 JOIN loan AS T2 ON T1.customer_id  =  T2.customer_id GROUP BY T1.customer_id"),
    ("loan_book", "Find the names of customers with an income between 30000 and 45000.", "SELECT name FROM customer WHERE income BETWEEN 30000 AND 45000"),
    ("loan_book", "How many payments were made in 2024?", "SELECT count(*) FROM payment WHERE paid_on LIKE '2024%'"),
    ("warehouse", "How many products are there?", "SELECT count(*) FROM product"),
    ("warehouse", "What are the names and prices of all tools?", "SELECT name ,  unit_price FROM product WHERE category  =  'tools'"),
    ("warehouse", "Which supplier countries are there?", "SELECT DISTINCT country FROM supplier"),
    ("warehouse", "What is the average unit price of each category?", "SELECT category ,  avg(unit_price) FROM product GROUP BY category"),
    ("warehouse", "Which product is the most expensive?", "SELECT name FROM product ORDER BY unit_price DESC LIMIT 1"),
    ("warehouse", "How many units are stored at each site? Give the city.", "SELECT T2.city ,  sum(T1.quantity) FROM stock AS T1 JOIN site AS T2 ON T1.site_id  =  T2.site_id GROUP BY T2.site_id"),
    ("warehouse", "List the names of products from suppliers in Norway.", "SELECT T1.name FROM product AS T1 JOIN supplier AS T2 ON T1.supplier_id  =  T2.supplier_id WHERE T2.country  =  'Norway'"),
    ("warehouse", "What is the total capacity of all sites?", "SELECT sum(capacity) FROM site;"),
    ("warehouse", "Which products are not in stock anywhere?", "SELECT name FROM product WHERE product_id NOT IN (SELECT product_id FROM stock)"),
    ("warehouse", "What is the value of the stock of each product?", "SELECT T1.name ,  sum(T1.unit_price * T2.quantity) FROM product AS T1 JOIN stock AS T2 ON T1.product_id  =  T2.product_id GROUP BY T1.product_id"),
    ("warehouse", "Which sites can hold more than 5000 units?", "SELECT city FROM site WHERE capacity  >  5000"),
    ("warehouse", "Show the suppliers' names in alphabetical order.", "SELECT name FROM supplier ORDER BY name"),
    ("warehouse", "How many products does each supplier deliver?", "SELECT T2.name ,  count(*) FROM product AS T1 JOIN supplier AS T2 ON T1.supplier_id  =  T2.supplier_id GROUP BY T2.supplier_id"),
    ("warehouse", "Which categories have at least three products?", "SELECT category FROM product GROUP BY category HAVING count(*)  >=  3"),
    ("warehouse", "What are the cities of sites that hold drills?", "SELECT T3.city FROM product AS T1 JOIN stock AS T2 ON T1.product_id  =  T2.product_id JOIN site AS T3 ON T2.site_id  =  T3.site_id WHERE T1.name  =  'drill'"),
    ("warehouse", "What is the cheapest price?", "SELECT min(unit_price) FROM product"),
    ("warehouse", "Find products that cost more than the average.", "SELECT name FROM product WHERE unit_price  >  (SELECT avg(unit_price) FROM product)"),
    ("warehouse", "Which site has the largest capacity?", "SELECT city FROM site ORDER BY capacity DESC LIMIT 1"),
    ("warehouse", "List product names that contain the word steel.", "SELECT name FROM product WHERE name LIKE '%steel%'"),
]
DEV = [
    ("loan_book", "How many loans are there?", "SELECT count(*) FROM loan"),
    ("loan_book", "What is the highest rate of any loan?", "SELECT max(rate) FROM loan"),
    ("loan_book", "Show the names and incomes of all customers.", "SELECT name ,  income FROM customer"),
    ("loan_book", "How many loans has each status?", "SELECT status ,  count(*) FROM loan GROUP BY status"),
    ("loan_book", "What are the names of customers with a late loan?", "SELECT T1.name FROM customer AS T1 JOIN loan AS T2 ON T1.customer_id  =  T2.customer_id WHERE T2.status  =  'late'"),
    ("loan_book", "Which branch opened first?", "SELECT city FROM branch ORDER BY opened_year LIMIT 1"),
    ("warehouse", "How many suppliers are there?", "SELECT count(*) FROM supplier"),
    ("warehouse", "What is the average price of all products?", "SELECT avg(unit_price) FROM product"),
    ("warehouse", "List the names of products cheaper than 10.", "SELECT name FROM product WHERE unit_price  <  10"),
    ("warehouse", "How many sites are there?", "SELECT count(*) FROM site"),
    ("warehouse", "For each country, how many suppliers are there?", "SELECT country ,  count(*) FROM supplier GROUP BY country"),
    ("warehouse", "What are the names of products stored in Lorne?", "SELECT T1.name FROM product AS T1 JOIN stock AS T2 ON T1.product_id  =  T2.product_id JOIN site AS T3 ON T2.site_id  =  T3.site_id WHERE T3.city  =  'Lorne'"),
]


def rows_of(name: str, rng: random.Random) -> dict[str, list[tuple]]:
    if name == "loan_book":
        people = ["Ada Quill", "Ben Marsh", "Cleo Ferris", "Dov Ansel", "Etta Lind", "Finn Osei", "Gia Moreau",
                  "Hugo Brandt", "Ines Sato", "Jon Aldous", "Kira Novak", "Leo Tran"]
        statuses = ["current", "current", "late", "repaid"]
        loans = [
            (i + 1, rng.randint(1, 10), rng.randint(2, 60) * 500, round(rng.uniform(2.5, 9.5), 2),
             rng.choice(["house", "car", "study", "shop"]), f"20{rng.randint(18, 23)}-{rng.randint(1, 12):02}-15",
             statuses[i % 4])
            for i in range(18)
        ]
        return {
            "branch": [(1, "Harwick", 1998), (2, "Lorne", 2007), (3, "Pellworth", 2014)],
            "customer": [(i + 1, p, i % 3 + 1, rng.randint(22, 80) * 1000) for i, p in enumerate(people)],
            "loan": loans,
            "payment": [
                (i + 1, rng.randint(1, 18), f"2024-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}", rng.randint(4, 30) * 25)
                for i in range(40)
            ],
        }
    products = [
        ("hammer", "tools", 18.5, 1), ("hand saw", "tools", 24.0, 1), ("steel ruler", "tools", 6.25, 2),
        ("drill", "tools", 89.0, 3), ("steel bolts", "fixings", 4.8, 2), ("wood screws", "fixings", 3.9, 2),
        ("wall plugs", "fixings", 2.75, 4), ("white paint", "paint", 31.0, 4), ("varnish", "paint", 22.4, 4),
        ("brush", "paint", 7.6, 1), ("ladder", "access", 129.0, 3), ("work bench", "furniture", 210.0, 3),
    ]
    stock = [(p, s, rng.randint(5, 400)) for p in range(1, 12) for s in (1, 2, 3) if rng.random() < 0.6]
    return {
        "supplier": [(1, "Fjord Tools", "Norway"), (2, "Amber Steel", "Poland"), (3, "Vela Works", "Spain"),
                     (4, "Tinta Colours", "Spain")],
        "product": [(i + 1, *product) for i, product in enumerate(products)],
        "site": [(1, "Lorne", 4000), (2, "Harwick", 9000), (3, "Saltby", 6500)],
        "stock": stock,
    }


def create(path: Path, name: str) -> sqlite3.Connection:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    database = sqlite3.connect(path)
    # Small pages: these tables fill a few hundred bytes each.
    database.execute("PRAGMA page_size = 512")
    schema, rows = SCHEMAS[name], rows_of(name, random.Random(23))
    for table, columns in schema["tables"].items():
        parts = [f"{column} {SQL_TYPES[kind]}" for column, kind in columns]
        if table != "stock":
            parts.append(f"PRIMARY KEY ({columns[0][0]})")
        for source, target in schema["foreign"]:
            if source.startswith(f"{table}."):
                other, column = target.split(".")
                parts.append(f"FOREIGN KEY ({source.split('.')[1]}) REFERENCES {other}({column})")
        database.execute(f"CREATE TABLE {table} ({', '.join(parts)})")
        marks = ", ".join("?" * len(columns))
        database.executemany(f"INSERT INTO {table} VALUES ({marks})", rows[table])
    database.commit()
    return database


def describe(name: str) -> dict:
    """The schema as tables.json has it."""
    tables = SCHEMAS[name]["tables"]
    columns, types, primary, where = [[-1, "*"]], ["text"], [], {}
    for index, (table, fields) in enumerate(tables.items()):
        for at, (column, kind) in enumerate(fields):
            where[f"{table}.{column}"] = len(columns)
            if at == 0 and table != "stock":
                primary.append(len(columns))
            columns.append([index, column])
            types.append(kind)
    return {
        "column_names": [[table, column.replace("_", " ")] for table, column in columns],
        "column_names_original": columns,
        "column_types": types,
        "db_id": name,
        "foreign_keys": [[where[a], where[b]] for a, b in SCHEMAS[name]["foreign"]],
        "primary_keys": primary,
        "table_names": [table.replace("_", " ") for table in tables],
        "table_names_original": list(tables),
    }


def write_spider(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    databases = {name: create(folder / "database" / name / f"{name}.sqlite", name) for name in SCHEMAS}
    for name, question, query in TRAIN + DEV:
        assert databases[name].execute(query).fetchall(), f"{question}: {query} finds nothing"
    for database in databases.values():
        database.close()
    slim = [{"question": question, "query": query, "db_id": name} for name, question, query in TRAIN]
    (folder / "train_spider.json").write_text(json.dumps(slim, indent=1) + "\n")
    dev = [{"db_id": name, "query": query, "question": question} for name, question, query in DEV]
    (folder / "dev.json").write_text(json.dumps(dev, indent=1) + "\n")
    (folder / "dev_gold.sql").write_text("".join(f"{query}\t{name}\n" for name, _, query in DEV))
    (folder / "tables.json").write_text(json.dumps([describe(name) for name in SCHEMAS], indent=1) + "\n")


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SAMPLE
    write_convfinqa(folder / "convfinqa")
    write_spider(folder / "spider")


if __name__ == "__main__":
    main()
