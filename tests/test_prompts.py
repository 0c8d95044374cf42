"""Prompts: every row becomes one prompt or one refusal, and a prompt becomes the right tokens."""

import json
import os
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rsft_pipeline import functions, lineage, prompts
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.recipe import Recipe


def characters(post: str = "<s> $A", chat_template: str | None = None) -> PreTrainedTokenizerFast:
    """One token per character: <s> is 1, </s> is 2, and a character's id is its code point."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2} | {chr(i): i for i in range(3, 256)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.post_processor = processors.TemplateProcessing(single=post, special_tokens=[("<s>", 1), ("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=chat_template
    )


@pytest.fixture
def make(tmp_path):
    """A recipe in tmp_path whose `prompts` section is given; template and source have defaults."""

    def make(sampling=None, **section) -> Recipe:
        section = {"source": "rows.jsonl", **section}
        if "messages" not in section:
            section.setdefault("template", "{q}")
        tree = {
            "description": "a trial",
            "model": {"source": "model"},
            "prompts": section,
            "sampling": {"max_tokens": 10, **(sampling or {})},
            "scoring": {"scorers": [{"kind": "sentiment"}]},
            "acceptance": {"rule": "threshold", "threshold": 0},
        }
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump(tree))
        return load(tmp_path / "trial.yaml")

    return make


def write(path: Path, *lines: bytes) -> Path:
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    return path


def read(made: Recipe, context_length: int = 1000, tokenizer=None) -> prompts.Ingest:
    ingest = prompts.read(made, tokenizer or characters(), context_length)
    assert ingest.rows == len(ingest.prompts) + len(ingest.refused)
    return ingest


def refusals(ingest: prompts.Ingest) -> list[tuple[int, str, bytes]]:
    return [(refused.line, refused.reason, refused.raw) for refused in ingest.refused]


# --- rows and refusals ------------------------------------------------------------------------


ENDLESS = """
import itertools

def rows():
    for i in itertools.count():
        yield {"q": str(i)}
