"""Revocations and provenance where there are several recipes, attempts and moments: on a store written row by row."""

import json
import re
from pathlib import Path

import letters_store as letters
import pytest
from typer.testing import CliRunner

from cli import audit, main
from rsft_pipeline import lineage, report, revocations, rounds
from rsft_pipeline.audit import browse, ids, training_set, verify
from rsft_pipeline.audit.ids import AuditError
from rsft_pipeline.audit.impact import impact
from rsft_pipeline.audit.revoke import revoke
from rsft_pipeline.audit.trace import trace
from rsft_pipeline.home import Home
from rsft_pipeline.prompts import Ingest, Prompt, PromptError, Refused
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.steps import rows
from rsft_pipeline.steps.ingest import ingest
from rsft_pipeline.steps.score import check_not_revoked
from rsft_pipeline.store import Store

WORDS = {"who": "Ada", "why": "asked to"}
ALL_ROUNDS = {"training": {"data": "all_rounds"}, "scorers": list(letters.SCORERS.values())}


@pytest.fixture
def store(tmp_path):
    with letters.write(tmp_path) as made:
        yield made


def copy(store: Store, recipe: str) -> None:
    """Another recipe, whose prompts, scorers and base are the same."""
    for table in ("prompts", "candidates", "decisions", "rounds", "training_samples", "checkpoints", "scores"):
        rows = store.query(f"SELECT * FROM {table} WHERE recipe = ?", [letters.RECIPE])
        for row in rows:
            row["recipe"] = recipe
            for name in {"candidate_id", "checkpoint", "champion"} & row.keys():
                row[name] = lineage.digest([recipe, row[name]])
        store.append(table, rows)


def test_what_a_later_round_learned_is_traced_whatever_other_recipes_there_are(store):
    one, second = letters.candidate_id("r000", 8, 0), letters.CHECKPOINTS["r001"]
    base = "parent = ?, policy = ?, drawn_from = ?"
    store.commit(
        lambda c: c.execute(
            f"UPDATE checkpoints SET meta = ?, {base} WHERE round = 'r001'",
            [json.dumps(ALL_ROUNDS), *[letters.BASE] * 3],
        )
    )
    learned = {"recipe": letters.RECIPE, "round": "r001", "checkpoint": second, "candidate_id": one, "weight": 1.0}
    store.append("training_samples", [learned])
    store.append("rounds", [{"recipe": "zeta", "round": "r000", "state": "finished", "settings": "{}"}])
    assert {row.round for row in trace(store, one).learned} == {"r000", "r001"}


def test_a_source_reaches_in_each_recipe_the_prompts_that_it_brought_there(store):
    copy(store, "zeta")
    of = "recipe = 'zeta' AND prompt_id <> ?"
    store.commit(
        lambda c: c.execute(f"UPDATE prompts SET source = 'own.jsonl' WHERE {of}", [letters.prompt_id(letters.PROMPTS)])
    )
    store.commit(
        lambda c: c.execute(
            "UPDATE prompts SET source = 'letters.jsonl' WHERE recipe = 'zeta' AND prompt_id = ?",
            [letters.prompt_id(3)],
        )
    )
    thing = ids.thing(store, "letters.jsonl")
    assert thing.recipes == (letters.RECIPE, "zeta")
    assert revoke(store, thing, **WORDS, erase=True).erased["candidates"] == 176 + 8
    kept = "SELECT count(*) FROM candidates WHERE recipe = 'zeta' AND text IS NOT NULL"
    assert store.value(kept) == 176 - 8


def test_whose_source_is_revoked_has_to_be_said_where_several_recipes_have_one_of_that_name(tmp_path, monkeypatch):
    monkeypatch.setenv("RSFT_HOME", str(tmp_path))
    with letters.write(tmp_path) as store:
        copy(store, "zeta")
    done = CliRunner().invoke(audit.app, ["revoke", "letters.jsonl", "--by", "Ada", "--why", "asked to"])
    assert "'letters.jsonl' is in letters, zeta" in str(done.exception) and "--recipe" in str(done.exception)
    with Store.at(tmp_path) as store:
        assert store.query("SELECT * FROM revocations") == []


