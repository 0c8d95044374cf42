"""Scorers of dialogue: relevance, consistency and novelty, on hashed characters and on small real models."""

import importlib.metadata
import json
import shutil

import numpy as np
import pytest
import torch
import yaml
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from rsft_pipeline import scoring
from rsft_pipeline.devices import Device
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.rounds import Round
from rsft_pipeline.scoring import Sample, dialogue, embedding
from rsft_pipeline.steps import score
from rsft_pipeline.store import Store

CPU = Device("cpu", "float32")
CLS, SEP, PAD = 0, 1, 2


@pytest.fixture
def make(tmp_path):
    """A recipe in tmp_path with the given scorer, called `it`."""

    def make(messages: list[dict] | None = None, **scorer) -> Recipe:
        tree = {
            "description": "a trial",
            "model": {"source": "model"},
            "prompts": {"source": "rows.jsonl", **({"messages": messages} if messages else {"template": "{q}"})},
            "scoring": {"scorers": [{"name": "it", **scorer}]},
            "acceptance": {"rule": "threshold", "threshold": 0},
        }
        (tmp_path / "trial.yaml").write_text(yaml.safe_dump(tree))
        return load(tmp_path / "trial.yaml")

    return make


@pytest.fixture
def judge(make):
    """The scores of samples by one scorer."""

    def judge(samples: list[Sample], before: list[str] = (), **scorer) -> list[float | None]:
        return scoring.score(scoring.judges(make(**scorer), CPU, before), samples)["it"]

    return judge


def sample(reply: str, *turns: str, prompt: str = "") -> Sample:
    return Sample(prompt, reply, None, {"turns": list(turns)}, None)


@pytest.fixture(scope="module")
def tokenizer():
    """One token for each character, [CLS] … [SEP] around them as BERT has it, at most 16."""
    made = Tokenizer(
        models.WordLevel({"[CLS]": CLS, "[SEP]": SEP} | {chr(i): i for i in range(2, 128)}, unk_token="[CLS]")
    )
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    made.post_processor = processors.BertProcessing(("[SEP]", SEP), ("[CLS]", CLS))
    names = ["input_ids", "token_type_ids", "attention_mask"]
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token=chr(PAD),
        model_max_length=16,
        model_input_names=names,
    )


@pytest.fixture(scope="module")
def sizes():
    return {
        "vocab_size": 128, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 2, "max_position_embeddings": 16, "pad_token_id": PAD, "initializer_range": 0.3,
    }  # fmt: skip


# --- whose turns ------------------------------------------------------------------------------


def test_the_speakers_own_turns_are_every_second_back_or_the_assistants():
    assert dialogue.said("p", None, ["a", "b", "c", "d"]) == dialogue.Said(["a", "b", "c", "d"], ["a", "c"])
    assert dialogue.said("p", None, ["a", "b", "c"]).own == ["b"]
    assert dialogue.said("p", None, ["a"]).own == dialogue.said("p", None, []).own == []
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi."},
        {"role": "assistant", "content": "Hello."},
        {"role": "user", "content": "Well?"},
    ]
    assert dialogue.said("p", messages) == dialogue.Said(["Hi.", "Hello.", "Well?"], ["Hello."])
    assert dialogue.said("p", None) == dialogue.Said(["p"], [])
    with pytest.raises(ValueError, match="expected a list of turns, each a text; got 'a b'"):
        dialogue.said("p", None, "a b")


# --- relevance ----------------------------------------------------------------------------------


def test_hashed_relevance_is_the_cosine_of_shared_runs_of_characters(judge):
    # « abc » has the runs ␣ab abc bc␣ / ␣abc abc␣ / ␣abc␣: 6, of which « abd » shares ␣ab alone
    samples = [sample("abc", "abc"), sample("abd", "abc"), sample("xyz", "abc"), sample("ABC abc", "abc")]
    found = judge(
        [*samples, sample(" \n", "abc"), sample("abc", " ")], kind="relevance", model="hashing", turns="turns"
    )
    assert found[:4] == pytest.approx([1.0, 1 / 6, 0.0, 1.0], abs=1e-6)
    assert found[4:] == [None, None]
    assert judge([sample(" \n", "abc")] * 2, kind="relevance", model="hashing", turns="turns") == [None, None]
    # several turns are one text, a line each
    several = judge([sample("abc", "abc", "xyz")], kind="relevance", model="hashing", turns="turns")
    assert several == judge([sample("abc", prompt="abc\nxyz")], kind="relevance", model="hashing")
    assert 0.1 < several[0] < 0.9
    # without a column of turns: the messages, else the prompt
    chat = Sample(
        "[CLS]", "abc", None, {}, None, [{"role": "system", "content": "q"}, {"role": "user", "content": "abc"}]
    )
    plain = sample("abc", prompt="abc")
    assert judge([chat, plain], kind="relevance", model="hashing") == pytest.approx([1.0, 1.0], abs=1e-6)