"""


@pytest.mark.parametrize(
    ("section", "group_by", "said"),
    [
        ({"inbox": "inbox"}, None, "none of the 1 rows of rows.jsonl is usable"),
        ({"source": "inbox/more.jsonl"}, "size", "no prompt has a column 'size'; there is 'q', 'kind'"),
        ({"source": "endless:rows", "limit": 3}, "kind", "no prompt has a column 'kind'; there is 'q'"),
        ({"template": "{{q}}"}, None, "prompts.template: no {column} is in it"),
        ({"source": "numbers:rows"}, None, "prompts.source: numbers:rows has to yield dicts, and row 1 is of the type"),
        ({"source": "leaving:rows"}, None, "leaving:rows failed: SystemExit: enough .leaving.py, line 2, in rows"),
        ({"source": "gone:rows"}, None, "gone.py could not be imported: SystemExit"),
    ],
)
def test_a_check_finds_what_reading_would(make, tmp_path, section, group_by, said):
    (tmp_path / "inbox").mkdir()
    write(tmp_path / "rows.jsonl", b'{"other": "a"}')
    write(tmp_path / "inbox" / "more.jsonl", b'{"q": "a", "kind": "b"}')
    (tmp_path / "endless.py").write_text(ENDLESS)
    (tmp_path / "numbers.py").write_text("def rows():\n    yield from range(3)\n")
    (tmp_path / "leaving.py").write_text("def rows():\n    raise SystemExit('enough')\n")
    (tmp_path / "gone.py").write_text("import sys\nsys.exit(0)\n")
    made = make(**section).model_copy(update={"group_by": group_by})
    for look in (prompts.check, read):
        with pytest.raises(prompts.PromptError, match=said):
            look(made)


def test_a_check_counts_a_prompt_that_comes_twice_once(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "a"}', b'{"q": "a"}', b'{"q": "b", "kind": "c"}')
    made = make(limit=2).model_copy(update={"group_by": "kind"})
    prompts.check(made)
    assert len(read(made).prompts) == 2


def test_a_bad_row_goes_to_quarantine_alone_with_its_bytes_and_its_reason(make, tmp_path):
    bad = {
        2: (b'{"q": "two', "broken JSON"),
        3: (b'["three"]', "broken JSON"),
        4: (b'{"q": "caf\xe9"}', "not UTF-8"),
        5: (b'{"Q": "five"}', "missing column"),
        6: (b'{"q": null}', "missing column"),
        7: (b'{"q": NaN}', "missing column"),
        8: (b'{"q": " \\t"}', "empty"),
        9: (b"", "empty"),
        10: (b'{"q": "\\ud800"}', "not storable"),
        11: (b'{"q": " one  "}\r', "duplicate"),
        12: (b'{"q": "' + b"x" * 990 + b'"}', "too long"),
        13: (b'{"q": "thirteen", "more": [{"r": 1, "r": 2}]}', "broken JSON"),
    }
    write(tmp_path / "rows.jsonl", b'\xef\xbb\xbf{"q": "one"}', *(raw for raw, _ in bad.values()), b'{"q": "last"}')

    ingest = read(make())

    assert [(p.line, p.text) for p in ingest.prompts] == [(1, "one"), (14, "last")]
    assert refusals(ingest) == [(line, reason, raw) for line, (raw, reason) in bad.items()]
    assert ingest.rows == 14
    details = {refused.line: refused.detail for refused in ingest.refused}
    assert details[4] == "byte 0xe9 at position 10" and details[13] == "'r' is there more than once"
    assert details[5] == "no column 'q'; there is 'Q'"
    assert details[11] == "the same text as line 1 of rows.jsonl"
    assert details[12] == "991 tokens, 990 fit"


def test_a_prompt_keeps_its_row_under_our_names_and_where_it_came_from(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"Question": "6*7?", "answer": 42, "level": [1, {"a": 1e999}]}')
    made = make(columns={"q": "Question"}, template="Q: {q}", reference="answer", eval_fraction=0.5)

    (prompt,) = read(made).prompts

    assert prompt == prompts.Prompt(
        prompt_id=lineage.prompt_id("Q: 6*7?"),
        text="Q: 6*7?",
        messages=None,
        reference="42",
        fields={"q": "6*7?", "answer": 42, "level": [1, {"a": None}]},
        question=lineage.question(["6*7?"]),
        split="eval" if lineage.in_eval_split(lineage.question(["6*7?"]), 0.5) else "train",
        source="rows.jsonl",
        line=1,
    )


def test_a_row_without_its_reference_is_refused(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "one", "a": "1"}', b'{"q": "two"}')
    ingest = read(make(reference="a"))
    assert [p.reference for p in ingest.prompts] == ["1"]
    assert refusals(ingest) == [(2, "missing column", b'{"q": "two"}')]


def test_csv_records_may_span_lines_and_a_broken_one_costs_its_first_line_only(make, tmp_path):
    (tmp_path / "rows.csv").write_bytes(
        b"\xef\xbb\xbfq,a\r\n"  # line 1, with a byte order mark
        b'"two\r\nthree",1\r\n'
        b"four,2,3\r\n"
        b"\r\n"
        b'"six never closes,5\r\n'
        b'"seven",6\r\n'
        b"eight \xe9,7\r\n"
        b'"say ""nine""",8\r\n'
        b'"ten never closes,9\r\n'
        b"eleven,10"
    )
    ingest = read(make(source="rows.csv", reference="a"))
    assert [(p.line, p.text, p.reference) for p in ingest.prompts] == [
        (2, "two\r\nthree", "1"),
        (7, "seven", "6"),
        (9, 'say "nine"', "8"),
        (11, "eleven", "10"),
    ]
    assert refusals(ingest) == [
        (4, "broken CSV", b"four,2,3\r"),
        (5, "empty", b"\r"),
        (6, "broken CSV", b'"six never closes,5\r'),
        (8, "not UTF-8", b"eight \xe9,7\r"),
        (10, "broken CSV", b'"ten never closes,9\r'),
    ]


def test_text_is_split_at_line_feeds_only(make, tmp_path):
    text = "one\u0085still one\u2028and one\nrow two\r\nrow three"
    (tmp_path / "rows.txt").write_text(text, encoding="utf-8", newline="")
    ingest = read(make(source="rows.txt", template="{text}"))
    assert [p.text for p in ingest.prompts] == ["one\u0085still one\u2028and one", "row two", "row three"]


def test_the_encoding_of_the_recipe_is_used_and_named(make, tmp_path):
    write(tmp_path / "rows.txt", b"clich\xe9", b"\x81")  # 0x81 is nothing in cp1252
    ingest = read(make(source="rows.txt", template="{text}", encoding="cp1252"))
    assert [p.text for p in ingest.prompts] == ["cliché"]
    assert refusals(ingest) == [(2, "not CP1252", b"\x81")]


