"""Data of the recipe `chatbot`: dialogues from the hub, from DailyDialog++'s files, and from a small grammar.

Every row is {first, second, third, turns}: a turn of the other speaker, one of the bot, another of the other speaker,
and the three as a list. The bot's next turn is what is drawn. A careless bot changes the subject or repeats its own
turn; a model warmed up on its replies does the same in half of its own.
"""

import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

EVERYDAY = "HuggingFaceTB/everyday-conversations-llama3.1-2k"
DAILY_DIALOG = Path(__file__).resolve().parent.parent / "data" / "dailydialog"
TURNS = 3
LONGEST = 300  # characters of a DailyDialog++ context, so that it fits the 512 tokens of stories260K

# Topics, and what can be said of each.
TOPICS = {
    "fishing": ("river", "silence"),
    "chess": ("openings", "puzzles"),
    "cooking": ("spices", "smell"),
    "gardening": ("roses", "fresh air"),
    "painting": ("colours", "brushes"),
    "football": ("matches", "goals"),
    "cycling": ("hills", "speed"),
    "skiing": ("snow", "mountains"),
    "camping": ("campfire", "tents"),
    "dancing": ("rhythm", "music"),
    "sailing": ("wind", "waves"),
    "reading": ("novels", "poems"),
    "knitting": ("wool", "patterns"),
    "baking": ("bread", "cakes"),
}
PRAISE = ("lovely", "fun", "great", "relaxing", "easy", "wonderful")
FIRST = ("do you like {topic}?", "are you fond of {topic}?", "what about {topic}?")
SECOND = ("yes, {topic} is {praise}.", "i think {topic} is {praise}.")
THIRD = ("tell me more about {topic}.", "what is best about {topic}?", "why {topic}?")
REPLY = ("what i like about {topic} is the {thing}.", "with {topic} it is all about the {thing}.")
DIALOGUES = 700
TOLD = 4  # replies to each dialogue in the warm-up text
OFF_TOPIC, REPEATED = 0.25, 0.25  # shares of careless replies


# --- from elsewhere ---------------------------------------------------------------------------


def everyday() -> Iterator[dict]:
    """The first three turns of everyday conversations: a greeting, the bot's greeting, and the first question."""
    import datasets

    try:
        conversations = datasets.load_dataset(EVERYDAY, split="train_sft")
    except Exception as error:
        raise ValueError(
            f"the data set {EVERYDAY} could not be loaded from the hub: {error}\n"
            "To use dialogues that are on this machine, a JSONL file of {first, second, third}: "
            "--set prompts.source=/path/to/dialogues.jsonl"
        ) from error
    for row in conversations:
        yield from _row([message["content"] for message in row["messages"][:TURNS]])


def daily_dialog() -> Iterator[dict]:
    """The last turns of the short contexts in DailyDialog++'s test set; docs/dialogue-scorers.md says where it is."""
    for dialogue in _daily("test"):
        yield from dialogue["rows"]


def daily_replies() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion}: the good replies to its dev contexts."""
    for dialogue in _daily("dev"):
        for row in dialogue["rows"]:
            yield from ({"prompt": asked(row), "completion": reply} for reply in dialogue["positive_responses"])


def _daily(split: str) -> Iterator[dict]:
    with open(DAILY_DIALOG / f"plusplus_{split}.jsonl", encoding="utf-8") as lines:
        for dialogue in map(json.loads, lines):
            turns = dialogue["context"][-TURNS:]
            yield {**dialogue, "rows": _row(turns) if sum(map(len, turns)) <= LONGEST else ()}


# --- from a grammar ---------------------------------------------------------------------------


def dialogues() -> Iterator[dict]:
    """Dialogues, each about one topic."""
    for row, _, _ in _made():
        yield row


def careless_replies() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion}: each dialogue several times, half of the replies careless."""
    chance = random.Random(1)
    for row, topic, second in _made():
        for _ in range(TOLD):
            luck = chance.random()
            about = chance.choice([t for t in TOPICS if t != topic]) if luck < OFF_TOPIC else topic
            reply = chance.choice(REPLY).format(topic=about, thing=chance.choice(TOPICS[about]))
            yield {"prompt": asked(row), "completion": second if luck > 1 - REPEATED else reply}


def _made() -> Iterator[tuple[dict, str, str]]:
    """(row, its topic, the bot's turn)."""
    every = list(product(TOPICS, PRAISE, FIRST, SECOND, THIRD))
    for topic, praise, *wordings in random.Random(0).sample(every, DIALOGUES):
        said = [wording.format(topic=topic, praise=praise) for wording in wordings]
        for row in _row(said):
            yield row, topic, said[1]


# --- rows -------------------------------------------------------------------------------------


def asked(row: dict) -> str:
    """The row as the template of chatbot_offline.yaml writes it."""
    return "{first}\n{second}\n{third}\n".format(**row)


def _row(turns: list[str]) -> Iterator[dict]:
    """One row; none if there are not exactly three turns."""
    if len(turns) == TURNS:
        yield {**dict(zip(("first", "second", "third"), turns, strict=True)), "turns": turns}
