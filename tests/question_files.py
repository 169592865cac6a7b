"""A folder of questions of our own, in the formats of the public files: few, but with all that is odd about those."""

from __future__ import annotations

import bz2
import gzip
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

BOOLQ = [
    ("Tea -- Tea is made of leaves.\nQuestion: is not one. It is drunk hot.", "is tea made of leaves", "yes"),
    ("Ice (water) -- Ice swims, as it is lighter than water.", "does ice sink in water", "no"),
    ("Moon -- The moon has no air; there is no wind.", "is there wind on the moon", "no"),
    ("Bees -- Bees make honey, and wax, too.", "do bees make wax", "yes"),
]
PIQA = [
    ("To open a jar", "turn the lid ", "turn the table", 0),
    ("How do I dry a shirt?", "Put it in the sea", "Hang it in the sun", 1),
    ("lamp", "switch it on", "water it", 0),
]
WINOGRANDE = [
    ("The cup did not fit into the box because _ was too big.", "the cup", "the box", "1"),
    ("Ann thanked Eve because _ had helped.", "Ann", "Eve", "2"),
    ("_ was ill, so the nurse came to the boy.", "The nurse", "The boy", "2"),
]
ARC = [
    ("q1", "Which of these is a metal?", ["iron", "wood", "wool", "clay"], 0),
    ("q2", "What do plants need?", ["light", "sound", "money"], 0),
    ("q3", "Which is the largest?", ["ant", "dog", "cat", "whale", "mouse"], 3),
    ("q4", "Question: what is asked?\nAnswer: this", ["one", "two", "three", "four"], 2),
]
OPENBOOKQA = [
    ("A magnet pulls on", ["iron", "wood", "glass", "salt"], 0),
    ("When it is cold, water", ["boils", "burns", "freezes", "sings"], 2),
]
HELLASWAG = [
    {
        "ind": 7,
        "activity_label": "Making tea",
        "ctx_a": "A woman boils water. She puts leaves in a cup.",
        "ctx_b": "the woman in Red",
        "endings": ["drinks it.", "flies away.", "eats the cup.", "sings to it."],
        "label": 0,
        "source_id": "activitynet~v_1",
    },
    {
        "ind": 9,
        "activity_label": "Home and Garden",
        "ctx_a": "[header] How to clean a pot [title] Wash it. [step] Use warm water.",
        "ctx_b": "",
        "endings": ["[substeps] Rub it [title] Dry it.", "Eat the pot.", "Sell  it.", "[title] Break it. [step] Now."],
        "label": 3,
        "source_id": "wikihow~1",
    },
]
HELLASWAG_FULL = [
    "Making tea: A woman boils water. She puts leaves in a cup. the woman in red",
    "0",
    "drinks it.",
    "flies away.",
    "eats the cup.",
    "sings to it.",
    "Home and Garden: How to clean a pot. Wash it. Use warm water. then",
    "3",
    "Rub it. Dry it.",
    "Eat the pot.",
    "Sell it.",
    "Break it. Now.",
]


def write_questions(folder: Path) -> Path:
    """Write all files into `folder/eval`; returns `folder`."""
    home = folder / "eval"
    (home / "piqa_original").mkdir(parents=True)
    _requests(home / "boolq_rc_0shot_requests.jsonl.gz", map(_boolq, BOOLQ))
    _lines(home / "piqa_original" / "valid.jsonl", ({"goal": g, "sol1": a, "sol2": b} for g, a, b, _ in PIQA))
    (home / "piqa_original" / "valid-labels.lst").write_text("".join(f"{label}\n" for *_, label in PIQA))
    names = ("sentence", "option1", "option2", "answer")
    docs = (dict(zip(names, row, strict=True)) for row in WINOGRANDE)
    _requests(home / "winogrande_rc_0shot_requests.jsonl.gz", ((doc, 2) for doc in docs))
    for name in ("easy", "challenge"):
        _requests(home / f"arc_{name}_test_rc_5shot_requests.jsonl.gz", map(_arc, ARC), again=True)
    _lines(home / "openbook_qa.jsonl", ({"query": q, "choices": c, "gold": gold} for q, c, gold in OPENBOOKQA))
    _lines(
        home / "hellaswag_val_1000_original.jsonl",
        (
            {"ctx": f"{d['ctx_a']} {d['ctx_b']}".strip(), "split": "val", "split_type": "indomain", **d}
            for d in HELLASWAG
        ),
    )
    (home / "hellaswag_val_full.txt.bz2").write_bytes(bz2.compress("\n".join([*HELLASWAG_FULL, ""]).encode()))
    return folder


def _boolq(row: tuple[str, str, str]) -> tuple[dict[str, Any], int]:
    passage, question, answer = row
    query = f"{passage}\nQuestion: {question}?\nAnswer:"
    return {"query": query, "choices": ["yes", "no"], "gold": int(answer == "no")}, 2


def _arc(row: tuple[str, str, list[str], int]) -> tuple[dict[str, Any], int]:
    name, question, choices, gold = row
    return {"id": name, "query": f"Question: {question}\nAnswer:", "choices": choices, "gold": gold}, len(choices)


def _requests(path: Path, docs: Iterable[tuple[dict[str, Any], int]], *, again: bool = False) -> None:
    """A line for every choice; with `again`, a second time with another number and a bare prompt."""
    rows = []
    for number, (doc, choices) in enumerate(docs):
        for shift, context in ((0, "Few shots."), *(((1_000_000, "Answer:"),) if again else ())):
            rows += [
                {"doc": doc, "doc_id": number + shift, "idx": idx, "request": {"context": context}}
                for idx in range(choices)
            ]
    path.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))


def _lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