def test_parquet_folder_hub_and_function_give_the_same_prompts(make, tmp_path, monkeypatch):
    rows = [{"q": "one", "n": 1}, {"q": None, "n": 2}, {"q": "three", "n": 3}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    datasets.DatasetDict({"held": datasets.Dataset.from_list(rows)}).save_to_disk(str(tmp_path / "folder"))
    (tmp_path / "mine.py").write_text(f"def rows():\n    yield from {rows!r}\n")
    # load_dataset also takes a folder of data files: the hub's road, without the hub
    (tmp_path / "hub").mkdir()
    write(tmp_path / "hub" / "held.jsonl", *(json.dumps(row).encode() for row in rows))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))

    sources = [
        {"source": "rows.parquet"},
        {"source": "folder", "hub_split": "held"},
        {"source": "mine:rows"},
        {"source": str(tmp_path / "hub"), "format": "hub"},
    ]
    for source in sources:
        ingest = read(make(**source))
        assert [(p.text, p.line, p.fields) for p in ingest.prompts] == [("one", 1, rows[0]), ("three", 3, rows[2])]
        assert refusals(ingest) == [(2, "missing column", b'{"q": null, "n": 2}')]
        assert {p.source for p in ingest.prompts} == {source["source"]}


def test_the_inbox_is_read_after_the_source_and_a_stray_file_stops_nothing(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "one"}')
    made = make(inbox="inbox")
    assert len(read(made).prompts) == 1  # no inbox yet

    (tmp_path / "inbox" / "sub").mkdir(parents=True)
    write(tmp_path / "inbox" / "b.csv", b"q", b"two", b"one")
    write(tmp_path / "inbox" / "a.jsonl", b'{"q": "three"}')
    write(tmp_path / "inbox" / "notes.docx", b"?")
    write(tmp_path / "inbox" / "cut.parquet", b"PAR1")
    write(tmp_path / "inbox" / ".hidden", b"?")

    ingest = read(made)

    assert [(p.text, p.source) for p in ingest.prompts] == [
        ("one", "rows.jsonl"),
        ("three", "inbox/a.jsonl"),
        ("two", "inbox/b.csv"),
    ]
    assert [(r.source, r.line, r.reason) for r in ingest.refused] == [
        ("inbox/b.csv", 3, "duplicate"),
        ("inbox/cut.parquet", 0, "unreadable file"),
        ("inbox/notes.docx", 0, "unreadable file"),
    ]


def test_parquet_rows_that_python_cannot_hold_are_refused_and_the_others_kept(make, tmp_path):
    times = pyarrow.array([0, 2**60, 0], pyarrow.timestamp("us"))
    bytes_ = pyarrow.array([b"one", b"two", b"\xff\xfe"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"q": bytes_, "at": times}), tmp_path / "rows.parquet")
    found = read(make(source="rows.parquet"))
    assert [(p.text, p.line) for p in found.prompts] == [("one", 1)]
    assert [(row.line, row.reason) for row in found.refused] == [(2, "not storable"), (3, "not storable")]
    assert all(row.detail for row in found.refused) and b"two" in found.refused[0].raw


def test_limit_counts_usable_rows_and_stops_at_the_one_that_fills_it(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "one"}', b"broken", b'{"q": "three"}', b"broken", b'{"q": "five"}')
    ingest = read(make(limit=2))
    assert [p.text for p in ingest.prompts] == ["one", "three"]
    assert (ingest.rows, len(ingest.refused)) == (3, 1)


def test_a_reference_that_is_rated_has_to_fit_with_its_prompt(make, tmp_path):
    rows = [{"q": "four", "a": "x" * n} for n in (14, 15)]
    write(tmp_path / "rows.jsonl", *(json.dumps({**row, "q": f"{row['q']}{i}"}).encode() for i, row in enumerate(rows)))
    found = read(make({"source": "reference", "draws": 1}, reference="a"), context_length=21)
    assert [len(prompt.reference) for prompt in found.prompts] == [14]  # <s>four0, the answer, and its end: 21 tokens
    assert [(row.reason, row.detail) for row in found.refused] == [
        ("too long", "the reference is 16 tokens with its end, 15 fit")
    ]
    assert len(read(make(reference="a"), context_length=21).prompts) == 2  # only compared with


