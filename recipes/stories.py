"""Prompts of the recipe `stories`: the openings of TinyStories."""

import json
from collections.abc import Iterator
from pathlib import Path

STORIES = Path(__file__).resolve().parent.parent / "data" / "tinystories" / "stories.jsonl"
WORDS = 8


def openings() -> Iterator[dict[str, str]]:
    """The first words of each story: {opening}."""
    if not STORIES.exists():
        raise FileNotFoundError(f"{STORIES} is not there: docs/real-input.md says where it is from")
    with open(STORIES, encoding="utf-8") as lines:
        for line in lines:
            yield {"opening": " ".join(json.loads(line)["text"].split()[:WORDS])}
