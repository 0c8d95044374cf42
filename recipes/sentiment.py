"""Data of the recipe `sentiment`: film reviews from a small grammar, and those of rt_polarity.

What a review thinks of the film is in one word, from a few common and many rare ones. In passing it mentions something
else, with a word that says nothing about the film. A model that is hardly trained knows the common words: the examples
that it finds hard are those with words that it has yet to learn.
"""

import random
from collections.abc import Iterator
from pathlib import Path

RT_POLARITY = Path(__file__).resolve().parent.parent / "data" / "rt_polarity"
LABELS = ("negative", "positive")

# The commonest first: a word's frequency is proportional to 1 / its place in the list.
WORDS = {
    "negative": [
        "awful",
        "boring",
        "flat",
        "clumsy",
        "dull",
        "stale",
        "silly",
        "weak",
        "lifeless",
        "cold",
        "tired",
        "hollow",
        "shallow",
        "messy",
        "loud",
        "empty",
        "bland",
        "crude",
        "forced",
        "lazy",
        "muddled",
        "thin",
        "sour",
        "grim",
        "pointless",
        "tedious",
        "murky",
        "wooden",
        "creaky",
        "drab",
        "limp",
        "vapid",
        "trite",
        "sloppy",
        "dismal",
        "shoddy",
        "stilted",
        "leaden",
        "turgid",
        "inane",
    ],
    "positive": [
        "great",
        "moving",
        "funny",
        "clever",
        "tender",
        "gripping",
        "fresh",
        "lovely",
        "bright",
        "warm",
        "witty",
        "honest",
        "lively",
        "sharp",
        "rich",
        "elegant",
        "bold",
        "charming",
        "graceful",
        "subtle",
        "vivid",
        "daring",
        "thrilling",
        "radiant",
        "superb",
        "touching",
        "playful",
        "stirring",
        "wise",
        "crisp",
        "sublime",
        "dazzling",
        "poignant",
        "deft",
        "lush",
        "nimble",
        "sincere",
        "soulful",
        "sly",
        "buoyant",
    ],
}
PARTS = ("plot", "acting", "script", "music", "ending", "camera work", "dialogue", "pace", "story", "cast")
PATTERNS = ("the {part} is {word}", "a film with a {word} {part}", "{word} is what i call this {part}")
IN_PASSING = ("seen on a {} monday", "after a {} trailer", "next to a {} crowd", "before a {} dinner")
REVIEWS, WARM_UP = 2600, 150


def reviews() -> Iterator[dict[str, str]]:
    """Reviews from the grammar: {text, label}, equally many of each label."""
    yield from _made(random.Random(1), REVIEWS)


def first_reviews() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion}: some other reviews from the grammar."""
    for row in _made(random.Random(2), WARM_UP):
        yield {"prompt": row["text"], "completion": row["label"]}


def rt_polarity() -> Iterator[dict[str, str]]:
    """The sentences of Pang and Lee (2005): {text, label}. docs/real-input.md says where they are."""
    for label in LABELS:
        lines = (RT_POLARITY / f"rt-polarity.{label[:3]}").read_text(encoding="cp1252").split("\n")
        yield from ({"text": line, "label": label} for line in lines if line)


def _made(chance: random.Random, number: int) -> Iterator[dict[str, str]]:
    for i in range(number):
        label = LABELS[i % 2]
        review = chance.choice(PATTERNS).format(part=chance.choice(PARTS), word=_word(label, chance))
        passing = chance.choice(IN_PASSING).format(_word(chance.choice(LABELS), chance))
        yield {"text": f"{passing} , {review}", "label": label}


def _word(label: str, chance: random.Random) -> str:
    words = WORDS[label]
    return chance.choices(words, [1 / place for place in range(1, len(words) + 1)])[0]