def test_prompt_and_completion_share_the_context(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "1234"}', b'{"q": "12345"}')  # with <s>: 5 and 6 tokens
    assert len(read(make(), context_length=16).prompts) == 2
    assert [p.text for p in read(make(), context_length=15).prompts] == ["1234"]
    assert [p.text for p in read(make(max_tokens=5)).prompts] == ["1234"]
    with pytest.raises(prompts.PromptError, match="max_tokens is 10, but the model's context is 10"):
        read(make(), context_length=10)


def test_the_digest_follows_content_and_not_order(make, tmp_path):
    rows = [b'{"q": "one", "a": "1"}', b'{"q": "two", "a": "2"}']

    def digest(*lines):
        write(tmp_path / "rows.jsonl", *lines)
        return read(make(reference="a")).digest

    assert digest(*rows) == digest(*reversed(rows)) == digest(rows[0], b"broken", rows[1])
    assert digest(*rows) != digest(rows[0], b'{"q": "two", "a": "3"}')


def test_the_split_is_kept_whatever_else_is_in_the_source(make, tmp_path):
    lines = [json.dumps({"q": f"question {i}"}).encode() for i in range(400)]
    write(tmp_path / "rows.jsonl", *lines)
    whole = {p.prompt_id: p.split for p in read(make(eval_fraction=0.25)).prompts}
    write(tmp_path / "rows.jsonl", *lines[::-3])
    part = {p.prompt_id: p.split for p in read(make(eval_fraction=0.25)).prompts}
    assert part == {prompt: whole[prompt] for prompt in part}
    held = {prompt for prompt, split in whole.items() if split == "eval"}
    assert 70 <= len(held) <= 130  # a quarter of 400, give or take three and a half standard deviations
    worded = read(make(eval_fraction=0.25, template="Please answer: {q}")).prompts
    assert {p.fields["q"] for p in worded if p.split == "eval"} == {
        p.fields["q"] for p in read(make(eval_fraction=0.25)).prompts if p.split == "eval"
    }


def test_the_split_is_that_of_the_question_in_whatever_words_and_order(make, tmp_path):
    rows = [json.dumps({"q": f"question {i}", "c": f"context {i % 7}"}).encode() for i in range(100)]
    write(tmp_path / "rows.jsonl", *rows)
    one, other = (
        {p.fields["q"]: (p.question, p.split) for p in read(make(eval_fraction=0.3, template=template)).prompts}
        for template in ("Context: {c} Question: {q}", "{q}? ({c})")
    )
    assert one == other and len({question for question, _ in one.values()}) == 100
    assert {split for _, split in one.values()} == {"train", "eval"}


def test_a_row_that_is_refused_does_not_make_a_later_one_a_duplicate(make, tmp_path):
    write(tmp_path / "rows.jsonl", json.dumps({"q": "a" + " " * 999 + "b"}).encode(), b'{"q": "a b"}', b'{"q": "a  b"}')
    ingest = read(make())
    assert [p.text for p in ingest.prompts] == ["a b"]
    assert [(r.line, r.reason) for r in ingest.refused] == [(1, "too long"), (3, "duplicate")]


# --- rendering --------------------------------------------------------------------------------


def test_placeholders_take_columns_and_reach_nowhere_else(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "{a} {{", "a": ["x"], "the key": 7}')
    (prompt,) = read(make(template='{{"q": {q}}} {a} {the key} }}')).prompts
    assert prompt.text == '{"q": {a} {{} ["x"] 7 }'
    for reaching in ("{q.__class__}", "{a[0]}", "{q!r}", "{}"):
        with pytest.raises(prompts.PromptError, match="missing column: 1"):
            read(make(template=reaching))