def test_a_source_is_found_by_the_name_it_had_when_it_was_read(home, write_recipe):
    def read(name: str, *words: str) -> None:
        source = {"source": name, "template": "{q}", "eval_fraction": 0.5}
        path = write_recipe(prompts=source, scoring={"scorers": [{"kind": "length", "at_most": 1}]})
        path.with_name(name).write_text("\n".join(json.dumps({"q": word}) for word in words))
        ingest(store, load(path), Home.here(), f"read {name}", lambda *_: None)

    words = [a + b for a in "abc" for b in "abc"]
    with Store.at(home) as store:
        read("people.jsonl", *words)
        read("licensed.jsonl", "ff", *words)
        read("licensed.jsonl", "ff", "gg", *words)
        (prompt,) = store.query("SELECT * FROM prompts WHERE text = 'ab'")
        drawn = {"recipe": "letters_loop", "round": "r000", "split": "train", "prompt_id": prompt["prompt_id"]}
        store.append("candidates", [{**drawn, "candidate_id": "c" * 32, "text": "b", "draw": 0}])
        found = trace(store, "c" * 32).prompt
        assert (found.source, found.line) == ("licensed.jsonl", 4)
        assert found.earlier == [{"source": "people.jsonl", "line": 2, "dagster_run_id": "read people.jsonl"}]
        for name, prompts in (("people.jsonl", 9), ("licensed.jsonl", 11)):
            assert impact(store, ids.thing(store, name)).prompts == prompts
        revoke(store, ids.thing(store, "people.jsonl"), **WORDS)
        assert store.value("SELECT count(*) FROM prompts WHERE active") == 2


def test_what_was_reached_before_may_be_revoked_for_its_own_sake_too(store):
    checkpoint = letters.CHECKPOINTS["r000"]
    revoke(store, ids.thing(store, letters.prompt_id(3)), **WORDS)
    revoke(store, ids.thing(store, checkpoint), who="Bob", why="it leaked")
    rows = store.query("SELECT who, cause FROM revocations WHERE what = ? ORDER BY who", [checkpoint])
    assert rows == [{"who": "Ada", "cause": f"prompt {letters.prompt_id(3)}"}, {"who": "Bob", "cause": None}]
    store.commit(lambda connection: revocations.lift(connection, checkpoint))
    assert "was revoked by Bob: it leaked" in revocations.of_weights(store, checkpoint)


@pytest.mark.parametrize("known", [True, False])
def test_a_prompt_is_revoked_whatever_its_spaces(store, known):
    texts = ["who  is it?\n", "who is it?", "who is  it?"]
    before = lineage.same_text(texts[0])  # what the id was before every space counted
    rows = [{"prompt_id": lineage.prompt_id(text), "text": text, "same_text": before} for text in texts[:2]]
    if not known:  # the first from before that
        rows[0] |= {"prompt_id": before, "same_text": None}
        rows[1] |= {"prompt_id": lineage.prompt_id(texts[2]), "text": texts[2]}
    of = {"recipe": letters.RECIPE, "split": "train", "source": "people.jsonl", "active": True}
    store.append("prompts", [row | of for row in rows])
    drawn = {"recipe": letters.RECIPE, "round": "r000", "split": "train", "draw": 0, "text": "b"}
    ids_ = [row["prompt_id"] for row in rows]
    store.append(
        "candidates", [{**drawn, "candidate_id": str(i) * 32, "prompt_id": each} for i, each in enumerate(ids_)]
    )
    found = impact(store, ids.thing(store, ids_[1]))
    assert (found.prompts, found.candidates) == (2, 2)
    revoke(store, ids.thing(store, ids_[1]), **WORDS, erase=True)
    assert {row["what"] for row in store.query("SELECT what FROM revocations WHERE kind = 'prompt'")} == {*ids_}
    asked = [
        Prompt(lineage.prompt_id(text), text, None, None, {"q": text}, "q", "train", "people.jsonl", i)
        for i, text in enumerate([*texts, "who else?"])
    ]
    read = Ingest(asked, [], 4)
    left = revocations.without(store, letters.RECIPE, read)
    assert [prompt.text for prompt in left.prompts] == ["who else?"]
    assert left.digest == Ingest(asked[-1:], [], 1).digest != read.digest


