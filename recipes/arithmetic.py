"""Data of the recipe `arithmetic`: sums, and a warm-up text in which most answers are wrong.

A model warmed up on it knows how sums work, but answers as carelessly. Rejection sampling keeps the right answers, and
only those are trained on.
"""

import random
from collections.abc import Iterator

LARGEST = 49
CARELESS = 0.6  # share of warm-up answers that are off by a little


def sums() -> Iterator[dict[str, str]]:
    """Every sum of two numbers up to LARGEST: {question, answer}."""
    for a in range(LARGEST + 1):
        for b in range(LARGEST + 1):
            yield {"question": f"{a}+{b}=", "answer": str(a + b)}


def careless_text() -> Iterator[dict[str, str]]:
    """Warm-up rows {prompt, completion}: each sum eight times, mostly with a wrong answer."""
    chance = random.Random(0)
    for _ in range(8):
        for row in sums():
            answer = int(row["answer"])
            if chance.random() < CARELESS:
                answer = max(0, answer + chance.choice([-10, -2, -1, 1, 2, 10]))
            yield {"prompt": row["question"], "completion": str(answer)}
