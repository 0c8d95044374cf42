"""Scoring: each scorer's values, and that no sample can shift, lose or spoil another's score."""

import importlib.metadata
import itertools
import json
import logging
import threading
import time
import weakref
from fractions import Fraction

import letters_store as letters
import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rsft_pipeline import scoring
from rsft_pipeline.devices import Device
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.rounds import Round
from rsft_pipeline.scoring import Sample, answer, blocklist, simple, symbolic
from rsft_pipeline.steps import score
from rsft_pipeline.steps.rows import ROUND_CANDIDATES, of_round

CPU = Device("cpu", "float32")


def sample(completion: str, reference: str | None = None, prompt: str = "") -> Sample:
    return Sample(prompt, completion, reference, fields={}, log_p=None)


@pytest.fixture
def make(tmp_path):
    """A recipe in tmp_path with the given scorers."""

    def make(*scorers: dict, combine: str = "weighted", messages: list[dict] | None = None) -> Recipe:
        tree = {
            "description": "a trial",
            "model": {"source": "model"},
            "prompts": {"source": "rows.jsonl", **({"messages": messages} if messages else {"template": "{q}"})},
            "scoring": {"scorers": list(scorers), "combine": combine},
            "acceptance": {"rule": "threshold", "threshold": 0},
        }
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump(tree))
        return load(tmp_path / "trial.yaml")

    return make


# --- answers ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("#### 18", 18),
        ("#### 3\nno, wait\n#### 18", 18),  # the last marker
        ("#### 18\nThat took 2 steps.", 18),  # the marker, not the last number
        ("so 42 ####", 42),  # a marker with nothing behind it marks nothing
        ("#### $1,234,567.50 in total", Fraction(246913500, 200)),
        ("48/2 = <<48/2=24>>24 clips.", 24),
        ("It is 18.0.", 18),
        ("It is .5", Fraction(1, 2)),
        ("1/2", Fraction(1, 2)),
        ("1/0", None),
        ("1/2.5", Fraction(5, 2)),  # no fraction: the last number
        ("1/1,000", 1000),
        ("version 1.2.3", 3),
        ("-5", -5),
        ("a loss of \u22125", -5),
        ("-$5", -5),
        ("$-5", -5),
        (r"\$5", 5),
        ("10-5", 5),
        ("10 - 5", 5),
        ("(2)-5", 5),
        ("x[0]-5", 5),
        ("{2}-5", 5),
        ("1.-5", 5),
        ("-\u20ac5", -5),
        ("-\u00a35", -5),
        (r"-\$5", -5),
        ("50%", 50),
        ("1,2,3", 3),
        ("1,2345", 2345),
        (r"10{,}000 or 10\,000", 10_000),
        ("10{,}000", 10_000),
        (r"\$1,\!234,\!567.50", Fraction(246913500, 200)),
        ("1\u00a0000\u202f000", 10**6),
        ("1\u2009234.5 km", Fraction(12345, 10)),
        ("in 2020\u00a0100 came", 100),  # no group has four digits before it
        (r"2\,3", 3),
        ("3,14", 14),  # a comma is never a decimal point
        ("\u0661\u0668", None),  # digits of other scripts are left alone
        ("1e-05", Fraction(1, 100_000)),  # as Python writes what was 0.00001 in a file
        ("6.02e23 of them", 602 * 10**21),
        ("1e+16", 10**16),
        ("1E3", 1000),
        ("1e100", 10**100),
        ("5e", 5),
        ("1e9999", 9999),  # no exponent, or it would be a number that fills the memory
        ("9" * 5000, None),  # more digits than Python reads
        ("none at all", None),
        ("", None),
    ],
)
def test_the_number_that_a_text_arrives_at(text, number):
    assert answer.number(text) == number


