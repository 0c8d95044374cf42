"""Show: how values look on a page.

Belongs here: texts, numbers, times and ids as people read them, and filling in templates. What a model wrote is
data: every template escapes what it is given, and characters that would act on a page instead of standing on it are
made visible here. Not: which values a page shows (pages.py).
"""

import json
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import jinja2

from resources import pages
from rsft_pipeline.audit.words import rule
from rsft_pipeline.report import NAMES

FOLDED = 280  # characters above which a text is folded
CUT = 4_000  # characters of it that a page shows; a link leads to the rest

# Control characters other than tab and line feed, those that change the direction of text, and invisible ones.
_ACTING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2028\u2029\u2066-\u2069\ufeff"
    "\u00ad\u180e\u200b\u2060-\u2064\ufff9-\ufffb\U000e0000-\U000e007f]"
)


def visible(text: str | None) -> str:
    """The text with such characters replaced by signs for them: ␀, or ⟨U+202E⟩."""
    return _ACTING.sub(_sign, text or "")


def _sign(match: re.Match) -> str:
    code = ord(match[0])
    return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"⟨U+{code:04X}⟩"


def number(value: float | None, digits: int = 4) -> str:
    """1,234 or 0.7123; a dash for None."""
    if value is None:
        return "–"
    return f"{value:,}" if isinstance(value, int) else f"{value:.{digits}g}"


def percent(part: float | None, whole: float | None) -> str:
    """The share as 9.6 %; a share between 0 and 1 is never shown as 0 % or 100 %."""
    if part is None or not whole:
        return "–"
    share = part / whole
    if 0 < share < 0.001:
        return "< 0.1 %"
    return "> 99.9 %" if 0.999 < share < 1 else f"{100 * share:.3g} %"


def moment(value: datetime | None) -> str:
    return value.astimezone(UTC).strftime("%-d %b %Y, %H:%M UTC") if value else "–"


def short(identity: str | None) -> str:
    """The beginning of an id, usually enough to tell it from others; a dash for none."""
    return identity[:8] if identity else "–"


def raw(value: bytes) -> str:
    """Bytes as text; what is not UTF-8 as escapes."""
    return visible(value.decode("utf-8", "backslashreplace"))


def _environment() -> jinja2.Environment:
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {f.__name__: f for f in (visible, number, percent, moment, short, raw)}
    made.filters |= {"fromjson": json.loads, "rule": rule}
    made.globals |= {"to": pages, "NAMES": NAMES, "FOLDED": FOLDED, "CUT": CUT}
    return made


_templates = _environment()


def render(template: str, **values: Any) -> str:
    """A template from templates/, filled in: HTML."""
    return _templates.get_template(template).render(**values)
