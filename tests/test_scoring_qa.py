"""Scorers of question answering: SQuAD's metrics, smoothed references, and another model's log-probability."""

import math

import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    T5Config,
    T5ForConditionalGeneration,
)

from rsft_pipeline import scoring
from rsft_pipeline.devices import Device
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.scoring import Sample, knowledge, squad

CPU = Device("cpu", "float32")


@pytest.fixture
def judge(tmp_path):
    """The scores of samples by one scorer."""

    def judge(samples: list[Sample], reference: str | None = None, **scorer) -> list[float | None]:
        tree = {
            "description": "a trial",
            "model": {"source": "model"},
            "prompts": {"source": "rows.jsonl", "template": "{q}", "reference": reference},
            "scoring": {"scorers": [{"name": "it", **scorer}]},
            "acceptance": {"rule": "threshold", "threshold": 0},
        }
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump(tree))
        made = load(tmp_path / "trial.yaml")
        return scoring.score(scoring.judges(made, CPU), samples)["it"]

    return judge


# --- SQuAD --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "normalised"),
    [
        (" The  Norman\tConquest. ", "norman conquest"),
        ("an A-team, a theme; the", "ateam theme"),  # punctuation goes first, and only whole words are articles
        ("the-a", "thea"),
        ("«Üç» — 3½", "«üç» — 3½"),  # ASCII punctuation only
        ("The a an!", ""),
        ("", ""),
    ],
)
def test_squads_normalisation(text, normalised):
    assert squad.normalise(text) == normalised


@pytest.mark.parametrize(
    ("completion", "references", "exact", "f1"),
    [
        ("The Normans", ["normans!"], 1.0, 1.0),
        ("the old Normans", ["Normans"], 0.0, 2 / 3),  # precision 1/2, recall 1
        ("b b c", ["b b b d"], 0.0, 4 / 7),  # two tokens in common, each counted as often as in both
        ("in 1066", ["1066", "in the year 1066"], 0.0, 0.8),  # the best reference: 2/3 and 4/5
        ("", ["Paris"], 0.0, 0.0),
        ("the", ["Paris"], 0.0, 0.0),
        ("The", ["a", "Paris"], 1.0, 0.0),  # nothing left on either side: the same, yet no token in common
        ("Paris", [], None, None),
    ],
)
def test_squads_metrics(completion, references, exact, f1):
    assert squad.exact(completion, references) == exact
    assert squad.f1(completion, references) == (None if f1 is None else pytest.approx(f1, abs=1e-15))


@pytest.mark.parametrize(
    ("value", "answers"),
    [
        (None, []),
        ('a "b"\n', ['a "b"\n']),
        (["one", None, ["two"]], ["one", "two"]),
        ({"text": ["one", "two"], "answer_start": [0, 9]}, ["one", "two"]),
        (1.50, ["1.5"]),
        ({"größe": 2}, ['{"größe": 2}']),
    ],
)
def test_reference_answers_are_the_texts_of_a_value_and_anything_else_as_json(value, answers):
    assert squad.answers(value) == answers


def test_references_come_from_a_column_or_are_the_reference(judge):
    def sample(reference, **fields):
        return Sample("q", "the Seine", reference, fields, None)

    rows = [
        sample(None, answers=["Loire", "Seine"]),
        sample(None, answers="Seine"),
        sample(None, answers={"text": ["Loire", "Seine"], "answer_start": [0, 9]}),  # as the hub has SQuAD
        sample(None, answers=[{"text": "Seine", "answer_start": 9}]),  # as SQuAD's own file has it
        sample("Seine", answers=[]),
        sample("Seine", answers=None),
        sample("Seine", answers=["Loire"]),
    ]
    assert judge(rows, kind="squad", metric="exact", answers="answers") == [1.0, 1.0, 1.0, 1.0, None, None, 0.0]
    listed = [sample('["Loire", "Seine"]', rivers=["Loire", "Seine"]), sample("Seine"), sample(None)]
    assert judge(listed, kind="squad", metric="exact", reference="rivers") == [1.0, 1.0, None]
    with pytest.raises(scoring.ScoringError, match="no column 'answer'; there is 'answers'"):
        judge(rows, kind="squad", answers="answer")


# --- knowledge ----------------------------------------------------------------------------------