def test_answers_compare_as_exact_numbers():
    assert answer.numeric("#### 18.00", "Sum.\n#### 18") == 1.0
    assert answer.numeric("#### 1000", "#### 1,000") == 1.0
    assert answer.numeric("#### 18.0000000000000001", "#### 18") == 0.0
    assert answer.numeric("no idea", "#### 18") == 0.0
    assert answer.numeric("18", None) is None
    assert answer.numeric("18", "eighteen") is None


def test_exact_answers_compare_but_for_case_and_white_space():
    assert answer.exact(" Straße\n 5", "STRASSE 5") == 1.0
    assert answer.exact("cafe\u0301", "café") == 1.0
    assert answer.exact("It is Paris", "Paris") == 0.0
    assert answer.exact("Paris", None) is None


@pytest.mark.parametrize(
    ("text", "expression"),
    [
        (r"so \boxed{1} or rather \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed{3} and then \boxed{unclosed", "3"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"),
        (r"} {\boxed{a \boxed{b} c}} \boxed{d {e}", "b"),
        (r"\boxed{" * 20_000 + "\nso x is 2", "2"),  # in no time that grows with the square
        ("first 1\n#### x^2\nthen 3", "x^2"),
        ("from $a$ we get $b + 1$, done", "b + 1"),
        (r"thus \[ x = 2 \]", "x = 2"),
        ("She pays $5 + $5 = $10.", "She pays $5 + $5 = $10"),  # money
        ("It costs $5, so the total is $10", "$10"),
        ("$x$ dollars, $y=2$.", "y=2"),
        (r"that is \$5 or $3\$", r"\$5 or $3\$"),
        ("$$ a = 1 $$", "a = 1"),
        ("$$a$$ or $$b$$", "b"),
        (r"at \$5,$x$", "x"),
        ("5$ and then 3$", "5$ and then 3$"),  # a dollar opens nothing before a space, and closes nothing after one,
        ("pay $5 or $x", "pay $5 or $x"),
        ("$5+$5", "$5+$5"),  # nor before a digit, nor on another line
        ("costs $5\nor 6$", "or 6$"),
        ("$$x$", "$$x$"),
        ("\\[\nx = 2\n\\]", "x = 2"),
        (r"\[ open \[x + 1\]", "x + 1"),
        (r"\( open \(x + 1\)", "x + 1"),
        ("1 + 1\n\nThe answer is 2.\n", "2"),
        ("x <= 3", "x <= 3"),
        ("#### 1\n#### 2", "2"),
        (r"\boxed { 5 }", "5"),
        (r"\boxed{[0, 1\}}", r"[0, 1\}"),
        ("Answer: 2", "2"),
        ("this is: it is  2.", "2"),
        ("axis 1:2", "axis 1:2"),
        (" \n", ""),
    ],
)
def test_the_final_expression_of_a_text(text, expression):
    assert symbolic.final_expression(text) == expression


def test_a_text_of_openings_alone_is_looked_through_once():
    began = time.perf_counter()
    assert symbolic.final_expression(r"\( \[" * 20_000) == (r"\( \[" * 20_000)
    assert time.perf_counter() - began < 2


def test_math_answers_are_compared_as_expressions_and_one_that_never_ends_harms_no_other(monkeypatch):
    monkeypatch.setattr(symbolic, "SECONDS", 5.0)
    pairs = {
        (r"\boxed{\frac{2}{4}}", "0.5"): 1.0,
        (r"\boxed{(x+1)^2}", "$x^2+2x+1$"): 1.0,
        (r"\boxed{x \ge 3}", r"x \le 3"): 0.0,
        (r"\boxed{18\text{ dollars}}", "#### 18"): 1.0,
        ("x = 3", "3"): 1.0,
        ("1 2 3 4 5", "3"): 0.0,  # all numbers, the right one among them
        ("no idea", "3"): 0.0,
        ("", "3"): 0.0,
        ("3", None): None,
        ("3", ""): None,
        (r"\boxed{9^{9^{9^{9}}}}", "7"): None,
        (r"\boxed{7}", "7"): 1.0,
    }
    scores = []
    # math-verify's own time limit works in a main thread only; a scorer may run in any
    thread = threading.Thread(target=lambda: scores.extend(symbolic.equal(list(pairs))))
    thread.start()
    thread.join()
    assert dict(zip(pairs, scores, strict=True)) == pairs


# --- texts ------------------------------------------------------------------------------------


def test_listed_words_are_found_whole_and_in_every_spelling():
    listed = blocklist.Blocklist(["Ass", " tied  up ", "🖕", "c++", "STRASSE", "バカ", "  "])
    assert listed.hits("The class assessed a mass of assets") == []
    assert listed.hits("ASS, ass. ａｓｓ") == ["ass", "ass", "ass"]
    assert listed.hits("they tied\n\u00a0up") == ["tied up"]
    assert listed.hits("they untied up") == []
    assert listed.hits("well🖕🏽") == ["🖕"]
    assert listed.hits("no c++11 but C++!") == ["c++", "c++"]
    assert listed.hits("Straße") == ["strasse"]
    assert listed.hits("あのバカです") == ["バカ"]  # no spaces between words in this script
    unspaced = ["ควาย", "ခွေး", "ឆ្កួត", "笨蛋", "\ufa0e"]
    assert blocklist.Blocklist(unspaced).hits("ไอควายนะ သူခွေးပဲ គាត់ឆ្កួតណាស់ 你这笨蛋啊 你\ufa0e啊") == unspaced
    assert listed.hits("") == []
    assert listed.hits("my_ass ass2 2ass") == []  # parts of longer words
    assert listed.hits("\U0001d400\U0001d412\U0001d412") == ["ass"]  # bold ones have no case of their own
    assert blocklist.Blocklist(["ταΐζω"]).hits("ταΐζω".upper()) == ["ταΐζω"]  # folding undoes its form


def test_a_vowel_sign_is_part_of_its_word_and_an_accent_hides_none():
    listed = blocklist.Blocklist(["गू", "क", "ass"])
    assert listed.hits("गूगल क्या की") == []  # words that only begin so
    assert listed.hits("यह गू है, क!") == ["गू", "क"]
    assert listed.hits("ass\u0332 ass\ufe0f") == ["ass", "ass"]
    assert blocklist.Blocklist(["❤\ufe0f"]).hits("I❤\ufe0fyou") == ["❤\ufe0f"]


def test_entries_are_text_and_not_patterns():
    assert blocklist.Blocklist(["a.c", "(x"]).hits("abc a.c (x") == ["a.c", "(x"]


def test_the_longest_entry_is_the_one_found():
    assert blocklist.Blocklist(["tied", "tied up"]).hits("tied up, tied") == ["tied up", "tied"]


def test_a_blocklist_without_entries_is_an_error(make, tmp_path):
    (tmp_path / "words.txt").write_text("\n \n")
    made = make({"kind": "blocklist", "file": "words.txt"})
    with pytest.raises(scoring.ScoringError, match="scorer 'blocklist': the blocklist has no entry"):
        scoring.score(scoring.judges(made, CPU), [sample("x")])


def test_a_list_of_words_may_have_a_byte_order_mark_and_has_to_be_utf8(tmp_path):
    file = tmp_path / "words.txt"
    file.write_text("schön\n", "utf-8-sig")
    assert blocklist.Blocklist(blocklist.read(file)).hits("Schön!") == ["schön"]
    file.write_text("schön\n", "latin-1")
    with pytest.raises(ValueError, match=r"words.txt is not UTF-8: .* position 3"):
        blocklist.read(file)


@pytest.mark.parametrize(
    ("words", "expected"), [(0, 0.0), (1, 0.5), (2, 1.0), (4, 1.0), (5, 0.75), (7, 0.25), (8, 0.0), (20, 0.0)]
)
def test_length_falls_linearly_outside_its_bounds(words, expected):
    assert simple.length("word " * words, at_least=2, at_most=4, unit="words") == expected
    assert simple.length("é" * words, at_least=2, at_most=4, unit="characters") == expected


def test_the_simple_scorers_through_a_recipe(make, tmp_path):
    (tmp_path / "words.txt").write_text("bad\n\nvery  worse\n", encoding="utf-8")
    made = make(
        {"kind": "blocklist", "words": ["worst"], "file": "words.txt"},
        {"kind": "regex", "pattern": r"^\w+$"},
        {"kind": "length", "at_most": 1},
        {"kind": "sentiment"},
        {"kind": "answer", "match": "exact"},
    )
    samples = [sample("good", "Good"), sample("BAD"), sample("the worst"), sample("very worse", "x")]
    assert scoring.score(scoring.judges(made, CPU), samples) == {
        "blocklist": [1.0, 0.0, 0.0, 0.0],
        "regex": [1.0, 1.0, 0.0, 0.0],
        "length": [1.0, 1.0, 0.0, 0.0],
        # VADER: x / √(x² + 15), with 1.9 for good, -2.5 for bad, -3.1 for worst, -2.1 - 0.293 for very worse
        "sentiment": [0.4404, -0.5423, -0.6249, -0.5256],
        "answer": [1.0, None, None, 0.0],
    }


def test_a_pattern_is_found_anywhere_in_a_text():
    assert simple.pattern("so it is\n42.", r"is\s\d+") == 1.0
    assert simple.pattern("so it is\n42.", r"^\d+") == 0.0


def test_a_text_that_a_pattern_takes_too_long_for_is_not_judged(monkeypatch):
    monkeypatch.setattr(simple, "SECONDS", 0.05)
    assert simple.pattern("a," * 2000, "(.*)*,(.*)*,(.*)*,!") is None
    assert simple.pattern("a,b,c,!", "(.*)*,(.*)*,(.*)*,!") == 1.0


# --- reward models ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    """A small untrained reward model with two outputs and a context of 24 characters."""
    folder = tmp_path_factory.mktemp("reward")
    tokenizer = Tokenizer(models.WordLevel({"</s>": 0} | {chr(i): i for i in range(1, 128)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=128, max_position_embeddings=24, num_labels=2, initializer_range=0.5, **sizes)
    LlamaForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def alone(reward_model):
    """What the reward model's second output says of one unpadded text: its head on the last token."""
    model = LlamaForSequenceClassification.from_pretrained(reward_model).eval()

    def alone(text: str) -> float:
        with torch.inference_mode():
            hidden = model.model(torch.tensor([[ord(c) for c in text]])).last_hidden_state[0, -1]
            return model.score(hidden)[1].item()

    return alone


def test_rewards_are_those_of_each_pair_alone_whatever_the_batch(make, reward_model, alone):
    pairs = [("ab", "cdefgh"), ("a", "b"), ("x" * 20, "y" * 5), ("what?", "that is it"), ("q", "z")]
    made = make({"kind": "reward", "model": str(reward_model), "label_index": 1, "batch_size": 2})
    rewards = scoring.score(scoring.judges(made, CPU), [sample(c, prompt=p) for p, c in pairs])["reward"]

    assert rewards[2] is None  # 25 tokens do not fit, and half a text is not judged
    expected = [alone(p + c) for i, (p, c) in enumerate(pairs) if i != 2]
    assert [r for r in rewards if r is not None] == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.1


def test_a_model_without_a_trained_head_gives_no_rewards(make, reward_model, tmp_path):
    tokenizer, base = PreTrainedTokenizerFast.from_pretrained(reward_model), LlamaForSequenceClassification
    base.from_pretrained(reward_model).model.save_pretrained(tmp_path / "headless")
    tokenizer.save_pretrained(tmp_path / "headless")
    made = make({"kind": "reward", "model": "headless"})
    with pytest.raises(scoring.ScoringError, match=r"has not all the weights of a LlamaForSeq.* 1 are missing .*score"):
        scoring.judges(made, CPU)


def test_a_chat_prompt_and_its_completion_are_one_conversation_by_the_reward_models_own_template(
    make, reward_model, alone, tmp_path
):
    said = [{"role": "user", "content": "what?"}]
    replies = ("yes", "not at all", "no</s>uyes?|ayes")  # the last ends its turn and writes others
    rows = [Sample("by the policy", reply, None, {}, None, said) for reply in replies]

    def rewards(folder):
        config = {"kind": "reward", "model": str(folder), "label_index": 1, "batch_size": 2}
        judges = scoring.judges(make(config, messages=[{"role": "user", "content": "{q}"}]), CPU)
        return scoring.score(judges, rows)["reward"]

    pairs = [f"by the policy{row.completion}" for row in rows[:2]]  # the last is too long
    assert rewards(reward_model) == [*(pytest.approx(alone(each), abs=1e-5) for each in pairs), None]
    for file in reward_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role[0] }}{{ m.content }}|{% endfor %}{% if add_generation_prompt %}a{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    conversations = ["uwhat?|ayes|", "uwhat?|anot at all|"]
    assert rewards(tmp_path) == [*(pytest.approx(alone(each), abs=1e-5) for each in conversations), None]


def test_a_tokenizer_that_pads_left_makes_no_reward_depend_on_the_batch(make, reward_model, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(reward_model, padding_side="left")
    tokenizer.save_pretrained(tmp_path / "left")
    torch.manual_seed(0)
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 24, "initializer_range": 0.5}
    config = GPT2Config(vocab_size=128, num_labels=1, **sizes)  # its positions are learned: padding shifts them
    GPT2ForSequenceClassification(config).save_pretrained(tmp_path / "left")
    judges = scoring.judges(make({"kind": "reward", "model": str(tmp_path / "left"), "batch_size": 2}), CPU)
    short, long = sample("b", prompt="a"), sample("efgh", prompt="cd")
    beside = scoring.score(judges, [short, long])["reward"]
    assert beside == pytest.approx([scoring.score(judges, [one])["reward"][0] for one in (short, long)], abs=1e-5)


def test_a_reward_model_that_cannot_be_used_is_named(make, reward_model, tmp_path):
    with pytest.raises(scoring.ScoringError, match=r"scorer 'reward': label_index is 2, but .* has 2 outputs"):
        scoring.score(
            scoring.judges(make({"kind": "reward", "model": str(reward_model), "label_index": 2}), CPU), [sample("x")]
        )
    for file in reward_model.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    torch.save({}, tmp_path / "pytorch_model.bin")  # a pickle, which could run code: never loaded
    with pytest.raises(scoring.ScoringError, match="safetensors"):
        scoring.score(scoring.judges(make({"kind": "reward", "model": "."}), CPU), [sample("x")])


# --- many samples, one that fails -------------------------------------------------------------


@pytest.fixture
def mine(make, tmp_path):
    """A recipe whose only scorer is the function with the given body, called `mine`."""

    def mine(body: str) -> Recipe:
        (tmp_path / "judges.py").write_text(f"def judge(samples, factor=1):\n    {body}\n")
        return make({"kind": "function", "function": "judges:judge", "name": "mine"})

    return mine


def test_a_sample_on_which_a_scorer_fails_gets_none_and_shifts_no_other(mine, caplog):
    made = mine("return [1 / int(s.completion) for s in samples]")
    with caplog.at_level(logging.WARNING):
        scores = scoring.score(scoring.judges(made, CPU), [sample(c) for c in ("1", "0", "2", "?", "4")])
    assert scores == {"mine": [1.0, None, 0.5, None, 0.25]}
    assert [r.getMessage() for r in caplog.records][1:] == [
        "scorer 'mine' cannot judge 2 of 5 samples; sample 1: ZeroDivisionError: division by zero "
        "(judges.py, line 2, in <listcomp>)"
    ]


def test_a_scorer_that_fails_on_everything_is_an_error_and_not_a_column_of_none(mine):
    made = mine("return nothing")
    with pytest.raises(scoring.ScoringError, match="'mine' failed on every one of 2 samples: NameError"):
        scoring.score(scoring.judges(made, CPU), [sample("a"), sample("b")])


def test_memory_that_runs_out_costs_no_score():
    held, alive = [], []

    def judge(samples):
        batch = torch.zeros(len(samples))
        alive.append(any(tensor() is not None for tensor in held))
        held.append(weakref.ref(batch))
        if len(samples) > 1 or samples[0].completion == "long":
            raise torch.OutOfMemoryError("the test's device is full")
        return [1.0]

    assert scoring.score({"mine": judge}, [sample("a"), sample("b")]) == {"mine": [1.0, 1.0]}
    assert alive == [False] * 3  # what the whole batch took is free when each is tried alone
    with pytest.raises(scoring.ScoringError, match="'mine' ran out of memory on a single sample"):
        scoring.score({"mine": judge}, [sample("a"), sample("long")])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return [1.0]", "scorer 'mine' returned 1 scores for 2 samples"),
        ("return None", "scorer 'mine' returned a NoneType, not a list"),
        ("return [0.0, float('nan')]", "scorer 'mine' returned nan for sample 1, not a finite number or None"),
        ("return [float('-inf'), 0.0]", "scorer 'mine' returned -inf for sample 0, not a finite number or None"),
        ("return [0.0, 10**5000]", "scorer 'mine' returned an integer beyond every float for sample 1"),
        ("return ['1', 0.0]", "scorer 'mine' returned '1' for sample 0, not a finite number or None"),
    ],
)
def test_a_scorer_that_breaks_the_contract_is_named(mine, body, message):
    with pytest.raises(scoring.ScoringError, match=message):
        scoring.score(scoring.judges(mine(body), CPU), [sample("a"), sample("b")])