@pytest.mark.parametrize("where", ["text", "reference", "fields"])
def test_a_revoked_text_keeps_out_prompts_that_have_it_anywhere(store, where):
    words = 'José "Joe" Roe'
    revoke(store, ids.text(store, words), **WORDS)
    has = {"text": "who?", "reference": "nobody", "fields": {"q": "who?"}}
    has[where] = {"q": "who?", "by": f"{words}, Köln"} if where == "fields" else f"{words}, Köln"
    of = {"messages": None, "question": "q", "split": "train", "source": "people.jsonl"}
    one = Prompt(prompt_id="a", **has, **of, line=1)
    other = Prompt(prompt_id="b", text="else?", reference=None, fields={"q": "else?"}, **of, line=2)
    left = revocations.without(store, letters.RECIPE, Ingest([one, other], [], 2))
    assert left.prompts == [other]
    assert [(row.line, row.raw, row.reason, row.detail) for row in left.refused] == [(1, b"", "revoked", "")]


@pytest.mark.parametrize("kind", ["prompt", "text"])
def test_who_erased_what_somebody_had_revoked_is_written_down_too(store, kind):
    named = {"prompt": lambda: ids.thing(store, letters.prompt_id(3)), "text": lambda: ids.text(store, "answer 3 0")}
    revoke(store, named[kind](), who="Ann", why="first")
    thing = named[kind]()
    revoke(store, thing, who="Bob", why="court order", erase=True)
    rows = store.query(
        "SELECT who, why, what, erased FROM revocations WHERE kind = ? AND cause IS NULL AND recipe <> '*'", [kind]
    )
    said = {"what": thing.unspoken, "erased": True}
    assert sorted(rows, key=lambda row: row["who"]) == [
        {"who": "Ann", "why": "first", **said},
        {"who": "Bob", "why": "court order", **said},
    ]
    names = {row["cause"] for row in store.query("SELECT cause FROM revocations WHERE cause IS NOT NULL")}
    assert names == {f"{kind} {thing.unspoken}"}


def test_a_text_is_named_by_its_hash_where_that_is_kept(store):
    revoke(store, ids.text(store, "answer 9 0"), **WORDS)
    checkpoint = letters.CHECKPOINTS["r000"]
    for why in (
        revocations.of_weights(store, checkpoint),
        revocations.of_checkpoint(store, letters.RECIPE, checkpoint),
    ):
        assert "answer 9 0" not in why and "was revoked with text sha256 " in why
    spoken = trace(store, letters.candidate_id("r000", 9, 0)).revoked
    assert any("text answer 9 0" in words for words in spoken)


def test_what_would_move_the_cursor_is_escaped_in_words(store):
    row = {"kind": "source", "what": "\x1b[2Ja.jsonl", "cause": None, "who": "me\u202e", "why": "\x1b]0;owned\x07"}
    assert revocations.said(row).isprintable() and "\\x1b[2Ja.jsonl" in revocations.said(row)


def test_a_text_of_a_recipe_that_is_not_there_is_refused(store):
    for ask in (ids.text, ids.containing):
        with pytest.raises(AuditError, match="no recipe here is called 'leters'; there is letters"):
            ask(store, "answer", "leters")


