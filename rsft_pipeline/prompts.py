"""Prompts: from the rows of a source to what the policy is asked, or to quarantine with the reason.

Belongs here: reading each kind of source row by row, rendering a row as a prompt, refusing what cannot be
one, and `encode`, the one place that turns a prompt into token ids. Does not: which prompts a round uses
(sampling), and where prompts and refused rows are kept (store).

Every row read becomes exactly one Prompt or one Refused; none is dropped or repaired, and none cut short but
where the recipe says so.
"""

import csv
import datetime
import decimal
import json
import math
import numbers
import os
import re
import sys
import uuid
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from rsft_pipeline import functions, lineage
from rsft_pipeline.recipe.prompts import Prompts
from rsft_pipeline.recipe.recipe import Recipe

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}

BATCH = 256  # prompts tokenised at once, when their lengths are checked


class PromptError(ValueError):
    """A source that cannot be read, or that has no usable row: the message says what was looked for."""


@dataclass(frozen=True)
class Prompt:
    """What the policy is asked, and the row it came from."""

    prompt_id: str  # lineage.prompt_id(text)
    text: str  # as rendered, exactly
    messages: list[dict] | None  # of a chat prompt: {role, content} with the placeholders filled in
    reference: str | None  # the reference answer, where the recipe names its column
    fields: dict[str, Any]  # every column of the row under our names, as JSON has it
    question: str  # lineage.question of the columns that the text is made of
    split: str  # "train" or "eval"
    source: str  # file, data set or function, as written in the recipe
    line: int  # counted from 1: the physical line a row starts on, or its number where there are no lines


@dataclass(frozen=True)
class Refused:
    """A row that cannot be a prompt.

    The reason is one of: `not UTF-8` (or whichever encoding the recipe names), `broken JSON`, `broken CSV`,
    `not storable` (a value that JSON cannot keep, such as bytes or half a surrogate pair), `missing column`
    (or null in it), `no label` (a reference that a classifier cannot give), `empty`, `too long`, `duplicate`, and
    for a whole file of the inbox `unreadable file`.
    """

    source: str
    line: int  # as in Prompt; 0 for a whole file
    raw: bytes  # the line or lines without the last line feed; where there are none, the row as JSON or as Arrow has it
    reason: str
    detail: str


@dataclass(frozen=True)
class Ingest:
    """What was read: rows == len(prompts) + len(refused)."""

    prompts: list[Prompt]
    refused: list[Refused]
    rows: int
    digest: str  # of the set of prompts and their fields, whatever their order


@dataclass(frozen=True)
class _Row:
    source: str
    line: int
    raw: bytes | None  # None: the source has no bytes of its own
    fields: Mapping[str, Any]

    def refused(self, reason: str, detail: str) -> Refused:
        raw = self.raw
        if raw is None:
            raw = json.dumps(dict(self.fields), ensure_ascii=True, default=repr, skipkeys=True).encode()
        return Refused(self.source, self.line, raw, reason, detail)


def read(recipe: Recipe, tokenizer, context_length: int | None) -> Ingest:
    """All prompts of the recipe's source and then of its inbox, and the rows refused.

    A prompt whose id was seen on an earlier row, of the source or the inbox, is a duplicate. With `limit`,
    reading stops at the row that fills it, and rows after it are not counted. The inbox need not exist; its
    sub-folders and hidden files are not looked at.

    Args:
        tokenizer: the policy's; it renders chat prompts and measures all of them.
        context_length: of the policy, or of a teacher where that is shorter, in tokens; prompt and completion share
            it (an encoder-decoder has it for each, and a label takes none of it). None: without end.

    Raises:
        PromptError: a missing file, an unknown format or encoding, an unreadable data set, a source without
            a usable row, or a context too short for `sampling.max_tokens`.
    """
    section, context, completion = recipe.prompts, context_length or math.inf, recipe.sampling.max_tokens
    if recipe.task == "classification":
        context, completion = min(context, tokenizer.model_max_length), 0
    if context - completion < 1:
        raise PromptError(
            f"sampling.max_tokens is {recipe.sampling.max_tokens}, but the model's context is {context_length} "
            "tokens: nothing is left for a prompt"
        )
    longest = min(section.max_tokens or math.inf, context if recipe.task == "seq2seq" else context - completion)
    _check_encoding(section.encoding)

    prompts: list[Prompt] = []
    refused: list[Refused] = []
    seen: dict[str, str] = {}
    for rows in (_source(recipe), _inbox(recipe)):
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
    content = (lineage.digest([p.prompt_id, p.text, p.reference, p.fields, p.split]) for p in prompts)
    return Ingest(prompts, refused, len(prompts) + len(refused), lineage.set_digest(content))