def test_the_sample_that_breaks_the_contract_is_named_by_its_place_in_the_whole(mine):
    made = mine("return [float('nan') if s.completion == 'n' else 1 / int(s.completion) for s in samples]")
    with pytest.raises(scoring.ScoringError, match="returned nan for sample 2"):
        scoring.score(scoring.judges(made, CPU), [sample("1"), sample("0"), sample("n")])


def test_a_function_sees_everything_of_a_sample_and_its_arguments(make, tmp_path):
    (tmp_path / "judges.py").write_text(
        "def judge(samples, factor):\n"
        "    return [factor * len(s.prompt + s.completion + s.reference) + s.fields['n'] + s.log_p for s in samples]\n"
    )
    made = make({"kind": "function", "function": "judges:judge", "arguments": {"factor": 10}})
    assert scoring.score(scoring.judges(made, CPU), [Sample("ab", "c", "d", {"n": 3}, -0.5)]) == {"function": [42.5]}


def test_no_samples_no_scores(mine):
    assert scoring.score(scoring.judges(mine("return [1 / len(samples)]"), CPU), []) == {"mine": []}


# --- combined -----------------------------------------------------------------------------------


def test_the_weighted_mean_leaves_gates_out_and_is_none_where_a_part_is(make):
    made = make(
        {"kind": "sentiment", "weight": 3},
        {"kind": "length", "at_most": 9, "weight": 1, "minimum": 0.5},
        {"kind": "regex", "pattern": "x", "weight": 0, "minimum": 1},
    )
    scores = {
        "sentiment": [1.0, 0.0, None, 1.0, -1.0],
        "length": [0.0, 1.0, 1.0, 0.5, None],
        "regex": [1.0, None, 1.0, 1.0, 1.0],
    }
    combined, passed = scoring.combine(made.scoring, scores)
    assert combined == [0.75, 0.25, None, 0.875, None]
    assert passed == [False, False, True, True, False]


