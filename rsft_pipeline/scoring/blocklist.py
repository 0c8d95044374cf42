"""Blocklist: which listed words and phrases occur in a text.

Whole words only (`ass` is not in `class`), whatever their case, Unicode form, and the white space inside
phrases. Does not belong here: lists of words; recipes bring their own.
"""

import unicodedata
from collections.abc import Iterable
from pathlib import Path

import regex

# Scripts that put no space between words (Thai to Khmer, kana, Chinese characters): a word has no edges there.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
# A vowel sign is part of its word. An accent or a selector of emoji is not: put behind a listed word it hides nothing.
_IN_WORD = r"[\p{L}\p{N}_[\p{M}--\p{Script=Inherited}]]"
_EDGE = regex.compile(rf"[{_IN_WORD}--[{_UNSPACED}]]", regex.V1)


class Blocklist:
    """Words and phrases, compiled once.

    Raises:
        ValueError: when there is none but blank ones.
    """

    def __init__(self, entries: Iterable[str]):
        entries = {_fold(entry) for entry in entries} - {""}
        if not entries:
            raise ValueError("the blocklist has no entry")
        # The longest first, so that a phrase is found rather than a word it begins with.
        ordered = sorted(entries, key=lambda entry: (-len(entry), entry))
        words = [_upto_edge(entry) for entry in ordered if _EDGE.match(entry[0])]
        others = [_upto_edge(entry) for entry in ordered if not _EDGE.match(entry[0])]
        # One look behind for all words, so that the inside of a word is passed over at once.
        behind = [rf"(?<!{_IN_WORD})(?:{'|'.join(words)})"] * bool(words)
        self._pattern = regex.compile("|".join(behind + others), regex.V1)

    def hits(self, text: str) -> list[str]:
        """The entries that occur, folded, in the order of the text and once for each time."""
        return [found[0] for found in self._pattern.finditer(_fold(text))]


def read(path: Path) -> list[str]:
    """The entries of a UTF-8 file, one a line; blank lines are skipped.

    Raises:
        OSError: no such file. ValueError: not UTF-8.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from None
    return [line.strip() for line in text.split("\n") if line.strip()]


def _fold(text: str) -> str:
    """Compatibility form, case-folded, white space as single spaces (case folding can undo the form: twice)."""
    folded = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return regex.sub(r"\s+", " ", folded).strip()


def _upto_edge(entry: str) -> str:
    # An entry that ends (or begins) with something other than a letter or digit has no word's edge there:
    # an emoji is found right behind a word.
    return regex.escape(entry) + (f"(?!{_IN_WORD})" if _EDGE.match(entry[-1]) else "")