def test_an_erased_text_is_found_in_refused_rows_however_it_is_written(store):
    store.commit(lambda c: c.execute('UPDATE rounds SET settings = \'{"prompts": {"encoding": "latin-1"}}\''))
    of = {"recipe": letters.RECIPE, "line": 1, "reason": "too long", "detail": ""}
    refused = {
        "a.csv": b'7,"she said ""my name is Jane Roe"" twice"',
        "b.txt": "Jürgen Müller, Köln".encode("latin-1"),
        "c.txt": "Jürgen Müller, Köln".encode(),
        "d.jsonl": rb'{"q": "see https:\/\/jane.example\/secret"}',
        "e.jsonl": rb'{"n": 1, "q": ["from", "J\u00fcrgen M\u00FCller, K\u00f6ln"]}',
        "f.txt": b"and who is somebody else???",
        "g.jsonl": rb'{"n": 1, "q": ["from", "J\u00fcrgen M\u00FCller"]}',
        "h.jsonl": rb'{"J\u00fcrgen M\u00FCller, K\u00f6ln": null}',
        "i.jsonl": b"[" * 100_000,  # too deep to be parsed
        "j.txt": "王小明".encode(),  # which Latin-1 cannot write
    }
    store.append("quarantine", [{**of, "source": source, "raw": raw} for source, raw in refused.items()])
    named = ("Jürgen Müller, Köln", "王小明", "https://jane.example/secret", 'she said "my name is Jane Roe" twice')
    for text in named:
        revoke(store, ids.text(store, text), **WORDS, erase=True)
    left = store.query("SELECT source FROM quarantine WHERE octet_length(raw) > 0 AND source LIKE '_.%' ORDER BY 1")
    assert left == [{"source": "f.txt"}, {"source": "g.jsonl"}, {"source": "i.jsonl"}]


def test_who_revokes_what_may_come_back_is_told_what_to_do_first(tmp_path, monkeypatch):
    monkeypatch.setenv("RSFT_HOME", str(tmp_path))
    letters.write(tmp_path).close()
    words = ["audit", "revoke", letters.CHECKPOINTS["r000"], "--by", "Ada", "--why", "asked to"]
    said = CliRunner().invoke(main.app, words, catch_exceptions=False).stdout
    assert "marked: `rsft run letters --rounds 2`" in said and "may give the same weights again" in said
    words[2:3] = ["--text", "a slip of the pen"]
    said = CliRunner().invoke(main.app, words, catch_exceptions=False).stdout
    assert "nothing here contains it yet: the revocation applies to what comes later" in said


@pytest.mark.parametrize("erase", [False, True])
def test_a_copy_of_the_recipe_does_not_ask_what_was_revoked(home, write_recipe, erase):
    def read(name: str) -> set[str]:
        source = {"source": "asked.jsonl", "template": "{q}", "eval_fraction": 0.5}
        path = write_recipe(name, prompts=source, scoring={"scorers": [{"kind": "length", "at_most": 1}]})
        path.with_name("asked.jsonl").write_text("\n".join(json.dumps({"q": a + b}) for a in "abc" for b in "abcde"))
        ingest(store, load(path), Home.here(), f"read {name}", lambda *_: None)
        asked = store.query("SELECT text FROM prompts WHERE recipe = ? AND active", [name])
        return {row["text"] for row in asked}

    with Store.at(home) as store:
        assert len(read("one")) == 15
        revoke(store, ids.thing(store, lineage.prompt_id("ab")), **WORDS, erase=erase)
        revoke(store, ids.text(store, "cd"), **WORDS, erase=erase)
        revoke(store, ids.text(store, "a", "one"), **WORDS, erase=erase)  # in that recipe alone
        assert read("one") == {first + second for first in "bc" for second in "bcde"} - {"cd"}
        assert read("another") == {first + second for first in "abc" for second in "abcde"} - {"ab", "cd"}
        page = browse.revocations(store).rows
        assert {row["recipe"] for row in page} == {"one"} and len(page) == 3
        revoke(store, ids.thing(store, "asked.jsonl", "one"), **WORDS)
        with pytest.raises(PromptError, match="one: all 15 prompts were revoked: give others"):
            read("one")


def test_an_erased_text_stands_nowhere_whatever_recipe_it_was_erased_in(store):
    revoke(store, ids.text(store, "answer 3 0"), **WORDS)
    revoke(store, ids.text(store, "answer 3 0", letters.RECIPE), **WORDS, erase=True)
    left = store.query("SELECT * FROM revocations WHERE contains(what, 'answer 3') OR contains(cause, 'answer 3')")
    assert left == []


