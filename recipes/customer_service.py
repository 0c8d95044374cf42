"""Data of the recipe `customer_service`: Banking77 from its files, and questions to a small bank made here.

A careless agent answers half of the questions with the reply to another one. Also here: the recipe's scorer.
"""

import csv
import random
import re
from collections.abc import Iterator, Sequence
from itertools import product
from pathlib import Path

BANKING77 = Path(__file__).resolve().parent.parent / "data" / "banking77" / "train.csv"
CARELESS = 0.5  # share of warm-up replies that are to another question

ITEMS = ("card", "transfer", "refund", "loan", "cheque", "account")
PROBLEMS = {  # what customers call it, and what they are told
    "late": (("late", "not here yet", "still on its way"), "it arrives tomorrow."),
    "lost": (("lost", "gone", "nowhere to be found"), "we will send a new one."),
    "wrong": (("wrong", "not what i asked for", "full of mistakes"), "we will put it right."),
    "blocked": (("blocked", "refused", "not working"), "please call us."),
}
QUESTIONS = ("my {item} is {problem}", "hello, why is the {item} {problem}?", "{item} {problem}, what now?")
OPENINGS = ("", "good morning. ", "please help. ", "sorry to ask. ")
TOLD = 4  # times that each question is answered in the warm-up text


# --- the scorer -------------------------------------------------------------------------------


def names_intent(samples: Sequence, column: str) -> list[float | None]:
    """The share of the words of the customer's intent, such as `card_arrival`, that the reply has."""
    return [_share(_words(sample.fields[column]), _words(sample.completion)) for sample in samples]


def _share(wanted: set[str], said: set[str]) -> float | None:
    return len(wanted & said) / len(wanted) if wanted else None


def _words(text: str) -> set[str]:
    return set(re.findall(r"[a-z]+", text.casefold()))


# --- Banking77 --------------------------------------------------------------------------------


def banking77() -> Iterator[dict[str, str]]:
    """The questions of Banking77 (Casanueva et al. 2020): {text, intent, reply}."""
    with open(BANKING77, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            yield {"text": row["text"], "intent": row["category"], "reply": _about(row["category"])}


def careless_banking77() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion}: each question once, half of the replies about another intent."""
    rows = list(banking77())
    return _careless(rows, sorted({row["reply"] for row in rows}), told=1)


def _about(intent: str) -> str:
    return f"About {' '.join(re.findall('[a-z]+', intent.casefold()))}."


# --- a small bank -----------------------------------------------------------------------------


def questions() -> Iterator[dict[str, str]]:
    """Every question: {text, intent, reply}."""
    for item, (problem, (names, answer)) in product(ITEMS, PROBLEMS.items()):
        for opening, question, name in product(OPENINGS, QUESTIONS, names):
            text = opening + question.format(item=item, problem=name)
            yield {"text": text, "intent": f"{item}_{problem}", "reply": f"about your {item}: {answer}"}


def careless_replies() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion}: each question several times, half of the replies to another one."""
    rows = list(questions())
    return _careless(rows, sorted({row["reply"] for row in rows}), told=TOLD)


def _careless(rows: list[dict[str, str]], replies: list[str], told: int) -> Iterator[dict[str, str]]:
    chance = random.Random(0)
    for row in rows * told:
        others = [reply for reply in replies if reply != row["reply"]]
        reply = chance.choice(others) if chance.random() < CARELESS else row["reply"]
        yield {"prompt": row["text"] + "\n", "completion": reply}