def check(recipe: Recipe) -> None:
    """See that the source is there, before a model is loaded or made for it. A hub is not asked.

    Raises:
        PromptError: a missing file or folder, an unknown format, or a function that cannot be loaded.
    """
    name, path = recipe.prompts.source, recipe.path(recipe.prompts.source)
    match _format(recipe):
        case "function":
            try:
                functions.load(name, recipe.folder)
            except functions.FunctionError as error:
                raise PromptError(f"prompts.source: {error}") from error
        case "hub":
            pass
        case "dataset" if not path.is_dir():
            raise PromptError(f"prompts.source is {name!r}: there is no folder {path}")
        case "dataset":
            pass
        case _ if not path.is_file():
            raise PromptError(f"prompts.source is {name!r}: there is no file {path}")


def check_rows(recipe: Recipe) -> None:
    """See that there is a row that can be a prompt, as far as that can be told without a tokenizer. A hub is not asked.

    Of a good source that is seen at its first rows.

    Raises:
        PromptError: no row is usable, or none of those has the column of `group_by`.
    """
    if _format(recipe) == "hub":
        return
    _check_encoding(recipe.prompts.encoding)
    refused, last = [], None
    for row in chain(_source(recipe), _inbox(recipe)):
        match _outcome(row, recipe, None, math.inf):
            case Refused() as outcome:
                refused.append(outcome)
            case Prompt() as last if recipe.group_by in (None, *last.fields):
                return
    raise PromptError(_no_group(recipe.group_by, last) if last else _nothing_usable(recipe.prompts.source, refused))


def held_out(recipe: Recipe, texts: Iterable[str], tokenizer=None) -> set[str]:
    """Those of the texts that ask what a held-out prompt asks.

    A text is taken for a prompt as the policy reads it, for the message of a chat prompt that has all of its columns,
    or, of a prompt with one column, for that alone. Where it can be split into columns in several ways, one that is
    held out is enough.

    Args:
        tokenizer: the policy's; None where it has no chat template.
    """
    fraction = recipe.prompts.eval_fraction
    columns = list(dict.fromkeys(name for part in _parts(recipe.prompts) for name in _placeholders(part)))
    wordings = _wordings(recipe.prompts, columns, tokenizer)

    def readings(text: str) -> Iterator[list[str]]:
        if len(columns) == 1:  # the column alone
            yield [text]
        for wording in wordings:
            yield from ([values[name] for name in columns] for values in _readings(wording, text))

    return {
        text
        for text in texts
        if any(lineage.in_eval_split(lineage.question(values), fraction) for values in readings(text))
    }


def encode(tokenizer, prompt_text: str, chat: bool, task: str = "causal") -> list[int]:
    """The token ids of a prompt, for sampling and training alike: what the policy reads.

    Text from a chat template already holds its special tokens, so none are added (a second BOS would be).
    Plain text gets those that the tokenizer adds. Of a causal model's, an EOS that it puts behind is taken off
    again, because such a model is to continue the prompt.

    Args:
        chat: whether the recipe has `messages:`. Without a chat template these are rendered as plain text.
        task: the recipe's.
    """
    return _encode(tokenizer, [prompt_text], chat, task)[0]


def _encode(tokenizer, texts: list[str], chat: bool, task: str) -> list[list[int]]:
    special = not (chat and tokenizer.chat_template)
    # verbose: the tokenizer's own remark on long texts; too long is decided here
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


