"""Sources: the rows of a file, a data set or a function, one by one, each with the place that it came from.

Belongs here: reading every kind of source, and the inbox. Not: what becomes of a row (the package itself).

A row that cannot be read is refused with its bytes, and the rows after it are still read.
"""

import csv
import json
import os
import sys
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rsft_pipeline import functions
from rsft_pipeline.recipe.recipe import Recipe

SUFFIXES = {".jsonl": "jsonl", ".ndjson": "jsonl", ".csv": "csv", ".parquet": "parquet", ".txt": "text"}


class PromptError(ValueError):
    """A source that cannot be read or has no usable row: the message says what was looked for."""


@dataclass(frozen=True)
class Refused:
    """A row that cannot become a prompt.

    The reason is one of: `not UTF-8` (or whichever encoding the recipe names), `broken JSON`, `broken CSV`,
    `not storable` (a value that JSON cannot keep, such as bytes or half a surrogate pair), `missing column`
    (or null in it), `no label` (a reference that a classifier cannot give), `empty`, `too long`, `duplicate`,
    `revoked`, and for a whole file of the inbox `unreadable file`.
    """

    source: str
    line: int  # as in Prompt; 0 for a whole file
    raw: bytes  # the line or lines without the last line feed; without lines, the row as JSON or as Arrow prints it
    reason: str
    detail: str


@dataclass(frozen=True)
class Row:
    """A row as it was read."""

    source: str
    line: int
    raw: bytes | None  # None: the source has no bytes of its own
    fields: Mapping[str, Any]

    def refused(self, reason: str, detail: str) -> Refused:
        raw = self.raw
        if raw is None:
            try:
                raw = json.dumps(dict(self.fields), ensure_ascii=True, default=repr, skipkeys=True).encode()
            except (ValueError, RecursionError):  # it contains itself, or a number has too many digits
                named = ", ".join(name for name in self.fields if isinstance(name, str))
                raw = f"a row that JSON cannot write; its columns: {named}".encode("utf-8", "backslashreplace")
        return Refused(self.source, self.line, raw, reason, detail)


def check(recipe: Recipe) -> None:
    """Check that the source exists, before a model is loaded or made for it. The hub is not asked.

    Raises:
        PromptError: a missing file or folder, an unknown format, or a function that cannot be loaded.
    """
    name, path = recipe.prompts.source, recipe.path(recipe.prompts.source)
    match kind_of(recipe):
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


def rows(recipe: Recipe) -> Iterator[Row | Refused]:
    """The rows of the recipe's source. Raises PromptError if it cannot be read."""
    section = recipe.prompts
    name, path = section.source, recipe.path(section.source)
    match kind := kind_of(recipe):
        case "function":
            return _from_function(name, recipe.folder)
        case "hub":
            return _from_hub(recipe)
        case "dataset":
            return _from_folder(path, name, section.hub_split)
        case _:
            return _from_file(path, name, kind, section.encoding)


def kind_of(recipe: Recipe) -> str:
    """The recipe's format, or for `auto` the one that the source's name suggests."""
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
    """The files of the inbox, sorted by name, without hidden ones and sub-folders."""
    if recipe.prompts.inbox is None or not (folder := recipe.path(recipe.prompts.inbox)).is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))


def inbox(recipe: Recipe) -> Iterator[Row | Refused]:
    """The rows of every file in the inbox. A file that cannot be read does not stop a round: it is refused."""
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


def _from_file(path: Path, name: str, kind: str, encoding: str) -> Iterator[Row | Refused]:
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


def check_encoding(encoding: str) -> None:
    """Check that a text can be split into lines before it is decoded. Raises PromptError."""
    try:
        by_lines = b"\n".decode(encoding) == "\n"
    except LookupError:
        raise PromptError(f"prompts.encoding: {encoding!r} is not a text encoding that Python knows") from None
    except UnicodeError:
        by_lines = False
    if not by_lines:
        raise PromptError(f"prompts.encoding: {encoding!r} cannot be read line by line; convert the file to UTF-8")


def _jsonl(path: Path, name: str, encoding: str) -> Iterator[Row | Refused]:
    for number, raw in _lines(path):
        if not raw.strip():
            yield Refused(name, number, raw, "empty", "a blank line")
            continue
        try:
            fields = json.loads(_decode(number, raw, encoding), object_pairs_hook=_distinct)
        except UnicodeDecodeError as error:
            yield _undecodable(name, number, raw, encoding, error)
        except (ValueError, RecursionError) as error:
            yield Refused(name, number, raw, "broken JSON", str(error))
        else:
            if isinstance(fields, dict):
                yield Row(name, number, raw, fields)
            else:
                yield Refused(name, number, raw, "broken JSON", f"a {type(fields).__name__}, not an object")