def test_knowledge_is_the_mixture_of_references_and_policy(judge):
    rows = [
        Sample("q", "The Seine.", None, {"refs": ["Seine", "Loire", "seine", "Rhine"]}, math.log(0.25)),
        Sample("q", "Thames", None, {"refs": ["Seine"]}, math.log(0.25)),
        Sample("q", "Seine", None, {"refs": ["Seine"]}, -2000.0),  # as a float, the policy's probability is 0
        Sample("q", "Thames", None, {"refs": ["Seine"]}, -2000.0),
        Sample("q", "Seine", None, {"refs": []}, -1.0),
        Sample("q", "Seine", None, {"refs": ["Seine"]}, None),
    ]
    expected = [0.8 * 2 / 4 + 0.2 * 0.25, 0.2 * 0.25, 0.8]
    found = judge(rows, kind="knowledge", smoothing=0.2, answers="refs")
    assert found[:4] == pytest.approx([*map(math.log, expected), math.log(0.2) - 2000.0], abs=1e-12)
    assert found[4:] == [None, None]
    assert knowledge.log_probability("Seine", ["Seine"], -3.0, smoothing=1.0) == -3.0


def test_knowledge_adds_up_to_one_over_texts_that_are_all_spelt_differently():
    policy = {"one": 0.5, "two": 0.3, "three": 0.2}
    total = sum(
        math.exp(knowledge.log_probability(text, ["two", "three"], math.log(p), 0.1)) for text, p in policy.items()
    )
    assert total == pytest.approx(1.0, abs=1e-12)


# --- likelihood -----------------------------------------------------------------------------------

EOS, PAD = 0, 1


@pytest.fixture(scope="module")
def teachers(tmp_path_factory):
    """Small random models by kind, which read and write single characters and have a context of 24 tokens."""
    tokenizer = Tokenizer(models.WordLevel({"</s>": EOS} | {chr(i): i for i in range(1, 128)}, unk_token="</s>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    torch.manual_seed(0)
    llama = LlamaConfig(
        vocab_size=128, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=24, initializer_range=0.3, eos_token_id=EOS, bos_token_id=None,
    )  # fmt: skip
    t5 = T5Config(
        vocab_size=128, d_model=32, d_kv=16, d_ff=32, num_layers=2, num_heads=2, dropout_rate=0.0,
        eos_token_id=EOS, pad_token_id=PAD, decoder_start_token_id=PAD, initializer_factor=3.0,
    )  # fmt: skip
    found = {}
    for kind, model in {"causal": LlamaForCausalLM(llama), "seq2seq": T5ForConditionalGeneration(t5)}.items():
        found[kind] = tmp_path_factory.mktemp(kind)
        made = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token=chr(PAD))
        made.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}>"
        made.save_pretrained(found[kind])
        model.save_pretrained(found[kind])
    return found


def by_hand(kind: str, folder, prompt: str, completion: str, ended: bool = True) -> float:
    """The sum of one unpadded forward pass's log-probabilities, token by token."""
    written = [ord(c) for c in completion] + [EOS] * ended
    read = torch.tensor([[ord(c) for c in prompt]])
    with torch.inference_mode():
        if kind == "causal":
            model = LlamaForCausalLM.from_pretrained(folder).eval()
            logits = model(torch.cat([read, torch.tensor([written])], dim=1)).logits[0, len(prompt) - 1 : -1]
        else:
            model = T5ForConditionalGeneration.from_pretrained(folder).eval()
            logits = model(input_ids=read, decoder_input_ids=torch.tensor([[PAD, *written[:-1]]])).logits[0]
    return logits.log_softmax(-1)[torch.arange(len(written)), written].sum().item()


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_the_likelihood_of_each_completion_is_its_own_whatever_the_batch(judge, teachers, kind):
    asked = [("what is it?", "a river"), ("q", "b"), ("where", ""), ("two by two", "22"), ("cut", "short", False)]
    rows = [Sample(prompt, text, None, {}, None, ended=all(ended)) for prompt, text, *ended in asked]
    rows += [Sample("read by another template", "chat", None, {}, None, [{"role": "user", "content": "hi"}])]
    expected = [by_hand(kind, teachers[kind], *row) for row in asked]
    expected += [by_hand(kind, teachers[kind], "hi>", "chat")]

    found = judge(rows, kind="likelihood", source=str(teachers[kind]), batch_size=2)
    assert found == pytest.approx(expected, abs=1e-4)
    assert max(expected) - min(expected) > 5
    nothing = Sample("q", "", None, {}, None, ended=False)
    assert judge([nothing], kind="likelihood", source=str(teachers[kind])) == [None]


def test_a_likelihood_longer_than_the_models_context_is_not_judged(judge, teachers):
    rows = [Sample("x" * 16, "y" * 7, None, {}, None), Sample("x" * 17, "y" * 7, None, {}, None)]
    found = judge(rows, kind="likelihood", source=str(teachers["causal"]))
    assert found == [pytest.approx(by_hand("causal", teachers["causal"], "x" * 16, "y" * 7), abs=1e-4), None]


def test_a_model_for_likelihood_that_is_not_there_is_named_with_the_field(judge, tmp_path):
    with pytest.raises(scoring.ScoringError, match=r"scorer 'it': scoring.scorers.0.source is './none': there is no"):
        judge([], kind="likelihood", source="./none")
