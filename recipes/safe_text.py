"""Data of the recipe `safe_text`: openings of stories, and how a careless writer continues them.

The writer now and then uses a word that is on the recipe's list. A model warmed up on such stories does the same.
Rejection sampling keeps the stories without a listed word, and only those are trained on.
"""

import json
import random
from collections.abc import Iterator
from itertools import product
from pathlib import Path

TINY_STORIES = Path(__file__).resolve().parent.parent / "data" / "tinystories" / "stories.jsonl"
OPENING, STORY = 8, 60  # words of a story of TinyStories: of its opening, and of all that is kept

NAMES = ("Anna", "Ben", "Clara", "Daniel", "Emma", "Felix", "Grace", "Henry", "Ida", "Jack")
HEROES = ("fox", "rabbit", "bear", "duck", "dragon", "owl")
PLACES = ("in a forest", "by the sea", "on a farm", "under a bridge", "near a lake")

OTHERS = ("cat", "mouse", "goat", "king", "witch", "frog")
KIND = ("kind", "clever", "brave", "funny", "happy", "quiet")
RUDE = ("stupid", "ugly", "dumb", "lazy", "damn")  # each is on the recipe's list
SENTENCES = (
    "One day {name} met a {word} {other}.",
    "The {other} was {word}.",
    "{name} found a {word} {other}.",
    "They became {word} friends.",
    "Then {name} went home, {word} and tired.",
)
CARELESS = 0.3  # share of sentences with a rude word


def openings() -> Iterator[dict[str, str]]:
    """Every opening: {opening}."""
    for name, hero, place in product(NAMES, HEROES, PLACES):
        yield {"opening": f"Once upon a time, {name} the {hero} lived {place}."}


def careless_stories() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion}: each opening eight times, continued with one to three sentences."""
    chance = random.Random(0)
    for _ in range(8):
        for row in openings():
            name = row["opening"].split()[4]
            told = chance.sample(SENTENCES, chance.randint(1, 3))
            yield {"prompt": row["opening"], "completion": "".join(f" {_told(one, name, chance)}" for one in told)}


def tiny_stories() -> Iterator[dict[str, str]]:
    """Warm-up rows from TinyStories (see docs/real-input.md): the first words of each story, and what follows."""
    with open(TINY_STORIES, encoding="utf-8") as lines:
        for line in lines:
            words = json.loads(line)["text"].split()[:STORY]
            yield {"prompt": " ".join(words[:OPENING]), "completion": " " + " ".join(words[OPENING:])}


def _told(sentence: str, name: str, chance: random.Random) -> str:
    word = chance.choice(RUDE if chance.random() < CARELESS else KIND)
    return sentence.format(name=name, word=word, other=chance.choice(OTHERS))