@pytest.fixture(scope="module")
def sentences(tmp_path_factory, tokenizer, sizes):
    """A small random sentence-transformers model: BERT, mean of the tokens, length 1."""
    pytest.importorskip("sentence_transformers")
    folder = tmp_path_factory.mktemp("sentences")
    torch.manual_seed(0)
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    kinds = ["Transformer", "Pooling", "Normalize"]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"sentence_transformers.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (folder / "modules.json").write_text(json.dumps(modules))
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text(
        json.dumps({"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True})
    )
    return folder


def test_a_text_is_wholly_like_itself_also_by_a_model_in_half_precision(judge, sentences, tmp_path):
    shutil.copytree(sentences, tmp_path / "half")
    BertModel.from_pretrained(sentences).bfloat16().save_pretrained(tmp_path / "half")
    made = sample("abc", prompt="abc")
    assert judge([made], kind="relevance", model=str(tmp_path / "half")) == pytest.approx([1.0], abs=1e-6)


def test_relevance_is_the_cosine_of_mean_pooled_embeddings_whatever_the_batch(judge, sentences):
    model = BertModel.from_pretrained(sentences).eval()

    def embedded(text):  # one text alone; of one that is too long, the end
        ids = torch.tensor([[CLS, *map(ord, text[-14:]), SEP]])
        with torch.inference_mode():
            return model(input_ids=ids).last_hidden_state[0].mean(dim=0).numpy()

    def cosine(a, b):
        return float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))

    asked = [("who?", "me"), ("a", "abcdefghij"), ("who?", "you"), ("x" * 20 + "who?", "me"), ("hi", "hi")]
    expected = [cosine(embedded(context), embedded(reply)) for context, reply in asked]
    samples = [sample(reply, context) for context, reply in asked] + [sample("", "who?")]
    found = judge(samples, kind="relevance", model=str(sentences), turns="turns", batch_size=2)
    assert found[:-1] == pytest.approx(expected, abs=1e-5)
    assert found[-1] is None
    assert found[4] == pytest.approx(1.0, abs=1e-6)
    assert max(expected) - min(expected) > 0.1


def test_without_sentence_transformers_the_remedy_is_named(make, monkeypatch):
    def absent(name):
        raise importlib.metadata.PackageNotFoundError(name)

    made = make(kind="relevance")
    monkeypatch.setattr(embedding.importlib.metadata, "version", absent)
    for ask in (lambda: scoring.judges(made, CPU), lambda: scoring.version(made.scoring.scorers[0], made)):
        with pytest.raises(scoring.ScoringError, match=r"pip install 'rsft-pipeline\[embeddings\]'.*`model: hashing`"):
            ask()


# --- consistency --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "turn", "n", "share"),
    [
        ("I like green tea.", "I like green tea, you know.", 3, 1.0),
        ("I like green apples", "You said I LIKE GREEN tea!", 3, 1 / 2),
        ("I don’t know", "I don't know, really", 3, 1.0),
        ("I don’t", "Dont!", 1, 1 / 2),  # an apostrophe parts no word
        ("Yes.", "Yes, I do.", 3, 0.0),  # shorter than a run: only as a whole
        ("Yes.", "yes!", 3, 1.0),
        ("no no no no", "no no no", 3, 1.0),  # different runs: there is one
        ("one two three", "two", 3, 0.0),
        ("गूगल अच्छा है", "गीगल अच्छी है", 1, 1 / 3),  # words of vowel signs too
        ("I ❤\ufe0f tea_time!", "I tea time", 3, 1.0),
        ("one two", "two three", 1, 1 / 2),
        ("room 12", "room 13", 1, 1 / 2),
        ("cafe\u0301 noir", "caf\u00e9 noir", 2, 1.0),
    ],
)
def test_the_share_of_a_reply_that_repeats_a_turn(reply, turn, n, share):
    assert dialogue.repetition(reply, turn, n) == share