def test_all_is_one_where_every_minimum_is_reached(make):
    made = make(
        {"kind": "sentiment", "minimum": 0}, {"kind": "regex", "pattern": "x", "minimum": 1, "weight": 0}, combine="all"
    )
    scores = {"sentiment": [0.0, -0.1, None, 1.0], "regex": [1.0, 1.0, 1.0, 0.0]}
    assert scoring.combine(made.scoring, scores) == ([1.0, 0.0, 0.0, 0.0], [True, False, False, False])


@pytest.mark.parametrize("config", [{"kind": "answer"}, {"kind": "squad"}], ids=str)
def test_a_scorer_without_the_reference_that_it_compares_with_is_refused(make, config):
    made = make(config)
    without = made.model_copy(update={"prompts": made.prompts.model_copy(update={"reference": None})})
    without._path = made._path
    with pytest.raises(scoring.ScoringError, match=r"compares with a reference answer: give `prompts\.reference`"):
        scoring.check(without)


# --- versions -----------------------------------------------------------------------------------


def test_a_version_follows_what_decides_the_scores_and_nothing_else(make, tmp_path, reward_model):
    def version(**config):
        made = make(config)
        return scoring.version(made.scoring.scorers[0], made)

    length = version(kind="length", at_most=5)
    assert length == version(kind="length", at_most=5, name="short", weight=2, minimum=0.5)
    assert length != version(kind="length", at_most=6)

    (tmp_path / "words.txt").write_text("one\n")
    listed = version(kind="blocklist", file="words.txt")
    (tmp_path / "words.txt").write_text("one\ntwo\n")
    assert version(kind="blocklist", file="words.txt") != listed

    (tmp_path / "judges.py").write_text("def judge(samples): return [1.0 for _ in samples]\n")
    judged = version(kind="function", function="judges:judge")
    (tmp_path / "judges.py").write_text("def judge(samples): return [0.0 for _ in samples]\n")
    assert version(kind="function", function="judges:judge") != judged

    for file in reward_model.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rewarded = version(kind="reward", model=".")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"rope_theta": 1.0}))
    assert version(kind="reward", model=".") != rewarded

    kinds = [{"kind": "answer", "match": match} for match in ("exact", "numeric", "math")]
    kinds += [{"kind": "sentiment"}, {"kind": "reward", "model": "owner/name", "revision": "abc"}]
    versions = [version(**kind) for kind in kinds] + [length, listed, judged, rewarded]
    assert len(set(versions)) == 9