def test_an_erased_text_does_not_come_back_with_what_was_refused(store):
    refused = [
        Refused("more.jsonl", line, f'{{"a": "{name}"}}'.encode(), "too long", "")
        for line, name in enumerate(("Jane Roe", "somebody"), 1)
    ]
    store.append("quarantine", [{"recipe": letters.RECIPE, **vars(row)} for row in refused])
    assert revoke(store, ids.text(store, "Jane Roe"), **WORDS, erase=True).erased["quarantine"] == 1
    for recipe in (letters.RECIPE, "a copy"):
        read = revocations.without(store, recipe, Ingest([], refused, 1))
        assert [row.raw for row in read.refused] == [b"", refused[1].raw]


def test_what_was_revoked_is_no_example(store):
    recipe = Recipe.of_file(Path(f"{letters.RECIPE}.yaml"), letters.RECIPE_AS_RUN.model_dump(mode="json"), {})
    round_ = rounds.record(store, recipe, "r000")
    of = {"recipe": letters.RECIPE, "round": "r000", "split": "train"}
    store.append("round_prompts", [{**of, "prompt_id": letters.prompt_id(i)} for i in range(letters.PROMPTS)])
    (first, *_) = re.findall(r"\| (answer [0-9]+ [0-9]+) \|", report.candidates(store, round_).examples)
    revoke(store, ids.text(store, first), **WORDS)
    assert f"| {first} |" not in report.candidates(store, round_).examples
    assert "answer" in report.decisions(store, round_).examples
    store.commit(lambda c: c.execute("UPDATE decisions SET reason = 'revoked', accepted = false WHERE round = 'r000'"))
    assert "answer" not in report.decisions(store, round_).examples


def test_of_an_erased_source_nothing_comes_back_with_what_was_refused(store):
    revoke(store, ids.thing(store, "letters.jsonl"), **WORDS, erase=True)
    refused = Refused(
        "letters.jsonl", 3, b'{"a": "Jane Roe"}', "no label", "the reference is 'Jane Roe'; labels are a, b"
    )
    read = revocations.without(store, letters.RECIPE, Ingest([], [refused], 1))
    assert "Jane" not in repr(read.refused) and len(read.refused) == 1


def test_a_checkpoint_that_learned_from_a_teacher_in_an_earlier_round_is_not_promoted_once_that_is_revoked(store):
    teacher, second = lineage.digest("teacher"), letters.CHECKPOINTS["r001"]
    store.commit(
        lambda c: [
            c.execute("UPDATE candidates SET policy = ? WHERE round = 'r000' AND split = 'train'", [teacher]),
            c.execute("UPDATE rounds SET drawn_from = ? WHERE round = 'r000'", [teacher]),
            c.execute("UPDATE checkpoints SET drawn_from = ? WHERE round = 'r000'", [teacher]),
            c.execute(
                "UPDATE checkpoints SET parent = ?, policy = ?, drawn_from = ? WHERE round = 'r001'", [letters.BASE] * 3
            ),
        ]
    )
    learned = {"recipe": letters.RECIPE, "round": "r001", "checkpoint": second, "weight": 1.0}
    store.append("training_samples", [{**learned, "candidate_id": letters.candidate_id("r000", 8, 0)}])
    revoked = {"recipe": letters.RECIPE, "kind": "checkpoint", "what": teacher, "who": "me", "why": "licence"}
    store.append("revocations", [revoked])  # while r001 was training
    assert f"checkpoint {teacher} was revoked" in revocations.of_checkpoint(store, letters.RECIPE, second)


@pytest.mark.parametrize("what", ["policy", "teacher"])
def test_a_round_whose_policy_or_teacher_was_revoked_does_not_go_on(store, write_recipe, what):
    round_ = rounds.Round(load(write_recipe(letters.RECIPE)), "r001", "policy", "r000", "teacher", "none")
    revoked = {"recipe": letters.RECIPE, "kind": "checkpoint", **WORDS}
    store.append("revocations", [{**revoked, "what": letters.BASE}])
    check_not_revoked(store, round_)
    store.append("revocations", [{**revoked, "what": what}])
    with pytest.raises(rounds.RoundError, match=f"letters r001: checkpoint {what} was revoked by Ada: asked to"):
        check_not_revoked(store, round_)


MADE_FROM = {"parent": "parent", "policy": "policy", "drawn_from": None}


