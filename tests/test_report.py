"""Reports and Markdown: they come out right whatever the numbers and texts are."""

from html import unescape

import pytest

from rsft_pipeline.card import card
from rsft_pipeline.markdown import table
from rsft_pipeline.report import histogram


def test_a_cell_reads_as_its_text_and_nothing_in_it_is_markdown():
    text = 'it\'s <b>"bold"</b> &amp; `code` | [link](u) * http://a.b #1'
    cell = table([{"text": text}]).splitlines()[-1].removeprefix("| ").removesuffix(" |")
    assert unescape(cell) == text
    assert not set("<>|`[]()*:.") & set(cell)
    assert cell.count("&") == cell.count("&#")  # none is the text's own
    assert cell.startswith("it's ")


@pytest.mark.parametrize("values", [[], [0.3, 0.3], [0.1 + 0.2, 0.3, 0.3], [1e6, 1e6 + 1e-9], [0.0, 1.0]])
def test_scores_that_differ_by_rounding_alone_have_a_histogram(values):
    assert histogram(values, "scores").startswith(b"\x89PNG")


META = dict.fromkeys(("parent", "policy", "accepted_digest", "merkle_root", "recipe_digest"), "0" * 32) | {
    "recipe": "letters",
    "round": "r000",
    "samples": 1,
    "trained_on": "accepted",
    "steps": 1200,
    "trainable_parameters": 10,
    "parameters": 2000,
    "store_snapshot": 7,
}


def test_a_card_has_each_number_in_its_place():
    pass_at_1 = {"value": 0.25, "low": 0.125, "high": 0.5, "n": 16}
    said = card(META, {"pass_at_1": pass_at_1, "pass_at_k": None, "mean_score": None}, "better: by far")
    row = said.split("## Held-out metrics")[1].strip().splitlines()[2]
    assert unescape(row) == "| pass_at_1 | 0.25 | [0.125, 0.5] | 16 |"
    assert "Samples: 1 (accepted). Optimiser steps: 1,200\n(10 of 2,000 parameters trained)" in said
    assert "Verdict: better: by far" in said and "Not evaluated yet." in card(META)