def test_consistency_looks_at_the_speakers_own_turns_only(judge, make):
    samples = [
        sample("I like green tea", "I like green cars", "I like green tea"),  # own: the first
        sample("I like green tea", "I like green tea", "oh"),
        sample("I like green tea", "I like green tea"),  # nothing said yet
        sample(" ", "I like green tea", "oh"),
        sample("?!", " ", "oh"),  # neither has a word, but a blank turn says nothing
    ]
    assert judge(samples, kind="consistency", turns="turns") == [0.5, 0.0, 1.0, None, 1.0]
    alone = make(kind="consistency")
    for ask in (lambda: scoring.judges(alone, CPU), lambda: scoring.version(alone.scoring.scorers[0], alone)):
        with pytest.raises(scoring.ScoringError, match="scorer 'it': whose turn was whose is not known: set `turns:`"):
            ask()
    chat = make([{"role": "user", "content": "{q}"}], kind="consistency")
    assert scoring.version(chat.scoring.scorers[0], chat)


def test_a_contradiction_counts_where_it_is_worse_than_the_repetition(judge, tokenizer, sizes, tmp_path):
    labels = {0: "ENTAILMENT", 1: "NEUTRAL", 2: "CONTRADICTION"}
    torch.manual_seed(0)
    BertForSequenceClassification(BertConfig(**sizes, id2label=labels)).save_pretrained(tmp_path / "nli")
    tokenizer.save_pretrained(tmp_path / "nli")
    model = BertForSequenceClassification.from_pretrained(tmp_path / "nli").eval()

    def contradiction(turn, reply):
        first, second = [CLS, *map(ord, turn), SEP], [*map(ord, reply), SEP]
        ids, kinds = torch.tensor([first + second]), torch.tensor([[0] * len(first) + [1] * len(second)])
        with torch.inference_mode():
            return model(input_ids=ids, token_type_ids=kinds).logits.softmax(-1)[0, 2].item()

    samples = [
        sample("no", "yes", "?", "maybe", "?"),
        sample("is", " ", "?", "was", "?"),
        sample("yes", "yes", "?"),  # repeated
        sample("no", "x" * 12, "?"),  # too long for the model
        sample("no"),
        sample("[SEP]", "yes", "?"),  # as text, not as the token
    ]
    found = judge(samples, kind="consistency", turns="turns", nli="nli", batch_size=2)
    worst = [max(contradiction("yes", "no"), contradiction("maybe", "no")), contradiction("was", "is")]
    assert found[:2] == pytest.approx([1 - p for p in worst], abs=1e-5)
    assert found[2:5] == [0.0, None, 1.0]
    assert found[5] == pytest.approx(1 - contradiction("yes", "[SEP]"), abs=1e-5)
    assert abs(worst[0] - worst[1]) > 0.005

    config = json.loads((tmp_path / "nli" / "config.json").read_text())
    config |= {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
    (tmp_path / "nli" / "config.json").write_text(json.dumps(config))
    with pytest.raises(scoring.ScoringError, match="has the labels a, b, c; expected one for contradiction"):
        judge(samples, kind="consistency", turns="turns", nli="nli")


# --- novelty --------------------------------------------------------------------------------------


def test_novelty_is_the_distance_from_the_nearest_text_accepted_before(judge, monkeypatch):
    monkeypatch.setattr(embedding, "BLOCK", (2, 3))  # several blocks on either side
    replies = [sample(text) for text in ("abc", "abd", "xyz", " ", "abc!")]
    before = ["no", "such", "words", "as", "these", "abc", "abc", " "]
    # « abc! » has 3 + 4 + … runs: ␣ab abc bc! c!␣ / ␣abc abc! bc!␣ / ␣abc! abc!␣: 9, and shares 3 of abc's 6
    expected = [0.0, 5 / 6, 1.0, 1 - 3 / (6 * 9) ** 0.5]
    found = judge(replies, before, kind="novelty", model="hashing")
    assert [f for f in found if f is not None] == pytest.approx(expected, abs=1e-6)
    assert found[3] is None
    assert judge(replies, [], kind="novelty", model="hashing") == [1.0, 1.0, 1.0, None, 1.0]
    assert judge([sample(" ")] * 2, before, kind="novelty", model="hashing") == [None, None]
    assert dialogue.Novelty(lambda texts: np.ones((len(texts), 1)), [" "])(["abc"]) == [1.0]  # a blank is nothing


def test_the_nearest_is_the_same_dense_and_sparse():
    texts = [f"{a} {b}" for a in ("one", "two", "three") for b in ("cat", "dog", "cow")]
    rows, others = embedding.hashing(texts), embedding.hashing(["one cat more", "two dogs", "nothing"])
    expected = (rows @ others.T).toarray().max(axis=1)
    assert embedding.nearest(rows, others) == pytest.approx(expected.tolist(), abs=1e-6)
    assert embedding.nearest(rows.toarray(), others.toarray()) == pytest.approx(expected.tolist(), abs=1e-6)


def test_a_round_is_judged_by_what_earlier_rounds_accepted_and_no_other(make, tmp_path):
    made = make(kind="novelty", model="hashing")
    texts = {"r000": ("abc", True), "r001": ("abc", True), "r002": ("abd", True), "r003": ("xyz", False)}
    texts["r004"] = ("xyz", True)
    with Store.at(tmp_path) as store:
        named = {"recipe": "trial"}
        asked = {"prompt_id": "p", "text": "q", "fields": "{}", "split": "train", "content": "c", "active": True}
        store.append("prompts", [{**named, **asked}])
        for key, (text, accepted) in texts.items():
            of = {**named, "round": key, "candidate_id": key}
            drawn = {"prompt_id": "p", "split": "train", "draw": 0, "text": text, "finish_reason": "stop"}
            store.append("candidates", [{**of, **drawn}])
            store.append("decisions", [{**of, "prompt_id": "p", "accepted": accepted}])
            # another recipe's accepted texts are not this one's
            store.append("candidates", [{**of, **drawn, "recipe": "other", "text": "xyz"}])
            store.append("decisions", [{**of, "recipe": "other", "prompt_id": "p", "accepted": True}])
        erased = {**named, "round": "r000", "candidate_id": "erased", "prompt_id": "p"}
        store.append("candidates", [erased])
        store.append("decisions", [{**erased, "accepted": True}])

        def judged(key: str) -> tuple[int, float, str]:
            round_ = Round(made, key, "policy", "base", "policy", "none")
            candidates = f"SELECT * FROM candidates WHERE recipe = $recipe AND candidate_id = '{key}'"
            how = {"device": CPU, "run_id": "run", "show": lambda *_: None}
            done = score.score(store, round_, candidates, named, **how)
            version = score.versions(store, round_)["it"]
            value = store.value("SELECT value FROM scores WHERE candidate_id = ? AND version = ?", [key, version])
            return done, value, version

        found = {key: judged(key) for key in texts}
        assert [found[key][1] for key in texts] == pytest.approx([1.0, 0.0, 5 / 6, 1.0, 1.0], abs=1e-6)
        # the same set of texts, the same version: r001 accepted what r000 had
        versions = [found[key][2] for key in texts]
        assert versions[1] == versions[2]
        assert len(set(versions)) == 3
        assert judged("r002")[0] == 0

        # an earlier round decided otherwise: another version, and the candidate is judged again
        store.replace("decisions", [], recipe="trial", round="r001")
        store.replace("decisions", [], recipe="trial", round="r000")
        assert judged("r002")[:2] == (1, 1.0)


# --- versions -------------------------------------------------------------------------------------


def test_a_version_follows_the_model_the_column_and_what_was_accepted(make, sentences, tmp_path):
    def version(before=(), **scorer):
        made = make(**scorer)
        return scoring.version(made.scoring.scorers[0], made, before)

    hashed = version(kind="novelty", model="hashing")
    assert version(["a", "b"], kind="novelty", model="hashing") == version(["b", "a"], kind="novelty", model="hashing")
    relevant = {"kind": "relevance", "turns": "turns"}
    modelled = version(**relevant, model=str(sentences))
    pooling = sentences / "1_Pooling" / "config.json"
    was = pooling.read_text()
    try:
        pooling.write_text(json.dumps({"word_embedding_dimension": 32, "pooling_mode_cls_token": True}))
        pooled = version(**relevant, model=str(sentences))
    finally:
        pooling.write_text(was)
    versions = [hashed, version(["a"], kind="novelty", model="hashing"), modelled, pooled]
    versions += [version(**relevant, model="hashing"), version(kind="relevance", model="hashing")]
    versions += [version(kind="consistency", turns="turns"), version(kind="consistency", turns="turns", words=2)]
    assert len(set(versions)) == len(versions)