def _outcome(row: _Row | Refused, recipe: Recipe, tokenizer, longest: float) -> Prompt | Refused:
    """The row as a prompt, its length and whether it is there already not yet known, or why it is none."""
    if isinstance(row, Refused):
        return row
    section = recipe.prompts
    try:
        fields = _renamed(_storable(row.fields), section.columns)
        reference = None if section.reference is None else _text(_column(fields, section.reference))
        parts = _parts(section)
        values = {name: _text(_column(fields, name)) for part in parts for name in _placeholders(part)}
    except _Missing as missing:
        return row.refused("missing column", str(missing))
    except (TypeError, ValueError, RecursionError) as error:
        return row.refused("not storable", str(error))
    if reference is not None and recipe.task == "classification" and reference not in recipe.model.labels:
        return row.refused("no label", f"the reference is {reference!r:.100}; labels are {recipe.model.labels}")

    filled = [_fill(part, values) for part in parts]
    if values and not any(lineage.normalise(value) for value in values.values()):
        return row.refused("empty", f"nothing but white space in {', '.join(values)}")
    if not any(lineage.normalise(part) for part in filled):
        return row.refused("empty", "nothing but white space in the prompt")

    messages = None
    text = filled[0]
    if section.messages is not None:
        messages = [{"role": m.role, "content": part} for m, part in zip(section.messages, filled, strict=True)]
        text = render(tokenizer, messages)
    elif section.too_long == "cut" and longest < math.inf:
        text = _cut(tokenizer, text, longest)
    question = lineage.question(values.values())
    split = "eval" if lineage.in_eval_split(question, section.eval_fraction) else "train"
    return Prompt(lineage.prompt_id(text), text, messages, reference, fields, question, split, row.source, row.line)


def _cut(tokenizer, text: str, longest: float) -> str:
    """The beginning of the text that makes at most `longest` tokens, those that the tokenizer adds among them."""
    while text and (excess := len(tokenizer(text)["input_ids"]) - longest) > 0:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
        text = text[: offsets[-int(excess)][0]] if excess < len(offsets) else ""
    return text


