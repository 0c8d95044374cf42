"""Reports and Markdown: what is shown is what was meant, whatever the numbers and texts are."""

from html import unescape

import pytest

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