@pytest.mark.parametrize(
    ("kind", "what", "made_from", "reached"),
    [
        ("checkpoint", letters.CHECKPOINTS["r001"], {}, True),
        ("checkpoint", "parent", {}, True),
        ("checkpoint", "policy", {}, True),  # from before it was written down what it learned from
        ("checkpoint", "teacher", {"drawn_from": "teacher"}, True),
        ("checkpoint", "policy", {"drawn_from": "teacher"}, False),
        ("scorer", "version-answer", {}, True),
        ("candidate", letters.candidate_id("r001", 3, 0), {}, True),
        ("candidate", letters.candidate_id("r001", 3, 1), {}, False),  # a duplicate, which it did not learn
        ("candidate", letters.candidate_id("r000", 3, 0), {}, False),
        ("prompt", letters.prompt_id(3), {}, True),
        ("prompt", letters.prompt_id(3, "eval"), {}, False),
    ],
)
def test_a_checkpoint_is_not_used_if_what_it_was_made_from_was_revoked_meanwhile(store, kind, what, made_from, reached):
    made, columns = letters.CHECKPOINTS["r001"], {**MADE_FROM, **made_from}
    written = ", ".join(f"{name} = ?" for name in columns)
    store.commit(lambda c: c.execute(f"UPDATE checkpoints SET {written} WHERE round = 'r001'", list(columns.values())))
    store.append("revocations", [{"recipe": letters.RECIPE, "kind": kind, "what": what, **WORDS}])
    why = revocations.of_checkpoint(store, letters.RECIPE, made)
    assert (why is not None) == reached and (not reached or what in why)
    store.append("revocations", [{"recipe": "other", "kind": "prompt", "what": letters.prompt_id(4), **WORDS}])
    assert revocations.of_checkpoint(store, letters.RECIPE, made) == why


def test_what_was_revoked_in_another_recipe_alone_may_be_trained_on(store):
    one = letters.candidate_id("r001", 7, 0)
    revoked = [
        ("other", "prompt", letters.prompt_id(3)),
        ("other", "text", "answer 5 0"),
        (revocations.EVERY, "prompt", letters.prompt_id(4)),
        (revocations.EVERY, "text", "answer 6 0"),
        ("other", "candidate", one),  # an id is of one recipe, whichever that is
        (letters.RECIPE, "scorer", "answer 8 0"),  # that is no text
    ]
    store.append(
        "revocations", [{"recipe": recipe, "kind": kind, "what": what, **WORDS} for recipe, kind, what in revoked]
    )
    drawn = f"FROM candidates s WHERE round = 'r001' AND split = 'train' AND ({revocations.REVOKED})"
    aside = store.query(f"SELECT candidate_id {drawn}", {"recipe": letters.RECIPE})
    of_four = {letters.candidate_id("r001", 4, draw) for draw in range(letters.DRAWS)}
    assert {row["candidate_id"] for row in aside} == of_four | {one, letters.candidate_id("r001", 6, 0)}
    sql, of = rows.training_rows(letters.RECIPE, "r001", letters.RECIPE_AS_RUN)
    learned = {row["candidate_id"] for row in store.query(sql, of)}
    assert learned == {letters.candidate_id("r001", n, 0) for n in range(letters.PROMPTS) if n not in (4, 7)}
    policy = {"recipe": letters.RECIPE, "kind": "checkpoint", "what": letters.CHECKPOINTS["r000"], **WORDS}
    store.append("revocations", [policy])
    assert store.query(sql, of) == []


def test_a_scorers_version_is_followed_in_every_recipe_that_has_it(store):
    copy(store, "zeta")
    thing = ids.thing(store, "answer", letters.RECIPE)
    assert thing.recipes == (letters.RECIPE, "zeta")
    assert impact(store, thing).candidates == 2 * impact(store, ids.thing(store, "letters.jsonl", "zeta")).candidates
    version = "d19e" * 8
    store.commit(lambda c: c.execute("UPDATE scores SET version = ? WHERE scorer = 'answer'", [version]))
    for typed in (version, version[:31], "answer"):  # however it is named
        assert ids.thing(store, typed, letters.RECIPE).recipes == (letters.RECIPE, "zeta")