def _measured(
    judged: Iterator[tuple[_Row | Refused, Prompt | Refused]],
    recipe: Recipe,
    tokenizer,
    longest: float,
    context: float,
    seen: dict[str, str],
) -> Iterator[Prompt | Refused]:
    """The same outcomes in the same order, less the prompts that do not fit, or whose references do not to be rated.

    And less those that are in `seen`, where the id of each that is left is noted.
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
            elif outcome.prompt_id in seen:
                yield row.refused("duplicate", f"the same text as {seen[outcome.prompt_id]}")
            else:
                seen[outcome.prompt_id] = f"line {row.line} of {row.source}"
                yield outcome


def _lengths(prompts: list[Prompt], recipe: Recipe, tokenizer) -> Iterator[tuple[int, int]]:
    """Tokens of each prompt, and of its reference with the token that ends it, where that is what is rated; else 0."""
    if not prompts:
        return iter(())
    ids = _encode(tokenizer, [prompt.text for prompt in prompts], recipe.prompts.messages is not None, recipe.task)
    answers = [0] * len(prompts)
    if recipe.sampling.source == "reference" and recipe.task != "classification":
        references = [prompt.reference for prompt in prompts]
        answers = [len(each) + 1 for each in tokenizer(references, add_special_tokens=False)["input_ids"]]
    return zip(map(len, ids), answers, strict=True)


def _storable(value: Any) -> Any:
    """The value as JSON keeps it: NaN and infinity become null, dates and decimals become text.

    Raises:
        TypeError: a type that JSON has nothing for.
        UnicodeEncodeError: text with half a surrogate pair, which no UTF-8 file can hold.
    """
    match value:
        case None | bool():
            return value
        case str():
            value.encode("utf-8")
            return value
        case numbers.Integral():
            return int(value)
        case numbers.Real():
            return float(value) if math.isfinite(value) else None
        case Mapping():
            return {_storable(str(key)): _storable(part) for key, part in value.items()}
        case list() | tuple():
            return [_storable(part) for part in value]
        case datetime.date() | datetime.time() | datetime.timedelta() | decimal.Decimal() | uuid.UUID():
            return str(value)
    raise TypeError(f"a value of type {type(value).__name__} cannot be kept as JSON")


def _renamed(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The row under our names: renamed columns first, then the others as they are called."""
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
    """Text as it is; anything else as JSON writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


# Not str.format, whose {column.attribute} and {column[0]} reach into values.
_PLACEHOLDER = re.compile(r"\{\{|\}\}|\{([^{}]*)\}")


def _placeholders(template: str) -> list[str]:
    return [match[1] for match in _PLACEHOLDER.finditer(template) if match[1] is not None]


def _parts(section: Prompts) -> list[str]:
    """The texts with placeholders that a prompt is made of."""
    return [section.template] if section.messages is None else [message.content for message in section.messages]


def _wordings(section: Prompts, columns: Sequence[str], tokenizer) -> list[str]:
    """The templates that give a text all columns of a prompt."""
    if section.messages is None:
        return [section.template]
    # Where a chat template puts the columns is seen by marks in their place.
    marks = {name: f"\ue000{i}\ue001" for i, name in enumerate(columns)}
    marked = [{"role": m.role, "content": _fill(m.content, marks)} for m in section.messages]
    rendered = render(tokenizer, marked).replace("{", "{{").replace("}", "}}")
    for name, mark in marks.items():
        rendered = rendered.replace(mark, f"{{{name}}}")
    return [rendered, *(content for content in _parts(section) if {*columns} <= {*_placeholders(content)})]


def _readings(template: str, text: str) -> Iterator[dict[str, str]]:
    """Every way to split a text into the columns that the template may have made it of.

    `New York 3` may be `{place} {number}` of `New` and `York 3`, and of `New York` and `3`.
    """
    literals, columns, end = [""], [], 0  # what stands before, between and behind the columns
    for match in _PLACEHOLDER.finditer(template):
        literals[-1] += template[end : match.start()]
        end = match.end()
        if match[1] is None:
            literals[-1] += match[0][0]
        else:
            columns.append(match[1])
            literals.append("")
    literals[-1] += template[end:]
    if not columns or not text.startswith(literals[0]) or not text.endswith(literals[-1]):
        return
    latest = [len(text) - len(literals[-1])]  # where each column has to end, for what stands behind it to follow
    for literal in reversed(literals[1:-1]):
        latest.insert(0, text.rfind(literal, 0, latest[0]))
        if latest[0] < 0:
            return
    behind = [re.compile(f"(?={re.escape(literal)})") for literal in literals[1:-1]]
    behind += [re.compile(rf"(?={re.escape(literals[-1])}\Z)")]

    def read(i: int, start: int, values: dict[str, str]) -> Iterator[dict[str, str]]:
        if i == len(columns):
            yield values
            return
        for found in behind[i].finditer(text, start):
            if found.start() > latest[i]:
                return
            value = text[start : found.start()]
            if values.get(columns[i], value) == value:
                yield from read(i + 1, found.start() + len(literals[i + 1]), {**values, columns[i]: value})

    yield from read(0, len(literals[0]), {})


def _fill(template: str, values: Mapping[str, str]) -> str:
    """The template with {column} replaced, {{ and }} as literal braces; values are not searched again."""
    return _PLACEHOLDER.sub(lambda match: match[0][0] if match[1] is None else values[match[1]], template)


# Some chat templates write today's date. With their clock stopped, a row is the same prompt on every day:
# otherwise its id would change at midnight, and a held-out prompt could move to the training split.
_STOPPED_CLOCK = "{% macro strftime_now(format) %}01 Jan 2025{% endmacro %}\n"


def render(tokenizer, messages: list[dict], finished: bool = False) -> str:
    """The conversation up to where the assistant speaks; the whole of it where it is finished.

    By the tokenizer's chat template; without one, a line `role: content` for each message and then `assistant:`.
    """
    if tokenizer is None or not tokenizer.chat_template:
        return "\n".join([*(f"{m['role']}: {m['content']}" for m in messages), "assistant:"])
    template = _STOPPED_CLOCK + tokenizer.get_chat_template()
    try:
        return tokenizer.apply_chat_template(
            messages, chat_template=template, tokenize=False, add_generation_prompt=not finished
        )
    except Exception as error:
        raise PromptError(f"prompts.messages: the tokenizer's chat template refuses these roles: {error}") from error


# --- sources ----------------------------------------------------------------------------------


def _source(recipe: Recipe) -> Iterator[_Row | Refused]:
    section = recipe.prompts
    name, path = section.source, recipe.path(section.source)
    match kind := _format(recipe):
        case "function":
            return _from_function(name, recipe.folder)
        case "hub":
            return _from_hub(recipe)
        case "dataset":
            return _from_folder(path, name, section.hub_split)
        case _:
            return _from_file(path, name, kind, section.encoding)


def _format(recipe: Recipe) -> str:
    """The recipe's format, or what `auto` makes of the source's name."""
    if recipe.prompts.format != "auto":
        return recipe.prompts.format
    name, path = recipe.prompts.source, recipe.path(recipe.prompts.source)
    if functions.REFERENCE.fullmatch(name):
        return "function"
    if path.is_dir():
        return "dataset"
    if path.suffix.lower() in SUFFIXES:
        return SUFFIXES[path.suffix.lower()]
    if path.exists():
        raise PromptError(
            f"prompts.source: the format of {path} cannot be told from its name "
            f"(known: {', '.join(SUFFIXES)}): set prompts.format"
        )
    return "hub"


def inbox_files(recipe: Recipe) -> list[Path]:
    """The files of the inbox, by name; hidden ones and sub-folders are not looked at."""
    if recipe.prompts.inbox is None or not (folder := recipe.path(recipe.prompts.inbox)).is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def _inbox(recipe: Recipe) -> Iterator[_Row | Refused]:
    """The rows of every file in the inbox. A file that cannot be read stops no round: it is refused."""
    for path in inbox_files(recipe):
        printable = os.fsencode(path.name).decode("utf-8", "backslashreplace")
        name = f"{recipe.prompts.inbox.rstrip('/')}/{printable}"
        kind = SUFFIXES.get(path.suffix.lower())
        if kind is None:
            yield Refused(name, 0, b"", "unreadable file", f"its name ends in none of {', '.join(SUFFIXES)}")
            continue
        try:
            yield from _from_file(path, name, kind, recipe.prompts.encoding)
        except PromptError as error:
            yield Refused(name, 0, b"", "unreadable file", str(error))


def _from_file(path: Path, name: str, kind: str, encoding: str) -> Iterator[_Row | Refused]:
    reader = {"jsonl": _jsonl, "csv": _csv, "text": _text_lines, "parquet": _parquet}[kind]
    try:
        yield from reader(path, name, encoding)
    except OSError as error:
        raise PromptError(f"prompts: {path} cannot be read: {error.strerror or error}") from None


def _lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Physical lines, split at line feeds only (str.splitlines also splits inside text, as at U+0085)."""
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            yield number, raw.removesuffix(b"\n")


