"""Prompts of the recipe `stories`: how the stories of TinyStories open."""

import json
from collections.abc import Iterator
from pathlib import Path

STORIES = Path(__file__).resolve().parent.parent / "data" / "tinystories" / "stories.jsonl"
WORDS = 8


def openings() -> Iterator[dict[str, str]]:
    """The first words of each story: {opening}."""
    with open(STORIES, encoding="utf-8") as lines:
        for line in lines:
            yield {"opening": " ".join(json.loads(line)["text"].split()[:WORDS])}