def _distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The members of a JSON object. Refuses repeated names, of which Python would silently keep the last."""
    members = dict(pairs)
    if len(members) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice!r} is there more than once")
    return members


def _text_lines(path: Path, name: str, encoding: str) -> Iterator[Row | Refused]:
    for number, raw in _lines(path):
        try:
            yield Row(name, number, raw, {"text": _decode(number, raw, encoding).removesuffix("\r")})
        except UnicodeDecodeError as error:
            yield _undecodable(name, number, raw, encoding, error)


def _csv(path: Path, name: str, encoding: str) -> Iterator[Row | Refused]:
    """CSV with a header. A record may span lines inside quotes; of a broken one only the first line is refused."""
    records = _csv_records(path, encoding)
    _, _, header = next(records, (0, b"", None))
    if header is None:  # an empty file has no rows
        return
    if isinstance(header, UnicodeDecodeError):
        raise PromptError(f"prompts: the header of {path} is not {encoding.upper()}")
    if isinstance(header, csv.Error) or len(set(header)) < max(len(header), 1):
        raise PromptError(f"prompts: {path} does not begin with a header of distinct names: {header}")
    for number, raw, values in records:
        match values:
            case UnicodeDecodeError():
                yield _undecodable(name, number, raw, encoding, values)
            case csv.Error():
                yield Refused(name, number, raw, "broken CSV", str(values))
            case []:
                yield Refused(name, number, raw, "empty", "a blank line")
            case _ if len(values) != len(header):
                detail = f"{len(values)} fields, the header has {len(header)}"
                yield Refused(name, number, raw, "broken CSV", detail)
            case _:
                yield Row(name, number, raw, dict(zip(header, values, strict=True)))


def _csv_records(path: Path, encoding: str) -> Iterator[tuple[int, bytes, list[str] | csv.Error | UnicodeDecodeError]]:
    """Each record: its first line's number, its bytes, and its values or why it has none."""
    csv.field_size_limit(sys.maxsize)  # the default is 128 KiB; the lines of longer cells would be read as rows
    lines = _lines(path)
    given_back: deque[tuple[int, bytes]] = deque()

    def take(record: list[tuple[int, bytes]]) -> Iterator[str]:
        """Lines for csv.reader, which takes as many as a record needs; they are added to `record`."""
        while line := given_back.popleft() if given_back else next(lines, None):
            record.append(line)
            yield _decode(*line, encoding, errors="surrogateescape") + "\n"

    while True:
        record: list[tuple[int, bytes]] = []
        values: list[str] | csv.Error | UnicodeDecodeError
        try:
            values = next(csv.reader(take(record), strict=True))
        except StopIteration:
            return
        except csv.Error as error:
            # A quote that is never closed swallows the following lines: they are read again.
            given_back.extendleft(reversed(record[1:]))
            del record[1:]
            values = error
        try:
            for line in record:
                _decode(*line, encoding)
        except UnicodeDecodeError as error:
            values = error
        yield record[0][0], b"\n".join(raw for _, raw in record), values


def _parquet(path: Path, name: str, encoding: str) -> Iterator[Row | Refused]:
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
                        yield Row(name, number, None, fields)
    except pyarrow.ArrowException as error:
        raise PromptError(f"prompts: {path} is not readable as Parquet, after row {number}: {error}") from None


def _converted(batch) -> Iterator[tuple[dict[str, Any] | Exception, bytes]]:
    """Each row of an Arrow batch as a dict, or the error that prevents it with the row as Arrow prints it."""
    try:
        rows = batch.to_pylist()
    except Exception:  # e.g. a date out of range, bytes that are not UTF-8, an unknown time zone: find the row
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


def _from_folder(path: Path, name: str, split: str) -> Iterator[Row]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:
        raise PromptError(f"prompts.source: {path} is not a folder made by `datasets`: {error}") from None
    if isinstance(loaded, datasets.DatasetDict):
        if split not in loaded:
            raise PromptError(f"prompts.hub_split: {path} has no split {split!r}; there is {', '.join(loaded)}")
        loaded = loaded[split]
    yield from (Row(name, number, None, fields) for number, fields in enumerate(loaded, 1))


def _from_hub(recipe: Recipe) -> Iterator[Row]:
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
    yield from (Row(section.source, number, None, fields) for number, fields in enumerate(loaded, 1))


def _from_function(reference: str, folder: Path) -> Iterator[Row]:
    try:
        for number, fields in enumerate(functions.rows(reference, folder), 1):
            if not isinstance(fields, Mapping):
                raise PromptError(
                    f"prompts.source: {reference} has to yield dicts, and row {number} is of the type "
                    f"{type(fields).__name__}"
                )
            yield Row(reference, number, None, fields)
    except functions.FunctionError as error:
        raise PromptError(f"prompts.source: {error}") from error