def _decode(number: int, raw: bytes, encoding: str, errors: str = "strict") -> str:
    text = raw.decode(encoding, errors)
    return text.removeprefix("\ufeff") if number == 1 else text  # a byte order mark is not text


def _undecodable(name: str, number: int, raw: bytes, encoding: str, error: UnicodeDecodeError) -> Refused:
    detail = f"byte 0x{error.object[error.start]:02x} at position {error.start}"
    return Refused(name, number, raw, f"not {encoding.upper()}", detail)


def _check_encoding(encoding: str) -> None:
    try:
        by_lines = b"\n".decode(encoding) == "\n"
    except LookupError:
        raise PromptError(f"prompts.encoding: {encoding!r} is not a text encoding that Python knows") from None
    except UnicodeError:
        by_lines = False
    if not by_lines:
        raise PromptError(f"prompts.encoding: {encoding!r} cannot be read line by line; convert the file to UTF-8")


def _jsonl(path: Path, name: str, encoding: str) -> Iterator[_Row | Refused]:
    for number, raw in _lines(path):
        if not raw.strip():
            yield Refused(name, number, raw, "empty", "a blank line")
            continue
        try:
            fields = json.loads(_decode(number, raw, encoding))
        except UnicodeDecodeError as error:
            yield _undecodable(name, number, raw, encoding, error)
        except (ValueError, RecursionError) as error:
            yield Refused(name, number, raw, "broken JSON", str(error))
        else:
            if isinstance(fields, dict):
                yield _Row(name, number, raw, fields)
            else:
                yield Refused(name, number, raw, "broken JSON", f"a {type(fields).__name__}, not an object")


def _text_lines(path: Path, name: str, encoding: str) -> Iterator[_Row | Refused]:
    for number, raw in _lines(path):
        try:
            yield _Row(name, number, raw, {"text": _decode(number, raw, encoding).removesuffix("\r")})
        except UnicodeDecodeError as error:
            yield _undecodable(name, number, raw, encoding, error)