CHAT = (
    "<s>{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def test_chat_prompts_go_through_the_chat_template_and_get_one_bos(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "hi"}')
    made = make(messages=[{"role": "system", "content": "Be {{kind}}."}, {"role": "user", "content": "{q}!"}])

    tokenizer = characters(chat_template=CHAT)
    (prompt,) = read(made, tokenizer=tokenizer).prompts
    assert prompt.text == "<s>[system]Be {kind}.[user]hi![assistant]"
    assert prompt.messages == [{"role": "system", "content": "Be {kind}."}, {"role": "user", "content": "hi!"}]
    assert prompts.encode(tokenizer, prompt.text, chat=True) == [1, *map(ord, prompt.text[3:])]

    (plain,) = read(made, tokenizer=characters()).prompts  # no chat template
    assert plain.text == "system: Be {kind}.\nuser: hi!\nassistant:"
    assert prompts.encode(characters(), plain.text, chat=True) == [1, *map(ord, plain.text)]


def test_a_chat_template_that_writes_the_date_gives_the_same_prompt_every_day(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "hi"}')
    tokenizer = characters(chat_template="\n{{ strftime_now('%d %B %Y') }}|{{ messages[0].content }}")
    (prompt,) = read(make(messages=[{"role": "user", "content": "{q}"}]), tokenizer=tokenizer).prompts
    assert prompt.text == "\n01 Jan 2025|hi"


def test_an_eos_that_the_tokenizer_appends_is_taken_off(make):
    assert prompts.encode(characters("<s> $A </s>"), "ab", chat=False) == [1, 97, 98]
    assert prompts.encode(characters("$A"), "ab", chat=False) == [97, 98]
    assert prompts.encode(characters("$A"), "ab</s>", chat=False) == [97, 98, 2]  # written in the prompt itself


def test_a_long_cell_is_one_cell_whatever_its_lines_look_like(make, tmp_path):
    cell = "\n".join(f"line {n},not a row" for n in range(20_000))  # a third of a megabyte
    write(tmp_path / "rows.csv", b"q,a", f'"{cell}",yes'.encode(), b"short,no")
    found = read(make(source="rows.csv"))
    assert [prompt.text for prompt in found.prompts] == ["short"]
    (refused,) = found.refused
    assert (refused.line, refused.reason) == (2, "too long") and cell.encode() in refused.raw


def test_a_file_whose_name_is_not_utf8_is_read_all_the_same(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "one"}')
    (tmp_path / "inbox").mkdir()
    with open(os.fsencode(tmp_path / "inbox") + b"/caf\xe9.jsonl", "w") as file:
        file.write('{"q": "two"}')
    found = read(make(source="rows.jsonl", inbox="inbox"))
    assert [(prompt.text, prompt.source) for prompt in found.prompts][1] == ("two", "inbox/caf\\xe9.jsonl")


# --- sources that cannot be read ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"source": "nothere.jsonl"}, r"/nothere.jsonl cannot be read: No such file"),
        ({"source": "rows.tsv"}, r"the format of .*rows.tsv cannot be told .* set prompts.format"),
        ({"source": "empty.txt"}, "empty.txt has no rows"),
        ({"source": "broken.parquet"}, "broken.parquet is not readable as Parquet"),
        ({"source": "twice.parquet"}, r"twice.parquet has columns of one name: \['q', 'q'\]"),
        ({"source": "twice.csv"}, r"does not begin with a header of distinct names: \['q', 'q'\]"),
        ({"source": "folder"}, "folder is not a folder made by `datasets`"),
        ({"source": "rows:nothere"}, "no installed module 'rows'"),
        ({"encoding": "utf-16"}, "'utf-16' cannot be read line by line"),
        ({"encoding": "klingon"}, "'klingon' is not a text encoding"),
        ({"template": "{Q}"}, r"none of the 2 rows of rows.jsonl is usable \(missing column: 1, broken JSON: 1\)"),
    ],
)
def test_a_source_that_cannot_be_used_says_what_was_looked_for(make, tmp_path, section, message):
    write(tmp_path / "rows.jsonl", b'{"q": "one"}', b"broken")
    write(tmp_path / "rows.tsv", b"q", b"one")
    pyarrow.parquet.write_table(pyarrow.table([["one"], ["two"]], ["q", "q"]), tmp_path / "twice.parquet")
    write(tmp_path / "empty.txt")
    write(tmp_path / "broken.parquet", b"PAR1")
    write(tmp_path / "twice.csv", b"q,q", b"1,2")
    (tmp_path / "folder").mkdir()
    with pytest.raises(prompts.PromptError, match=message):
        read(make(**section))


# --- functions of the user's own ------------------------------------------------------------------


def test_a_function_is_found_in_the_folder_first_and_leaves_no_trace_on_the_path(tmp_path):
    import sys

    path_before = list(sys.path)
    (tmp_path / "json.py").write_text("def dumps(value):\n    return 'mine'\n")
    assert functions.load("json:dumps", tmp_path)(1) == "mine"
    assert functions.load("os.path:join", tmp_path)("a", "b") == "a/b"
    assert sys.path == path_before
    assert json.dumps(1) == "1"


def test_an_edited_function_is_read_afresh_and_has_another_digest(tmp_path):
    (tmp_path / "mine.py").write_text("def f():\n    return 1\n")
    first = functions.load("mine:f", tmp_path)
    before = functions.version("mine:f", tmp_path)
    (tmp_path / "mine.py").write_text("def f():\n    return 2\n")
    second = functions.load("mine:f", tmp_path)
    assert (first(), second()) == (1, 2)
    assert functions.version("mine:f", tmp_path) != before


