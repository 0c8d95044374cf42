"""Templates: texts with {column} placeholders, filled in, and matched against texts that they may have made.

Belongs here: the recipe's template or messages as text, including the chat template. Not: which values fill them in
(the package itself), nor token ids.
"""

import re
from collections.abc import Iterator, Mapping, Sequence

from rsft_pipeline.prompts.sources import PromptError
from rsft_pipeline.recipe.prompts import Prompts

# Not str.format, whose {column.attribute} and {column[0]} reach into values.
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def placeholders(template: str) -> list[str]:
    """The names of the columns, in order and with repetitions."""
    return [match[1] for match in _PLACEHOLDER.finditer(template) if match[1] is not None]


def parts(section: Prompts) -> list[str]:
    """The texts with placeholders that a prompt is made of."""
    return [section.template] if section.messages is None else [message.content for message in section.messages]


def check(section: Prompts) -> None:
    """Check that prompts can differ. Raises PromptError if there is no placeholder."""
    if not any(placeholders(part) for part in parts(section)):
        raise PromptError(
            f"prompts.{'template' if section.messages is None else 'messages'}: no {{column}} is in it, so that all "
            "rows would be one prompt"
        )


def whole(section: Prompts, columns: Sequence[str], tokenizer) -> list[str]:
    """The templates that contain all columns: the prompt as the policy reads it, and such messages of a chat."""
    if section.messages is None:
        return [section.template]
    # Marks in place of the columns show where the chat template puts them.
    marks = {name: f"\ue000{i}\ue001" for i, name in enumerate(columns)}
    marked = [{"role": m.role, "content": fill(m.content, marks)} for m in section.messages]
    rendered = render(tokenizer, marked).replace("{", "{{").replace("}", "}}")
    for name, mark in marks.items():
        rendered = rendered.replace(mark, f"{{{name}}}")
    return [rendered, *(content for content in parts(section) if {*columns} <= {*placeholders(content)})]


def readings(template: str, text: str) -> Iterator[dict[str, str]]:
    """Every way to split a text into the columns that the template may have made it of.

    `New York 3` may be `{place} {number}` with `New` and `York 3`, or with `New York` and `3`.
    """
    columns, (first, *behind) = _pieces(template)
    if not columns or not text.startswith(first) or not text.endswith(behind[-1]):
        return
    latest = [len(text) - len(behind[-1])]  # the last position where each column can end so that the rest still fits
    for literal in reversed(behind[:-1]):
        latest.insert(0, text.rfind(literal, 0, latest[0]))
        if latest[0] < 0:
            return
    ends = [re.compile(f"(?={re.escape(literal)})") for literal in behind[:-1]]
    ends += [re.compile(rf"(?={re.escape(behind[-1])}\Z)")]

    def read(i: int, start: int, values: dict[str, str]) -> Iterator[dict[str, str]]:
        """The ways to read the text from `start` on as the i-th column and all after it, given the columns before."""
        if i == len(columns):
            yield values
            return
        for end in map(re.Match.start, ends[i].finditer(text, start)):
            if end > latest[i]:
                return
            value = text[start:end]
            if values.get(columns[i], value) == value:
                yield from read(i + 1, end + len(behind[i]), {**values, columns[i]: value})

    yield from read(0, len(first), {})


def _pieces(template: str) -> tuple[list[str], list[str]]:
    """The columns of a template, and the literal texts before, between and after them: one more than columns."""
    columns, literals, end = [], [""], 0
    for match in _PLACEHOLDER.finditer(template):
        literals[-1] += template[end : match.start()]
        end = match.end()
        if match[1] is None:
            literals[-1] += match[0][0]  # {{ or }}
        else:
            columns.append(match[1])
            literals.append("")
    literals[-1] += template[end:]
    return columns, literals


def fill(template: str, values: Mapping[str, str]) -> str:
    """The template with {column} replaced, {{ and }} as literal braces; values are not searched again."""
    return _PLACEHOLDER.sub(lambda match: match[0][0] if match[1] is None else values[match[1]], template)


# Some chat templates write today's date. With their clock stopped, a row gives the same prompt every day;
# otherwise its id would change at midnight.
_STOPPED_CLOCK = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}\n"


def render(tokenizer, messages: list[dict], finished: bool = False) -> str:
    """The conversation up to where the assistant speaks or, if `finished`, the whole of it.

    Rendered by the tokenizer's chat template; without one, a line `role: content` for each message, then `assistant:`.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return "\n".join([*(f"{m['role']}: {m['content']}" for m in messages), "assistant:"])
    try:
        template = _STOPPED_CLOCK + tokenizer.get_chat_template()
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=not finished
        )
    except Exception as error:
        raise PromptError(f"prompts.messages: the tokenizer's chat template refuses these roles: {error}") from error