def test_what_is_touched_itself_is_not_counted_again_among_what_came_later(store):
    whole = impact(store, ids.thing(store, "letters.jsonl"))
    assert (whole.later_candidates, whole.later_accepted) == (0, 0)  # r001 drew for prompts of the same source
    one = impact(store, ids.thing(store, letters.candidate_id("r000", 9, 0)))
    assert (one.later_candidates, one.later_accepted) == (letters.PROMPTS * letters.DRAWS, letters.PROMPTS)


BOTH = ["r000", "r001"]


@pytest.mark.parametrize(
    ("kind", "what", "counts", "evaluated", "learned"),
    [
        ("candidate", letters.candidate_id("r001", 3, 0), (0, 1, 0, 1), [], [("r001", 1)]),
        ("candidate", letters.candidate_id("r000", 3, 1), (0, 1, 0, 0), [], []),
        ("candidate", letters.candidate_id("r000", 0, 0, "eval"), (0, 0, 1, 0), ["r000"], []),
        ("candidate", letters.candidate_id("r001", 0, 0, "eval"), (0, 0, 1, 0), BOTH, []),
        ("prompt", letters.prompt_id(3), (1, 8, 0, 2), [], [("r000", 1), ("r001", 1)]),
        ("prompt", letters.prompt_id(0, "eval"), (1, 0, 8, 0), BOTH, []),
        ("source", "letters.jsonl", (40, 160, 16, 40), BOTH, [("r000", 20), ("r001", 20)]),
        ("text", "answer 3 0", (0, 1, 0, 1), [], [("r001", 1)]),
        ("text", "comes after 3?", (2, 8, 0, 2), [], [("r000", 1), ("r001", 1)]),  # one prompt of them is held out
        ("checkpoint", letters.CHECKPOINTS["r000"], (0, 80, 8, 20), BOTH, [("r000", 0), ("r001", 20)]),
        ("scorer", "version-answer", (0, 160, 16, 40), BOTH, [("r000", 20), ("r001", 20)]),
    ],
)
def test_a_thing_of_one_recipe_is_counted_there_alone(store, kind, what, counts, evaluated, learned):
    policy = {"r000": letters.BASE, "r001": letters.CHECKPOINTS["r000"]}
    for key, own in letters.CHECKPOINTS.items():
        of = {"recipe": letters.RECIPE, "round": key, "prompt_id": letters.prompt_id(0, "eval")}
        both = {"policy": policy[key], "checkpoint": own}
        store.append("evaluations", [{**of, "role": role, "checkpoint": each} for role, each in both.items()])
    copy(store, "zeta")
    found = impact(store, ids.Thing(kind, what, (letters.RECIPE,)))
    assert (found.prompts, found.candidates, found.held_out, found.accepted) == counts
    assert found.evaluated == [(letters.RECIPE, key) for key in evaluated]
    there = [(one.round, one.samples) for one in found.checkpoints if one.recipe == letters.RECIPE]
    assert there == learned


@pytest.mark.parametrize("column", ["text", "reference", "fields", "messages"])
def test_a_text_reaches_prompts_that_have_it_in_any_column(store, column):
    row = {"recipe": letters.RECIPE, "prompt_id": "a", "text": "who?", "fields": "{}", "split": "train"}
    words = "by Jane Roe" if column in ("text", "reference") else json.dumps([{"content": "by Jane Roe"}])
    store.append("prompts", [{**row, column: words}])
    assert impact(store, ids.text(store, "Jane Roe")).prompts == 1


def test_a_champion_is_in_use_only_after_the_last_finished_round(store):
    thing = ids.Thing("candidate", letters.candidate_id("r000", 8, 0), (letters.RECIPE,))
    assert impact(store, thing).champions == [(letters.RECIPE, letters.CHECKPOINTS["r000"])]
    for key, champions in (("r001", 1), ("r000", 0)):
        store.commit(lambda c, key=key: c.execute("UPDATE rounds SET state = 'revoked' WHERE round = ?", [key]))
        assert len(impact(store, thing).champions) == champions