@pytest.mark.parametrize("kind", ["reward", "likelihood", "consistency"])
def test_a_version_follows_the_release_of_the_library_that_judges(make, reward_model, kind, monkeypatch):
    named = {"reward": "model", "likelihood": "source", "consistency": "nli"}[kind]
    turns = {"turns": "turns"} if kind == "consistency" else {}
    made = make({"kind": kind, named: str(reward_model), **turns})

    def version():
        return scoring.version(made.scoring.scorers[0], made)

    of_now, installed = version(), importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "transformers" else installed(name))
    assert version() != of_now


# --- a round's candidates ---------------------------------------------------------------------

EXACT = {"kind": "answer", "match": "exact"}


@pytest.fixture
def judge(tmp_path, write_recipe):
    """Judge the 80 candidates of a second round. Returns how many were not, and the new scores of each scorer."""

    def change(sql, *values):
        store.commit(lambda connection: connection.execute(sql, list(values)))

    def judge(*scorers, show=lambda *_: None, **scoring):
        recipe = load(write_recipe(letters.RECIPE, scoring={"scorers": scorers or [EXACT], **scoring}))
        policy = letters.CHECKPOINTS["r000"]
        round_ = Round(recipe, "r001", policy, "r000", policy, "none")
        of, run = (ROUND_CANDIDATES, of_round(round_)), f"run {next(runs)}"
        missing = score.unscored(store, round_, *of, score.versions(store, round_))
        assert score.score(store, round_, *of, device=CPU, run_id=run, show=show) == missing
        new = store.query("SELECT scorer, count(*) AS n FROM scores WHERE dagster_run_id = ? GROUP BY ALL", [run])
        return missing, {row["scorer"]: row["n"] for row in new}

    with letters.write(tmp_path) as store:
        asked = {"recipe": letters.RECIPE, "round": "r001", "split": "train"}
        store.append("round_prompts", [{**asked, "prompt_id": letters.prompt_id(i)} for i in range(letters.PROMPTS)])
        change("INSERT INTO prompts SELECT * REPLACE ('other' AS recipe, 'other' AS content) FROM prompts")  # the same
        judge.store, judge.change, runs = store, change, itertools.count()
        yield judge


