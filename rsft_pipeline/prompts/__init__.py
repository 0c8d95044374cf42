"""Prompts: from the rows of a source to what the policy is asked, or to quarantine with the reason.

Belongs here: making a prompt of a row, refusing what cannot become one, and `encode`, the one place that turns a
prompt into token ids; in modules of their own, reading sources (sources.py) and filling in templates (templates.py).
Not: which prompts a round uses (sampling), and where prompts and refused rows are kept (store).

Every row read becomes exactly one Prompt or one Refused; none is dropped or repaired, and none is truncated
unless the recipe says so.
"""

import datetime
import decimal
import json
import math
import numbers
import uuid
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any

from rsft_pipeline import lineage
from rsft_pipeline.prompts import sources, templates
from rsft_pipeline.prompts.sources import PromptError, Refused, Row
from rsft_pipeline.recipe.recipe import Recipe

BATCH = 256  # prompts tokenised at once when their lengths are checked


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked, and the row it came from."""

    prompt_id: str  # lineage.prompt_id(text)
    text: str  # as rendered, exactly
    messages: list[dict] | None  # of a chat prompt: {role, content} with the placeholders filled in
    reference: str | None  # the reference answer, if the recipe names its column
    fields: dict[str, Any]  # every column of the row under our names, as JSON values
    question: str  # lineage.question of the columns that the text is made of
    split: str  # "train" or "eval"
    source: str  # file, data set or function, as written in the recipe
    line: int  # counted from 1: the physical line a row starts on, or the row's number if there are no lines


@dataclass(frozen=True)
class Ingest:
    """What was read: rows == len(prompts) + len(refused)."""

    prompts: list[Prompt]
    refused: list[Refused]
    rows: int

    @property
    def digest(self) -> str:
        """Digest of the set of prompts, their fields and splits, independent of their order."""
        content = ([p.prompt_id, p.text, p.reference, p.fields, p.split] for p in self.prompts)
        return lineage.set_digest(map(lineage.digest, content))


def read(recipe: Recipe, tokenizer, context_length: int | None) -> Ingest:
    """All prompts of the recipe's source and then of its inbox, and the refused rows.

    A prompt whose normalised text occurred in an earlier row, of the source or the inbox, is a duplicate. With
    `limit`, reading stops at the row that fills it, and rows after it are not counted. The inbox need not exist; its
    sub-folders and hidden files are ignored.

    Args:
        tokenizer: the policy's; it renders chat prompts and measures all of them.
        context_length: of the policy, or of a teacher if that is shorter, in tokens; prompt and completion share
            it (an encoder-decoder has it for each, and a label takes up none of it). None: unlimited.

    Raises:
        PromptError: a missing file, an unknown format or encoding, an unreadable data set, a source without
            a usable row or without the column of `group_by`, or a context too short for `sampling.max_tokens`.
    """
    section, context, completion = recipe.prompts, context_length or math.inf, recipe.sampling.max_tokens
    if recipe.task == "classification":
        context, completion = min(context, tokenizer.model_max_length), 0
    check_room(recipe, context_length)
    templates.check(section)
    longest = min(section.max_tokens or math.inf, context if recipe.task == "seq2seq" else context - completion)
    sources.check_encoding(section.encoding)

    prompts: list[Prompt] = []
    refused: list[Refused] = []
    seen: dict[str, str] = {}
    for rows in (sources.rows(recipe), sources.inbox(recipe)):
        judged = ((row, _outcome(row, recipe, tokenizer, longest)) for row in rows)
        for outcome in _measured(judged, recipe, tokenizer, longest, context, seen):
            if isinstance(outcome, Refused):
                refused.append(outcome)
            else:
                prompts.append(outcome)
            if len(prompts) == section.limit:
                break
        if not prompts:
            raise PromptError(_nothing_usable(section.source, refused))
        if len(prompts) == section.limit:
            break
    if recipe.group_by and not any(recipe.group_by in prompt.fields for prompt in prompts):
        raise PromptError(_no_group(recipe.group_by, prompts[0]))
    return Ingest(prompts, refused, len(prompts) + len(refused))


def check(recipe: Recipe) -> None:
    """Check that some row of the source can be a prompt, as far as can be told without a tokenizer or the hub.

    It reads only up to the first usable row, or with `group_by` to the first that has that column.

    Raises:
        PromptError: the source does not exist, no row is usable, or no usable row has the column of `group_by`.
    """
    sources.check(recipe)
    templates.check(recipe.prompts)
    if sources.kind_of(recipe) == "hub":
        return
    sources.check_encoding(recipe.prompts.encoding)
    refused: list[Refused] = []
    seen: set[str] = set()
    for rows in (sources.rows(recipe), sources.inbox(recipe)):
        for row in rows:
            outcome = _outcome(row, recipe, None, math.inf)
            if isinstance(outcome, Refused):
                refused.append(outcome)
                continue
            if recipe.group_by in (None, *outcome.fields):
                return
            seen.add(lineage.same_text(outcome.text))
            without = outcome
            if len(seen) == recipe.prompts.limit:
                raise PromptError(_no_group(recipe.group_by, without))
        if not seen:
            raise PromptError(_nothing_usable(recipe.prompts.source, refused))
    raise PromptError(_no_group(recipe.group_by, without))


def check_room(recipe: Recipe, context_length: int | None) -> None:
    """Check that a completion leaves room for a prompt. Raises PromptError.

    Args:
        context_length: as for `read`.
    """
    completion = 0 if recipe.task == "classification" else recipe.sampling.max_tokens
    if context_length is not None and context_length <= completion:
        raise PromptError(
            f"sampling.max_tokens is {completion}, but the model's context is {context_length} tokens: nothing is left "
            "for a prompt"
        )


def held_out(recipe: Recipe, texts: Iterable[str], tokenizer=None) -> set[str]:
    """Those of the texts that ask the question of a held-out prompt.

    A text may be a prompt as the policy reads it, the message of a chat prompt that has all of its columns or, if a
    prompt has a single column, just that. If a text can be split into columns in several ways, one held-out way is
    enough.

    Args:
        tokenizer: the policy's; None if it has no chat template.
    """
    fraction = recipe.prompts.eval_fraction
    columns = list(
        dict.fromkeys(name for part in templates.parts(recipe.prompts) for name in templates.placeholders(part))
    )
    whole = templates.whole(recipe.prompts, columns, tokenizer)

    def readings(text: str) -> Iterator[list[str]]:
        if len(columns) == 1:  # the column alone
            yield [text]
        for template in whole:
            yield from ([values[name] for name in columns] for values in templates.readings(template, text))

    return {
        text
        for text in texts
        if any(lineage.in_eval_split(lineage.question(values), fraction) for values in readings(text))
    }


def encode(tokenizer, prompt_text: str, chat: bool, task: str = "causal") -> list[int]:
    """The token ids of a prompt as the policy reads it, for both sampling and training.

    Text from a chat template already contains its special tokens, so none are added (there would be a second BOS).
    Plain text gets those that the tokenizer adds, except that for a causal model, which has to continue the prompt,
    an appended EOS is removed again.

    Args:
        chat: whether the recipe has `messages:`. Without a chat template these are rendered as plain text.
        task: the recipe's task.
    """
    return _encode(tokenizer, [prompt_text], chat, task)[0]


def _encode(tokenizer, texts: list[str], chat: bool, task: str) -> list[list[int]]:
    special = not (chat and tokenizer.chat_template)
    # verbose=False: no warning of the tokenizer about long texts; what is too long is decided here
    encoded = tokenizer(texts, add_special_tokens=special, return_attention_mask=False, verbose=False)["input_ids"]
    eos = tokenizer.eos_token_id
    if special and eos is not None and task == "causal":
        encoded = [
            ids[:-1] if ids and ids[-1] == eos and not text.endswith(tokenizer.eos_token) else ids
            for ids, text in zip(encoded, texts, strict=True)
        ]
    return encoded


# --- one row ----------------------------------------------------------------------------------


class _Missing(Exception):
    """A column that a row lacks, or that is null in it."""


def _outcome(row: Row | Refused, recipe: Recipe, tokenizer, longest: float) -> Prompt | Refused:
    """The row as a prompt, not yet checked for length and duplicates, or as Refused with the reason."""
    if isinstance(row, Refused):
        return row
    section = recipe.prompts
    try:
        fields = _renamed(_storable(row.fields), section.columns)
        reference = None if section.reference is None else _text(_column(fields, section.reference))
        parts = templates.parts(section)
        values = {name: _text(_column(fields, name)) for part in parts for name in templates.placeholders(part)}
    except _Missing as missing:
        return row.refused("missing column", str(missing))
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        return row.refused("not storable", str(error))
    if reference is not None and recipe.task == "classification" and reference not in recipe.model.labels:
        return row.refused("no label", f"the reference is {reference!r:.100}; labels are {recipe.model.labels}")

    filled = [templates.fill(part, values) for part in parts]
    if values and not any(lineage.normalise(value) for value in values.values()):
        return row.refused("empty", f"nothing but white space in {', '.join(values)}")
    if not any(lineage.normalise(part) for part in filled):
        return row.refused("empty", "nothing but white space in the prompt")

    messages = None
    text = filled[0]
    if section.messages is not None:
        messages = [{"role": m.role, "content": part} for m, part in zip(section.messages, filled, strict=True)]
        text = templates.render(tokenizer, messages)
    elif section.too_long == "cut" and longest < math.inf:
        text = _cut(tokenizer, text, longest)
        if not lineage.normalise(text):
            return row.refused("too long", f"nothing but white space is left where it is cut, {longest:g} tokens fit")
    question = lineage.question(values.values())
    split = "eval" if lineage.in_eval_split(question, section.eval_fraction) else "train"
    return Prompt(lineage.prompt_id(text), text, messages, reference, fields, question, split, row.source, row.line)


def _cut(tokenizer, text: str, longest: float) -> str:
    """The beginning of the text that gives at most `longest` tokens, including those that the tokenizer adds."""
    while text and (excess := len(tokenizer(text)["input_ids"]) - longest) > 0:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        text = text[: offsets[-int(excess)][0]] if excess < len(offsets) else ""
    return text


def _measured(
    judged: Iterator[tuple[Row | Refused, Prompt | Refused]],
    recipe: Recipe,
    tokenizer,
    longest: float,
    context: float,
    seen: dict[str, str],
) -> Iterator[Prompt | Refused]:
    """The same outcomes in the same order, with prompts refused that are too long, empty or duplicates.

    A reference that is to be rated must fit too. `seen` maps `lineage.same_text` of each accepted prompt to its place.
    """
    while batch := list(islice(judged, BATCH)):
        lengths = _lengths([outcome for _, outcome in batch if isinstance(outcome, Prompt)], recipe, tokenizer)
        for row, outcome in batch:
            if isinstance(outcome, Refused):
                yield outcome
                continue
            length, answer = next(lengths)
            room = context if recipe.task == "seq2seq" else context - length
            if length > longest:
                yield row.refused("too long", f"{length} tokens, {longest} fit")
            elif length == 0:
                yield row.refused("empty", "the tokenizer makes no token of it")
            elif answer > room:
                yield row.refused("too long", f"the reference is {answer} tokens with its end, {room} fit")
            elif (same := lineage.same_text(outcome.text)) in seen:
                yield row.refused("duplicate", f"the same text as {seen[same]}")
            else:
                seen[same] = f"line {row.line} of {row.source}"
                yield outcome


def _lengths(prompts: list[Prompt], recipe: Recipe, tokenizer) -> Iterator[tuple[int, int]]:
    """Tokens of each prompt, and of its reference with the end token if references are rated, else 0."""
    if not prompts:
        return iter(())
    ids = _encode(tokenizer, [prompt.text for prompt in prompts], recipe.prompts.messages is not None, recipe.task)
    answers = [0] * len(prompts)
    if recipe.sampling.source == "reference" and recipe.task != "classification":
        references = [prompt.reference for prompt in prompts]
        own = recipe.task == "seq2seq"  # its tokenizer adds what surrounds a text that such a model writes
        answers = [len(each) + (not own) for each in tokenizer(references, add_special_tokens=own)["input_ids"]]
    return zip(map(len, ids), answers, strict=True)


def _storable(value: Any) -> Any:
    """The value as JSON can store it: NaN and infinity become null, dates and decimals become text.

    Raises:
        TypeError: a type that JSON has no equivalent of.
        ValueError: an integer of thousands of digits, or two keys that are the same text.
        OverflowError: a fraction too large for a float.
        UnicodeEncodeError: text with half a surrogate pair, which no UTF-8 file can hold.
    """
    match value:
        case None | bool():
            return value
        case str():
            value.encode("utf-8")
            return value
        case numbers.Integral():
            str(int(value))  # raises ValueError for too many digits
            return int(value)
        case numbers.Real():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            stored = {_storable(str(key)): _storable(part) for key, part in value.items()}
            if len(stored) < len(value):
                raise ValueError(f"two of its keys are the same text: {', '.join(map(repr, value))}")
            return stored
        case list() | tuple():
            return [_storable(part) for part in value]
        case datetime.date() | datetime.time() | datetime.timedelta() | decimal.Decimal() | uuid.UUID():
            return str(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be kept as JSON")


def _renamed(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our names: renamed columns first, then the others under their own names."""
    renamed = {ours: _column(fields, theirs) for ours, theirs in columns.items()}
    taken = {*columns, *columns.values()}
    return renamed | {name: value for name, value in fields.items() if name not in taken}


def _column(fields: Mapping[str, Any], name: str) -> Any:
    if name not in fields:
        raise _Missing(f"no column {name!r}; there is {', '.join(map(repr, fields)) or 'none'}")
    if fields[name] is None:
        raise _Missing(f"column {name!r} is null")
    return fields[name]


def _text(value: Any) -> str:
    """Text unchanged; anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _nothing_usable(source: str, refused: list[Refused]) -> str:
    if not refused:
        return f"prompts.source: {source} has no rows"
    counts = ", ".join(f"{reason}: {count}" for reason, count in Counter(r.reason for r in refused).most_common())
    first = refused[0]
    return (
        f"prompts.source: none of the {len(refused)} rows of {source} is usable ({counts}). "
        f"The first, line {first.line}: {first.detail}"
    )


def _no_group(column: str, prompt: Prompt) -> str:
    return f"group_by: no prompt has a column {column!r}; there is {', '.join(map(repr, prompt.fields)) or 'none'}"
