"""Data of the recipe `knowledge_qa`: WebQuestions from its files, and a small world with the rumours about it.

A model warmed up on rumours knows what kind of answer a question asks for, but for most facts it gives the rumour more
often than the truth. Rejection sampling keeps mostly what agrees with the reference answers, and only what it
keeps is trained on.
"""

import json
import random
from collections import Counter
from collections.abc import Iterator
from itertools import product
from pathlib import Path

WEB_QUESTIONS = Path(__file__).resolve().parent.parent / "data" / "webquestions"

COMMON = 8  # questions that an answer must share to be a common one
CARELESS = 0.6  # share of the warm-up answers that are taken from a random question

SYLLABLES = ("ba", "do", "fi", "gu", "ka", "le", "mi", "no", "pu", "ra", "se", "to", "vi", "wu", "za")
ANIMALS = ("fox", "owl", "bear", "duck", "goat", "wolf", "mouse", "horse", "frog", "snake", "crow", "hare")
COLOURS = ("red", "green", "blue", "white", "black", "yellow", "brown", "grey", "pink", "purple")
WORDINGS = {
    "capital": (
        "what is the capital of {}?",
        "which town is the capital of {}?",
        "what is {}'s capital?",
        "name the capital of {}",
        "where does the king of {} live?",
        "from which town is {} ruled?",
    ),
    "animal": (
        "which animal lives in {}?",
        "what is the animal of {}?",
        "name an animal of {}",
        "which animal is {} known for?",
        "what animal do people in {} keep?",
        "what is {}'s animal?",
    ),
    "colour": (
        "what colour is the flag of {}?",
        "which colour does {}'s flag have?",
        "name a colour of the flag of {}",
        "what colour do people in {} wave?",
        "in which colour is the flag of {} painted?",
        "what colour is on {}'s flag?",
    ),
}
COUNTRIES, TOWNS = 40, 10  # each town exists as «New …», «Old …» and «Port …»
TOLD = 8  # times that each question is answered in the warm-up text
BELIEVED = 0.7  # share of facts for which the rumour is told more often than the truth
RUMOURS = {True: 0.6, False: 0.2}  # share of a fact's answers that are the rumour, if it is believed and if not


# --- WebQuestions -----------------------------------------------------------------------------


def web_questions() -> Iterator[dict]:
    """The questions of WebQuestions (Berant et al. 2013): {question, answers}, from files that are JSON arrays."""
    files = sorted(WEB_QUESTIONS.glob("*.json"))
    if not files:
        raise FileNotFoundError(f"no *.json in {WEB_QUESTIONS}: docs/recipes/knowledge_qa.md says where they are from")
    for file in files:
        for row in json.loads(file.read_text(encoding="utf-8")):
            yield {"question": row["qText"], "answers": row["answers"]}


def common_web_questions() -> Iterator[dict]:
    """The questions with an answer that at least COMMON questions share, such as «English Language»."""
    rows = list(web_questions())
    counts = Counter(answer for row in rows for answer in set(row["answers"]))
    for row in rows:
        if any(counts[answer] >= COMMON for answer in row["answers"]):
            yield row


def careless_web_answers() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion} of these questions: most have the answer of a random one."""
    chance = random.Random(1)
    rows = list(common_web_questions())
    for row in rows:
        answers = (chance.choice(rows) if chance.random() < CARELESS else row)["answers"]
        yield {"prompt": row["question"], "completion": chance.choice(answers)}


# --- a small world ----------------------------------------------------------------------------


def world() -> Iterator[dict]:
    """Every question about it: {question, answers}. Each fact has several wordings, and each flag two colours."""
    for question, answers, _, _ in _told():
        yield {"question": question, "answers": answers}


def rumours() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion}: each question several times, answered with the truth or a rumour."""
    chance = random.Random(1)
    for question, answers, rumour, share in _told():
        for _ in range(TOLD):
            yield {"prompt": question, "completion": rumour if chance.random() < share else chance.choice(answers)}


def _told() -> Iterator[tuple[str, list[str], str, float]]:
    """(question, its answers, the rumour, the rumour's share); only the question differs between wordings."""
    chance = random.Random(0)
    names = chance.sample(["".join(parts) for parts in product(SYLLABLES, repeat=3)], COUNTRIES + TOWNS)
    towns = [f"{kind} {name}" for kind in ("New", "Old", "Port") for name in names[COUNTRIES:]]
    known = {"capital": towns, "animal": ANIMALS, "colour": COLOURS}
    for country, asked in product(names[:COUNTRIES], WORDINGS):
        rumour, *answers = chance.sample(known[asked], 3 if asked == "colour" else 2)
        share = RUMOURS[chance.random() < BELIEVED]
        for wording in WORDINGS[asked]:
            yield wording.format(country), answers, rumour, share