def test_a_name_of_a_source_and_of_a_scorer_is_told_apart(store):
    store.commit(
        lambda c: c.execute("UPDATE prompts SET source = 'answer' WHERE prompt_id = ?", [letters.prompt_id(1)])
    )
    with pytest.raises(AuditError, match="'answer' could be scorer version-answer, source answer"):
        ids.thing(store, "answer")


# --- verify ------------------------------------------------------------------------------------


def test_weights_that_several_rounds_and_recipes_came_to_are_verified_as_those_of_each(store, tmp_path):
    copy(store, "zeta")
    same, now = letters.CHECKPOINTS["r000"], store.snapshot()
    every = [(recipe, key) for recipe in (letters.RECIPE, "zeta") for key in letters.CHECKPOINTS]

    def alike(connection):
        for table in ("checkpoints", "training_samples", "rounds"):
            of = "" if table == "rounds" else "recipe = 'zeta' OR "  # zeta's own are by now another
            connection.execute(f"UPDATE {table} SET checkpoint = ? WHERE {of} round = 'r001'", [same])
        for recipe, key in every:
            learned = "SELECT candidate_id FROM training_samples WHERE recipe = ? AND round = ?"
            of = [recipe, key]
            digest = lineage.set_digest(one for (one,) in connection.execute(learned, of).fetchall())
            written = "UPDATE checkpoints SET accepted_digest = ?, snapshot = ? WHERE recipe = ? AND round = ?"
            connection.execute(written, [digest, now, *of])

    store.commit(alike)
    for recipe, key in every:
        (made,) = store.query("SELECT * FROM checkpoints WHERE recipe = ? AND round = ?", [recipe, key])
        found = {one.name: one for one in verify.verify(store, made, Home(tmp_path)).checks}
        for name, compared in (
            ("the training set, counted and hashed", 2),
            ("rows at the snapshot, leaf by leaf and by the root", letters.PROMPTS),
        ):
            assert (found[name].compared, found[name].differing) == (compared, 0), (recipe, key, name)
        there = store.value("SELECT checkpoint FROM rounds WHERE recipe = ? AND round = ?", [recipe, key])
        assert ("begun again since" in found[training_set._PRESENT].note) == (there != same)
        if there == same:
            assert verify.find(store, recipe, key) == made
    assert verify.find(store, same[:9])["round"] == "r001"
    store.append("checkpoints", [{**made, "checkpoint": f"{same[:9]}0"}])
    with pytest.raises(AuditError, match=f"^2 checkpoints begin with '{same[:9]}': {same[:9]}"):
        verify.find(store, same[:9])


def test_a_damaged_file_that_only_an_older_snapshot_has_is_a_finding(store, tmp_path):
    def files():
        listed = store.query("SELECT data_file FROM ducklake_list_files('lake', 'decisions')")
        return {row["data_file"] for row in listed}

    before = files()
    again = store.query("SELECT * FROM decisions WHERE round = 'r000'")
    store.replace("decisions", again, recipe=letters.RECIPE, round="r000")
    (old,) = before - files()
    with open(old, "r+b") as file:
        file.seek(4)
        file.write(b"\0" * 196)
    made = verify.find(store, letters.CHECKPOINTS["r000"])
    found = verify.verify(store, made, Home(tmp_path)).findings
    assert any(one.kind == "file" and old in one.what for one in found)


def test_verify_is_of_one_moment(store, tmp_path, monkeypatch):
    made, before, calls = verify.find(store, letters.CHECKPOINTS["r000"]), training_set.as_of, []

    def revoked_meanwhile(connection, tables, snapshot=None):
        calls.append(snapshot)
        if len(calls) == 3:
            revoke(store, ids.thing(store, letters.prompt_id(8)), **WORDS)
        return before(connection, tables, snapshot)

    def different():
        return [
            finding.what for finding in verify.verify(store, made, Home(tmp_path)).findings if finding.kind == "data"
        ]

    quiet = different()
    monkeypatch.setattr(training_set, "as_of", revoked_meanwhile)
    assert different() == quiet and calls[0] == calls[2] != calls[1]