def test_a_candidate_is_judged_once_by_each_version_of_a_scorer_and_content_of_its_prompt(judge, monkeypatch):
    assert judge() == (80, {"answer": 80, "combined": 80})  # those that are there are by other versions
    with monkeypatch.context() as patch:
        patch.setattr(scoring, "judges", lambda *_: pytest.fail("scorers were loaded for nothing"))
        assert judge() == (0, {})
    assert judge({**EXACT, "match": "numeric"}) == (80, {"answer": 80, "combined": 80})
    assert judge({**EXACT, "weight": 2.0}) == (80, {"combined": 80})
    gate = {**EXACT, "minimum": 0.5}
    assert judge(gate) == judge(gate, combine="all") == (80, {"combined": 80})
    assert judge(EXACT, {**EXACT, "name": "again"}) == (80, {"again": 80, "combined": 80})

    corrected = "UPDATE prompts SET content = 'corrected', reference = 'answer 3 1' WHERE recipe = ? AND prompt_id = ?"
    judge.change(corrected, letters.RECIPE, letters.prompt_id(3))
    assert judge() == (4, {"answer": 4, "combined": 4})
    right = judge.store.query("SELECT candidate_id FROM scores WHERE content = 'corrected' AND value = 1 ORDER BY ALL")
    assert right == [{"candidate_id": letters.candidate_id("r001", 3, 1)}] * 2