def _csv(path: Path, name: str, encoding: str) -> Iterator[_Row | Refused]:
    """CSV with a header. A record may span lines inside quotes; one that is broken costs its first line only."""
    csv.field_size_limit(sys.maxsize)  # by itself it is 128 KiB, past which a cell's lines would be rows
    lines = _lines(path)
    given_back: deque[tuple[int, bytes]] = deque()
    header: list[str] | None = None

    def take(record: list[tuple[int, bytes]]) -> Iterator[str]:
        """Lines for csv.reader, which takes as many as a record needs; noted in `record`."""
        while line := given_back.popleft() if given_back else next(lines, None):
            record.append(line)
            yield _decode(*line, encoding, errors="surrogateescape") + "\n"

    while True:
        record: list[tuple[int, bytes]] = []
        values, problem = [], ""
        try:
            values = next(csv.reader(take(record), strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is never closed takes the following lines with it: they get another chance.
            given_back.extendleft(reversed(record[1:]))
            del record[1:]
            problem = str(error)
        number, raw = record[0][0], b"\n".join(raw for _, raw in record)
        try:
            for line in record:
                _decode(*line, encoding)
        except UnicodeDecodeError as error:
            if header is None:
                raise PromptError(f"prompts: the header of {path} is not {encoding.upper()}") from None
            yield _undecodable(name, number, raw, encoding, error)
            continue
        if header is None:
            if problem or len(set(values)) < max(len(values), 1):
                raise PromptError(f"prompts: {path} begins with no header of distinct names: {problem or values}")
            header = values
        elif problem or (values and len(values) != len(header)):
            problem = problem or f"{len(values)} fields, the header has {len(header)}"
            yield Refused(name, number, raw, "broken CSV", problem)
        elif not values:
            yield Refused(name, number, raw, "empty", "a blank line")
        else:
            yield _Row(name, number, raw, dict(zip(header, values, strict=True)))


def _parquet(path: Path, name: str, encoding: str) -> Iterator[_Row | Refused]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            names = file.schema_arrow.names
            if len(set(names)) < len(names):
                raise PromptError(f"prompts: {path} has columns of one name: {names}")
            for batch in file.iter_batches():
                for fields, written in _converted(batch):
                    number += 1
                    if isinstance(fields, Exception):
                        yield Refused(name, number, written, "not storable", str(fields))
                    else:
                        yield _Row(name, number, None, fields)
    except pyarrow.ArrowException as error:
        raise PromptError(f"prompts: {path} is not readable as Parquet, after row {number}: {error}") from None


def _converted(batch) -> Iterator[tuple[dict[str, Any] | Exception, bytes]]:
    """Each row of an Arrow batch as Python has it, or why it cannot, with what Arrow writes of it."""
    try:
        rows = batch.to_pylist()
    except Exception:  # a date out of range, bytes that are not UTF-8, a time zone that nobody knows: in which row?
        rows = [batch.slice(i, 1) for i in range(batch.num_rows)]
    for row in rows:
        if isinstance(row, dict):
            yield row, b""
            continue
        try:
            yield row.to_pylist()[0], b""
        except Exception as error:
            columns = zip(row.schema.names, row.columns, strict=True)
            yield error, "\n".join(f"{column}: {values.to_string()}" for column, values in columns).encode()


def _from_folder(path: Path, name: str, split: str) -> Iterator[_Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise PromptError(f"prompts.source: {path} is not a folder made by `datasets`: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise PromptError(f"prompts.hub_split: {path} has no split {split!r}; there is {', '.join(loaded)}")
        loaded = loaded[split]
    yield from (_Row(name, number, None, fields) for number, fields in enumerate(loaded, 1))


def _from_hub(recipe: Recipe) -> Iterator[_Row]:
    import datasets

    section = recipe.prompts
    try:
        loaded = datasets.load_dataset(section.source, name=section.hub_config, split=section.hub_split)
    except Exception as error:
        raise PromptError(
            f"prompts.source: there is no file {recipe.path(section.source)}, and no data set {section.source!r} "
            f"(split {section.hub_split!r}) could be loaded from the hub: {error}\n"
            "To use data that is on this machine: --set prompts.source=/path/to/file (or module:function)"
        ) from None
    yield from (_Row(section.source, number, None, fields) for number, fields in enumerate(loaded, 1))


def _from_function(reference: str, folder: Path) -> Iterator[_Row]:
    try:
        for number, fields in enumerate(functions.rows(reference, folder), 1):
            if not isinstance(fields, Mapping):
                raise PromptError(f"{reference} yields rows as dicts; row {number} is a {type(fields).__name__}")
            yield _Row(reference, number, None, fields)
    except functions.FunctionError as error:
        raise PromptError(f"prompts.source: {error}") from error


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
