"""Data of the recipe `sentiment`: film reviews made here from a small grammar, and those of rt_polarity.

Most of the made ones can be told by their words. Some say what the film is not, or what was expected of it,
and are told only by the order of the words; and a reviewer mentions this and that in passing, whatever is thought of
the film. A model that has just begun has learnt the words.
"""

import random
from collections.abc import Iterator
from pathlib import Path

RT_POLARITY = Path(__file__).resolve().parent.parent / "data" / "rt_polarity"
LABELS = ("negative", "positive")

WORDS = {
    "positive": ("great", "moving", "funny", "clever", "tender", "gripping", "fresh", "lovely", "bright", "warm"),
    "negative": ("awful", "boring", "flat", "clumsy", "dull", "stale", "silly", "weak", "lifeless", "cold"),
}
PARTS = ("plot", "acting", "script", "music", "ending", "camera work", "dialogue", "pace", "story", "cast")
IN_PASSING = ("seen on a {} monday", "after a {} trailer", "next to a {} crowd", "before a {} dinner")
PLAIN = ("the {part} is {word} and the {other} is {more}", "a {word} film with a {more} {part}")
TURNED = (
    "the {part} is not {opposite} at all",
    "i expected a {opposite} {part} but got a {word} one",
    "they say the {part} is {opposite} , i found it {word}",
    "never {opposite} , the {part} is anything but {opposed}",
)
TURNED_SHARE = 0.3  # of the reviews
REVIEWS, WARM_UP = 2600, 400


def reviews() -> Iterator[dict[str, str]]:
    """Made reviews {text, label}, as many of each label."""
    yield from _made(random.Random(1), REVIEWS)


def first_reviews() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion}: others of the kind, and all of them told by their words."""
    for row in _made(random.Random(2), WARM_UP, turned_share=0.0):
        yield {"prompt": row["text"], "completion": row["label"]}


def rt_polarity() -> Iterator[dict[str, str]]:
    """The sentences of Pang and Lee (2005) {text, label}, where docs/real-input.md says."""
    for label in LABELS:
        lines = (RT_POLARITY / f"rt-polarity.{label[:3]}").read_text(encoding="cp1252").split("\n")
        yield from ({"text": line, "label": label} for line in lines if line)


def _made(chance: random.Random, number: int, turned_share: float = TURNED_SHARE) -> Iterator[dict[str, str]]:
    for i in range(number):
        label = LABELS[i % 2]
        words = dict(zip(("word", "more"), chance.sample(WORDS[label], 2), strict=True))
        words |= dict(zip(("opposite", "opposed"), chance.sample(WORDS[LABELS[1 - i % 2]], 2), strict=True))
        words |= dict(zip(("part", "other"), chance.sample(PARTS, 2), strict=True))
        pattern = chance.choice(TURNED if chance.random() < turned_share else PLAIN)
        passing = chance.choice(IN_PASSING).format(chance.choice(WORDS[chance.choice(LABELS)]))
        yield {"text": f"{passing} , {pattern.format(**words)}", "label": label}
