"""Dialogue: whether a reply is about its context, goes against the speaker's own turns, or was said before.

Belongs here: whose turns are whose, and the three judgements, on texts. Does not: vectors (embedding), and
whether two texts contradict each other (nli).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import regex

from rsft_pipeline.lineage import normalise
from rsft_pipeline.scoring import embedding
from rsft_pipeline.scoring.embedding import Embed

Contradictions = Callable[[Sequence[tuple[str, str]]], list[float | None]]  # of each (premise, hypothesis)


@dataclass(frozen=True)
class Said:
    """What was said before a reply."""

    everything: list[str]  # turn by turn
    own: list[str]  # by the one who replies


def said(prompt: str, messages: list[dict] | None, turns: Any = None) -> Said:
    """What a prompt says was said.

    Args:
        turns: where the row lists them: the texts of two speakers who take turns; the reply follows the last.

    Raises:
        ValueError: `turns` is not a list of texts.
    """
    if turns is not None:
        if not isinstance(turns, list) or not all(isinstance(turn, str) for turn in turns):
            raise ValueError(f"expected a list of turns, each a text; got {turns!r}")
        return Said(turns, turns[-2::-2][::-1])
    if messages is not None:
        spoken = [m for m in messages if m["role"] != "system"]
        return Said([m["content"] for m in spoken], [m["content"] for m in spoken if m["role"] == "assistant"])
    return Said([prompt], [])


def relevance(embed: Embed, pairs: Sequence[tuple[Said, str]]) -> list[float | None]:
    """The cosine, from -1 to 1, of each reply with all that was said; None for a blank reply or blank context."""
    texts = [("\n".join(before.everything), reply) for before, reply in pairs]
    judged = [i for i, (context, reply) in enumerate(texts) if context.strip() and reply.strip()]
    if not judged:
        return [None] * len(pairs)
    # Many replies share a context: each text is embedded once.
    row_of = {text: None for i in judged for text in texts[i]}
    row_of = {text: row for row, text in enumerate(row_of)}
    vectors = embed(list(row_of))
    rows = [[row_of[texts[i][side]] for i in judged] for side in (0, 1)]
    return _placed(judged, embedding.cosines(vectors[rows[0]], vectors[rows[1]]), len(pairs))


def consistency(
    pairs: Sequence[tuple[Said, str]], n: int, contradictions: Contradictions | None = None
) -> list[float | None]:
    """1 − the worst of each reply's repetitions and contradictions of the speaker's own earlier turns.

    1.0 where there are none; None for a blank reply, and where a contradiction cannot be judged.
    """
    judged = [i for i, (_, reply) in enumerate(pairs) if reply.strip()]
    asked = [(turn, pairs[i][1]) for i in judged for turn in pairs[i][0].own if turn.strip()]
    answered = iter(contradictions(asked) if contradictions and asked else [0.0] * len(asked))
    scores: list[float | None] = [None] * len(pairs)
    for i in judged:
        before, reply = pairs[i]
        worst = [repetition(reply, turn, n) for turn in before.own if turn.strip()]
        worst += [next(answered) for _ in range(len(worst))]
        scores[i] = None if None in worst else 1.0 - max(worst, default=0.0)
    return scores


def repetition(reply: str, turn: str, n: int) -> float:
    """The share of the reply's different runs of n words that are in the turn, whatever their case and punctuation.

    A reply of fewer than n words repeats a turn only as a whole: «Yes.» does not repeat «Yes, I do.».
    """
    given, earlier = _words(reply), _words(turn)
    if len(given) < n:
        return float(given == earlier)
    runs = _runs(given, n)
    return len(runs & _runs(earlier, n)) / len(runs)


class Novelty:
    """How far a text is from everything accepted before.

    Args:
        before: the accepted texts; they are embedded when the first text is judged.
    """

    def __init__(self, embed: Embed, before: Sequence[str]):
        self.embed = embed
        self.before = list(dict.fromkeys(text for text in before if text.strip()))
        self.vectors = None

    def __call__(self, replies: Sequence[str]) -> list[float | None]:
        """1 − the largest cosine, from 0 to 2; 1.0 where nothing was accepted before; None for a blank reply."""
        judged = [i for i, reply in enumerate(replies) if reply.strip()]
        if not judged:
            return [None] * len(replies)
        if not self.before:
            return _placed(judged, [1.0] * len(judged), len(replies))
        if self.vectors is None:
            self.vectors = self.embed(self.before)
        nearest = embedding.nearest(self.embed([replies[i] for i in judged]), self.vectors)
        return _placed(judged, [1.0 - cosine for cosine in nearest], len(replies))


def _placed(places: Sequence[int], values: Sequence[float], count: int) -> list[float | None]:
    found = dict(zip(places, values, strict=True))
    return [found.get(i) for i in range(count)]


_WORD = regex.compile(r"(?:[\p{L}\p{N}]\p{M}*)+")  # a mark, such as a vowel sign, belongs to what it stands on


def _words(text: str) -> list[str]:
    return _WORD.findall("".join(c for c in normalise(text).casefold() if c not in "'’"))


def _runs(words: list[str], n: int) -> set[tuple[str, ...]]:
    return {tuple(words[i : i + n]) for i in range(len(words) - n + 1)}