def test_scorers_see_of_a_candidate_what_its_row_has():
    turns = [{"role": "user", "content": "2 + 2"}]
    row = {"prompt": "2 + 2", "text": "4", "reference": "four", "fields": '{"level": 1}', "log_p": -1.5}
    ended = score.judged_sample({**row, "messages": None, "finish_reason": "stop"})
    assert ended == Sample("2 + 2", "4", "four", {"level": 1}, -1.5, None, True)
    cut = score.judged_sample({**row, "messages": json.dumps(turns), "finish_reason": "length"})
    assert cut == Sample("2 + 2", "4", "four", {"level": 1}, -1.5, turns, False)


def test_what_was_erased_is_judged_no_more(judge):
    assert judge()[0] == 80
    judge.change("UPDATE prompts SET content = 'another'")
    judge.change("UPDATE candidates SET text = NULL WHERE candidate_id = ?", letters.candidate_id("r001", 5, 0))
    judge.change("UPDATE prompts SET text = NULL WHERE prompt_id = ?", letters.prompt_id(4))
    assert judge() == (75, {"answer": 75, "combined": 75})


@pytest.mark.parametrize(("seconds", "shown"), [(0, [32, 64, 80]), (1000, [80])])
def test_scores_are_kept_as_they_are_made(judge, monkeypatch, seconds, shown):
    monkeypatch.setattr(score, "BATCH", 32)
    monkeypatch.setattr(score, "KEPT_AFTER", seconds)
    told = []

    def show(done, *words):
        told.append((done, *words))
        kept = judge.store.value("SELECT count(DISTINCT candidate_id) FROM scores WHERE dagster_run_id = 'run 0'")
        assert kept == done

    assert judge(show=show) == (80, {"answer": 80, "combined": 80})
    assert told == [(done, "", 80) for done in shown]