def test_a_function_that_another_file_wraps_has_the_version_of_its_own_file_too(tmp_path, monkeypatch):
    (tmp_path / "wrapping.py").write_text("def wrap(function):\n    return lambda: function()\n")
    monkeypatch.syspath_prepend(tmp_path)
    versions = []
    for value in (1, 2):
        (tmp_path / "mine.py").write_text(f"from wrapping import wrap\n\n@wrap\ndef f():\n    return {value}\n")
        assert functions.load("mine:f", tmp_path)() == value
        versions.append(functions.version("mine:f", tmp_path))
    assert versions[0] != versions[1]


@pytest.mark.parametrize(
    ("reference", "message"),
    [
        ("mine", "not of the form `module:function`"),
        ("mine:f()", "not of the form `module:function`"),
        ("nothere:f", "no installed module 'nothere'"),
        ("mine:g", "has no function 'g'. Functions there: f"),
        ("mine:constant", "has no function 'constant'"),
        ("broken:f", "ZeroDivisionError"),
    ],
)
def test_a_function_that_cannot_be_used_says_why(tmp_path, reference, message):
    (tmp_path / "mine.py").write_text("constant = 1\ndef f(): ...\n")
    (tmp_path / "broken.py").write_text("1 / 0\n")
    with pytest.raises(functions.FunctionError, match=message.replace("(", r"\(").replace(")", r"\)")):
        functions.load(reference, tmp_path)


def test_an_installed_module_that_was_edited_since_it_was_imported_is_refused(tmp_path, monkeypatch):
    (tmp_path / "site").mkdir()
    monkeypatch.syspath_prepend(tmp_path / "site")
    module = tmp_path / "site" / "installed_here.py"
    module.write_text("def f(): return 1\n")
    (tmp_path / "mine.py").write_text("from installed_here import f\n")
    assert functions.load("mine:f", tmp_path)() == 1  # from here on: `version` is asked for later
    versions = {reference: functions.version(reference, tmp_path) for reference in ("installed_here:f", "mine:f")}
    assert {reference: functions.version(reference, tmp_path) for reference in versions} == versions
    module.write_text("def f(): return 2\n")
    for reference in versions:
        with pytest.raises(functions.FunctionError, match="was edited after this process imported it"):
            functions.version(reference, tmp_path)
        with pytest.raises(functions.FunctionError, match="was edited after this process imported it"):
            functions.load(reference, tmp_path)


def test_a_function_of_rows_that_wants_an_argument_is_named(tmp_path):
    (tmp_path / "mine.py").write_text("def f(path): yield path\n")
    with pytest.raises(functions.FunctionError, match=r"mine:f is called with no arguments: missing .*'path'"):
        list(functions.rows("mine:f", tmp_path))


ENDLESS = """
from fractions import Fraction


def rows():
    yield {"q": "a"}
    yield {"q": 10**5000}
    around = {"q": "b"}
    around["itself"] = around
    yield around
    yield {"q": "c", "unused": 10**5000, "half \\ud800": around, 10**5000: 1}
    yield {"q": "e", "unused": Fraction(10) ** 400}
    yield {"q": "f", "unused": {1: "one", "1": "another"}}
    yield {"q": "d"}
"""


def test_a_row_that_json_cannot_even_write_is_refused_and_those_behind_it_are_read(make, tmp_path):
    (tmp_path / "endless.py").write_text(ENDLESS)
    found = read(make(source="endless:rows"))
    assert [prompt.text for prompt in found.prompts] == ["a", "d"]
    assert [(row.line, row.reason) for row in found.refused] == [(n, "not storable") for n in (2, 3, 4, 5, 6)]
    assert found.refused[1].raw == b"a row that JSON cannot write; its columns: q, itself"


def test_a_prompt_of_which_a_cut_leaves_nothing_is_no_prompt(make, tmp_path):
    write(tmp_path / "rows.jsonl", b'{"q": "  abc"}', b'{"q": "abc"}')
    found = read(make(too_long="cut", max_tokens=3))  # <s> is one of them
    assert [prompt.text for prompt in found.prompts] == ["ab"]
    assert [(row.line, row.reason) for row in found.refused] == [(1, "too long")]
    assert "nothing but white space is left" in found.refused[0].detail
