"""Classification: one label as a completion, drawn, rated and trained on; heads; reports by class."""

import copy
import json
import logging
import math
import re
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sklearn.metrics import f1_score
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rsft_pipeline import bootstrap, classes, models, prompts
from rsft_pipeline.devices import Device
from rsft_pipeline.models import checkpoints
from rsft_pipeline.models.trainable import select_trainable
from rsft_pipeline.recipe.model import Bootstrap, Model
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.sampling import Sampling
from rsft_pipeline.sampling import Asked, Request
from rsft_pipeline.tasks import classification
from rsft_pipeline.training import Sample

CPU = Device("cpu", "float32")
LABELS = ["negative", "neutral", "positive"]
BERT = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
PROMPTS = [(1, 5, 6, 7, 8), (1, 9), (1, 5, 6), (1, 30, 31, 32, 33, 34, 35), (1, 4)]  # two of a length, far apart
PAD = 0


class Padding:
    """What `draw` reads of a tokenizer."""

    pad_token_id = PAD


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(1)
    config = AutoConfig.for_model("bert", **BERT, **models.head(LABELS), max_position_embeddings=32)
    made = AutoModelForSequenceClassification.from_config(config).eval()
    with torch.no_grad():
        made.classifier.weight *= 20  # a head that is sure of something
    return made


def logits(model, prompt) -> torch.Tensor:
    """A plain forward pass on one prompt alone, without padding."""
    with torch.no_grad():
        return model(torch.tensor([prompt])).logits[0].double()


def requests(each: int) -> list[Request]:
    return [
        Request(f"{i}-{draw}", Asked(str(i), prompt, None), draw, 1000 * i + draw)
        for i, prompt in enumerate(PROMPTS)
        for draw in range(each)
    ]


@pytest.mark.parametrize(
    ("cut", "kept"), [({"top_k": 2}, TopKLogitsWarper(2)), ({"top_p": 0.6}, TopPLogitsWarper(0.6))]
)
def test_a_draw_is_a_label_with_the_log_probabilities_of_a_plain_pass(model, cut, kept):
    for one in classification.draw(model, Padding, requests(20), Sampling(temperature=0.7, batch_size=3, **cut)):
        (label,) = one.token_ids
        of = logits(model, one.request.prompt_ids)
        assert (one.text, one.finish_reason) == (LABELS[label], "stop")
        assert one.log_p == pytest.approx(of.log_softmax(-1)[label].item(), abs=1e-5)
        assert one.log_q == pytest.approx(kept(None, of[None] / 0.7).log_softmax(-1)[0, label].item(), abs=1e-5)


@pytest.mark.parametrize(("weight", "temperature"), [(math.nan, 1.0), (1.0, 1e-40)])
def test_a_label_that_is_chosen_by_no_number_is_an_error(model, weight, temperature):
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.classifier.weight *= weight
    with pytest.raises(RuntimeError, match=r"the logits of BertForSequenceClassification .* are not numbers"):
        classification.draw(broken, Padding, requests(1), Sampling(temperature=temperature))


def test_labels_are_drawn_as_often_as_they_are_probable_and_greedily_only_the_first(model):
    drawn = classification.draw(model, Padding, requests(3000), Sampling())
    for prompt in PROMPTS:
        labels = [one.token_ids[0] for one in drawn if one.request.prompt_ids == prompt]
        p = logits(model, prompt).softmax(-1).numpy()
        frequency = np.bincount(labels, minlength=3) / len(labels)
        assert np.all(np.abs(frequency - p) < 4.5 * np.sqrt(p * (1 - p) / len(labels)) + 1e-9)
    for one in classification.draw(model, Padding, requests(1), Sampling(top_k=1)):
        assert one.token_ids == [logits(model, one.request.prompt_ids).argmax().item()]
        assert one.log_q == 0.0


def test_log_probabilities_and_losses_are_those_of_a_plain_pass_whatever_the_batch(model):
    samples = [Sample(f"{i}{j}", list(prompt), [j]) for i, prompt in enumerate(PROMPTS) for j in range(3)]
    expected = [logits(model, s.prompt_ids).log_softmax(-1)[s.completion_ids[0]].item() for s in samples]
    for size in (1, 5, 64):
        found = classification.log_probabilities(model, samples, PAD, batch_size=size)
        assert found == pytest.approx(expected, abs=1e-5)
    with torch.no_grad():
        losses = classification.token_losses(model, classification.collate(samples, PAD))
    assert losses.tolist() == pytest.approx([-e for e in expected], abs=1e-5)
    assert classification.log_probabilities(model, [], PAD) == []


def test_logits_of_half_precision_are_reckoned_with_in_float32(model):
    half = copy.deepcopy(model).bfloat16()
    for i, prompt in enumerate(PROMPTS):
        sample = Sample(str(i), list(prompt), [i % 3])
        with torch.no_grad():
            expected = half(torch.tensor([prompt])).logits[0].double().log_softmax(-1)[i % 3].item()
            loss = classification.token_losses(half, classification.collate([sample], PAD))
        assert classification.log_probabilities(half, [sample], PAD) == pytest.approx([expected], abs=1e-6)
        assert loss.dtype == torch.float32 and loss.item() == pytest.approx(-expected, abs=1e-6)


def test_an_answer_that_is_no_label_is_named_with_the_labels(model):
    assert classification.completion_ids(model, None, ["positive", "negative"]) == [[2], [0]]
    with pytest.raises(ValueError, match=r"'great' is no label of this model: `model.labels` are 'negative', 'neutr"):
        classification.completion_ids(model, None, ["positive", "great"])


@pytest.fixture
def encoder(tmp_path):
    """A folder with an encoder that has no head, as a pretrained one comes."""
    tokenizer = bootstrap._tokenizer(Bootstrap(config={}, corpus="-"), ["abcdefghij"])
    sizes = {**BERT, "vocab_size": len(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    torch.manual_seed(2)
    folder = tmp_path / "encoder"
    AutoModel.from_config(AutoConfig.for_model("bert", **sizes, max_position_embeddings=12)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def recipe(tmp_path, encoder):
    """Is the first letter one of the first five?"""
    (tmp_path / "letters.py").write_text(
        "def rows():\n"
        "    for a in 'abcdefghij':\n"
        "        for b in 'abcdefghij':\n"
        "            yield {'text': a + b, 'label': 'early' if a < 'f' else 'late'}\n"
        "def warm():\n"
        "    return ({'prompt': row['text'], 'completion': row['label']} for row in rows())\n"
    )
    tree = {
        "description": "Early letters.",
        "task": "classification",
        "model": {"source": str(encoder), "labels": ["early", "late"]},
        "prompts": {"source": "letters:rows", "template": "{text}", "reference": "label", "eval_fraction": 0.3},
        "sampling": {"source": "reference", "draws": 1, "max_tokens": 1},
        "scoring": {"scorers": [{"kind": "answer", "match": "exact"}]},
        "acceptance": {"rule": "loss", "k": 0.7},
    }
    (tmp_path / "early.yaml").write_text(yaml.safe_dump(tree))
    return lambda **changed: load(tmp_path / "early.yaml", changed)


def test_an_encoder_gets_a_head_for_the_labels_that_follows_from_the_seed(tmp_path, encoder, recipe):
    told, listener = [], logging.Handler()
    listener.emit = told.append
    logging.getLogger("transformers.modeling_utils").addHandler(listener)
    made = models.base(recipe(), tmp_path)
    logging.getLogger("transformers.modeling_utils").removeHandler(listener)
    assert told == []  # that a head is new alarms nobody
    before, after = load_file(encoder / "model.safetensors"), load_file(made.path / "model.safetensors")
    assert all(torch.equal(after[f"bert.{name}"], weights) for name, weights in before.items())
    assert after["classifier.weight"].shape == (2, 32)
    assert models.base(recipe(), tmp_path) == made
    assert models.base(recipe(), tmp_path / "elsewhere").digest == made.digest
    assert models.base(recipe(seed="1"), tmp_path).digest != made.digest


def test_weights_that_are_missing_are_not_made_up(tmp_path, encoder):
    for name, kind in (("causal", AutoModelForCausalLM), ("written", AutoModelForMaskedLM)):
        kind.from_config(AutoConfig.for_model("bert", **BERT, is_decoder=name == "causal")).save_pretrained(
            tmp_path / name
        )
    with pytest.raises(models.ModelError, match="has not all the weights of a BertForSequenceClassification"):
        models.load(encoder, CPU, task="classification")
    assert models.with_head(encoder, LABELS, 0).num_labels == 3
    weights = load_file(tmp_path / "causal" / "model.safetensors")
    del weights["bert.encoder.layer.0.output.dense.weight"]
    save_file(weights, tmp_path / "causal" / "model.safetensors", {"format": "pt"})
    for read in (lambda path: models.load(path, CPU), lambda path: models.with_head(path, LABELS, 0)):
        with pytest.raises(models.ModelError, match=r"1 are missing .*bert.encoder.layer.0.output.dense.weight"):
            read(tmp_path / "causal")


def test_out_of_memory_halves_the_texts_read_at_once(model, monkeypatch, caplog):
    seen, before = [], classification._logits

    def logits(model, batch):
        seen.append(len(batch["input_ids"]))
        if seen[-1] > 1:
            raise torch.OutOfMemoryError("the test's device is full")
        return before(model, batch)

    of_a_length = [
        replace(one, asked=replace(one.asked, prompt_ids=(1, 5, 6 + int(one.asked.prompt_id)))) for one in requests(2)
    ]
    expected = classification.draw(model, Padding, of_a_length, Sampling())
    monkeypatch.setattr(classification, "_logits", logits)
    made = classification.draw(model, Padding, of_a_length, Sampling())
    assert seen == [5, 2, *[1] * 5] and "going on with 1 texts at once" in caplog.text
    assert [one.text for one in made] == [one.text for one in expected]
    monkeypatch.setattr(classification, "_logits", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("full")))
    with pytest.raises(torch.OutOfMemoryError):
        classification.draw(model, Padding, requests(2), Sampling())


def test_texts_are_read_as_many_at_once_as_was_said_and_no_other_error_makes_them_fewer(model, monkeypatch):
    seen, before = [], classification._logits

    def logits(model, batch):
        seen.append(len(batch["input_ids"]))
        return before(model, batch)

    monkeypatch.setattr(classification, "_logits", logits)
    prompts_ = [(1, 5, 6 + i) for i in range(5)]
    asked = [Request(str(i), Asked(str(i), prompt, None), 0, i) for i, prompt in enumerate(prompts_)]
    samples = [Sample(str(i), list(prompt), [0]) for i, prompt in enumerate(prompts_)]
    classification.draw(model, Padding, asked, Sampling(batch_size=3))
    classification.log_probabilities(model, samples, PAD, batch_size=4)
    assert seen == [3, 2, 4, 1]

    def broken(model, batch):
        seen.append(len(batch["input_ids"]))
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(classification, "_logits", broken)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        classification.draw(model, Padding, asked, Sampling())
    assert seen[4:] == [5]


def test_a_head_of_the_same_labels_in_another_order_is_not_renamed(tmp_path, recipe):
    made = models.base(recipe(), tmp_path)  # early, late
    kept = models.with_head(made.path, ["Early", "Late"], 1)
    assert torch.equal(kept.classifier.weight, load_file(made.path / "model.safetensors")["classifier.weight"])
    said = r"`model.labels` are Late, Early, but the outputs of the model in .* are early, late, and its head is kept"
    with pytest.raises(models.ModelError, match=said):
        models.with_head(made.path, ["Late", "Early"], 1)


def test_an_encoder_is_warmed_up_on_labelled_text(tmp_path, recipe):
    warm_up = "{corpus: 'letters:warm', steps: 60, batch_size: 16, learning_rate: 0.005}"
    made = models.base(recipe(**{"model.warm_up": warm_up}), tmp_path)
    facts = checkpoints.read_meta(made.path)
    assert facts["rows"] + facts["rows_held_out"] == 100 and facts["rows_held_out"] > 0
    model, tokenizer = models.load(made.path, CPU, task="classification"), models.tokenizer(made.path)
    asked = [a + b for a in "abcdefghij" for b in "abcdefghij"]
    ids = [tuple(prompts.encode(tokenizer, text, False, "classification")) for text in asked]
    drawn = classification.draw(
        model, tokenizer, [Request(text, Asked(text, i, None), 0, 0) for text, i in zip(asked, ids, strict=True)],
        Sampling(top_k=1),
    )  # fmt: skip
    assert [one.text for one in drawn] == ["early" if text[0] < "f" else "late" for text in asked]


def test_a_warm_up_is_made_once_and_again_when_its_settings_change(tmp_path, recipe):
    def made(steps):
        seen = []
        warmed = recipe(**{"model.warm_up": f"{{corpus: 'letters:warm', steps: {steps}}}"})
        assert models.check(warmed) == 12
        return models.base(warmed, tmp_path, lambda *step: seen.append(step)), seen

    first, seen = made(3)
    facts = checkpoints.read_meta(first.path)
    assert seen[-1][:3] == (3, 3, facts["loss"]) and sum(tokens for *_, tokens in seen) == facts["tokens"]
    assert (facts["seed"], facts["steps"]) == (0, 3)
    assert made(3) == (first, [])
    again, seen = made(2)
    assert again.digest != first.digest and len(seen) == 2
    with pytest.raises(models.ModelError, match=r"the warm-up's `corpus`: there is no file"):
        models.check(recipe(**{"model.warm_up": "{corpus: nothing.jsonl}"}))


def test_a_prompt_that_is_too_long_is_cut_to_what_fits(tmp_path, recipe):
    tokenizer = models.tokenizer(models.base(recipe(), tmp_path).path)
    (tmp_path / "rows.csv").write_text("text,label\n" + "abcdefghij" * 3 + ",early\nab,late\n")
    source = {"prompts.source": "rows.csv"}
    kept = prompts.read(recipe(**source, **{"prompts.too_long": "cut"}), tokenizer, 12)
    assert [prompt.text for prompt in kept.prompts] == [
        "abcdefghija",
        "ab",
    ]  # <s> and eleven letters; a label takes none
    assert not kept.refused
    kept = prompts.read(recipe(**source, **{"prompts.too_long": "cut", "prompts.max_tokens": "4"}), tokenizer, 12)
    assert [prompt.text for prompt in kept.prompts] == ["abc", "ab"]
    kept = prompts.read(recipe(**source), tokenizer, 12)
    assert [(row.reason, row.detail) for row in kept.refused] == [("too long", "31 tokens, 12 fit")]


def answered(counts, labels, draws=1):
    """Prompts that were answered with one label each, `draws` times."""
    each = [(reference, {answer: draws}) for (reference, answer), n in counts.items() for _ in range(n)]
    return classes.Answers.of(each, labels)


def test_several_draws_of_a_prompt_make_no_interval_narrower():
    counts = {("a", "a"): 6, ("a", "b"): 2, ("b", "b"): 3, ("b", "a"): 1}
    once, often = answered(counts, "ab"), answered(counts, "ab", draws=8)
    assert [one.prompts for one in classes.classes(often, "ab")] == [8, 4]
    how = {"confidence": 0.95, "seed": 0}
    assert classes.macro_f1(often, **how) == classes.macro_f1(once, **how)
    many = {("a", "a"): 61, ("a", "b"): 23, ("b", "b"): 37, ("b", "a"): 13}  # of few the quantiles are the same
    backwards = dict(reversed(many.items()))
    assert classes.macro_f1(answered(backwards, "ab"), **how) == classes.macro_f1(answered(many, "ab"), **how)
    mixed = classes.Answers.of([("a", {"a": 3, "b": 1}), ("b", {"b": 4}), ("none", {"a": 4})], "ab")
    assert mixed.table.tolist() == [[3, 1], [0, 4]]
    assert classes.macro_f1(mixed, **how).n == 2


def test_a_reference_that_is_no_label_goes_to_quarantine(tmp_path, recipe):
    tokenizer = models.tokenizer(models.base(recipe(), tmp_path).path)
    (tmp_path / "rows.csv").write_text("text,label\nab,early\nfg,Late\n")
    read = prompts.read(recipe(**{"prompts.source": "rows.csv"}), tokenizer, 12)
    assert [prompt.text for prompt in read.prompts] == ["ab"]
    assert [(row.line, row.reason, row.detail) for row in read.refused] == [
        (3, "no label", "the reference is 'Late'; labels are ['early', 'late']")
    ]


@pytest.mark.parametrize(
    ("kind", "heads"),
    [
        ("bert", {"classifier", "pooler"}),
        ("distilbert", {"pre_classifier", "classifier"}),
        ("deberta-v2", {"pooler", "classifier"}),
        ("modernbert", {"head", "classifier"}),
        ("gpt2", {"score"}),
        ("bart", {"classification_head"}),
    ],
)
def test_a_head_that_may_be_new_trains_whole_beside_adapters_whatever_it_is_called(kind, heads):
    config = AutoConfig.for_model(kind, **BERT, num_labels=3, **({"pad_token_id": 0} if kind == "modernbert" else {}))
    if kind == "distilbert":
        config.dim, config.n_heads, config.n_layers, config.hidden_dim = 32, 2, 2, 64
    if kind == "bart":
        config.encoder_ffn_dim = config.decoder_ffn_dim = 32
    classifier = AutoModelForSequenceClassification.from_config(config)
    above = {
        name for name, _ in classifier.named_parameters() if heads & set(name.removeprefix("bert.").split(".")[:1])
    }
    adapted, _, _ = select_trainable(classifier, Model(source="-", train="lora"))
    whole = {name for name, p in adapted.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {re.sub(r"base_model\.model\.|modules_to_save\.default\.", "", name) for name in whole} == above != set()


def test_blocks_that_are_one_cannot_be_told_apart():
    albert = AutoModelForSequenceClassification.from_config(AutoConfig.for_model("albert", **BERT, embedding_size=8))
    with pytest.raises(models.ModelError, match="cannot be told apart: use `train: freeze`"):
        select_trainable(albert, Model(source="-", train="last_layers"))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_adapters_of_a_classifier_train_with_its_head_and_merge(kind):
    torch.manual_seed(0)
    config = AutoConfig.for_model(kind, **BERT, num_labels=3)
    config.dim, config.n_heads, config.n_layers, config.hidden_dim = 32, 2, 2, 64  # what DistilBERT calls them
    classifier = AutoModelForSequenceClassification.from_config(config)
    adapted, trainable, total = select_trainable(classifier, Model(source="-", train="lora"))
    assert 0 < trainable < total
    loss = classification.token_losses(adapted, classification.collate([Sample("a", list(PROMPTS[0]), [2])], PAD)).sum()
    loss.backward()
    assert any(p.grad is not None for name, p in adapted.named_parameters() if "classifier" in name)
    assert type(adapted.merge_and_unload()) is type(classifier)


@pytest.mark.parametrize("its_own", [None, 0])
def test_a_decoder_classifies_by_the_padding_token_of_its_tokenizer(tmp_path, its_own):
    tokenizer = bootstrap._tokenizer(Bootstrap(config={}, corpus="-"), ["abcdefghij"])
    tokenizer.pad_token = None
    sizes = {**BERT, "vocab_size": len(tokenizer), "num_key_value_heads": 2}
    config = AutoConfig.for_model("llama", **sizes, pad_token_id=its_own, num_labels=2)
    AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    padded = models.tokenizer(tmp_path)
    model = models.load(tmp_path, CPU, task="classification")
    requests = [Request(str(i), Asked(str(i), ids, None), 0, i) for i, ids in enumerate([(4, 5, 6), (7, 8)])]
    together = classification.draw(model, padded, requests, Sampling())
    alone = [classification.draw(model, padded, [one], Sampling())[0] for one in requests]
    assert [one.log_p for one in together] == pytest.approx([one.log_p for one in alone], abs=1e-5)
    samples = [Sample(one.request.candidate_id, one.request.prompt_ids, one.token_ids) for one in together]
    losses = classification.token_losses(model, classification.collate(samples, padded.pad_token_id))
    assert losses.tolist() == pytest.approx([-one.log_p for one in alone], abs=1e-5)
    assert models.with_head(tmp_path, ["a", "b"], 0).config.pad_token_id == padded.pad_token_id


def test_f1_of_a_table_is_what_the_formula_gives():
    counts = {("a", "a"): 6, ("a", "b"): 2, ("b", "b"): 3, ("b", "a"): 1, ("c", "a"): 4}
    found = answered(counts, "abc")
    a, b, c = classes.classes(found, "abc")
    assert (a.prompts, a.precision, a.recall) == (8, 6 / 11, 6 / 8)
    assert (b.precision, b.recall, b.f1) == (3 / 5, 3 / 4, 2 * 3 / 9)
    assert (c.prompts, c.precision, c.recall, c.f1) == (4, 0.0, 0.0, 0.0)
    found = classes.macro_f1(found, confidence=0.95, seed=0)
    assert found.value == pytest.approx((12 / 19 + 6 / 9) / 3)
    assert found.low < found.value < found.high and found.n == 16
    # An answer that is always right has no interval to be inside of.
    perfect = classes.macro_f1(answered({("a", "a"): 5, ("b", "b"): 5}, "ab"), confidence=0.95, seed=0)
    assert (perfect.value, perfect.low) == (1.0, 1.0) and not math.isnan(perfect.high)


@pytest.mark.parametrize(
    ("labels", "prompts", "draws"), [(2, 120, 1), (3, 300, 2), (77, 500, 1), (77, 500, 8)], ids=str
)
def test_the_interval_of_macro_f1_covers_the_truth_as_often_as_it_says(labels, prompts, draws):
    """A population that is known: each answer is right with chance 0.7, and else any label."""
    right, names = 0.7, [f"l{i}" for i in range(labels)]
    chance = np.random.default_rng(labels + draws)
    covered = 0
    for _ in range(60):
        asked = chance.integers(labels, size=prompts)
        said = np.where(
            chance.random((prompts, draws)) < right, asked[:, None], chance.integers(labels, size=(prompts, draws))
        )
        each = [(names[one], Counter(names[i] for i in its)) for one, its in zip(asked, said, strict=True)]
        found = classes.macro_f1(classes.Answers.of(each, names), confidence=0.9, seed=0)
        assert found.low <= found.value <= found.high
        covered += found.low <= right + (1 - right) / labels <= found.high  # F1 of every label
    assert covered >= 48  # of 60; with coverage 0.9 fewer come once in 150 times


def test_a_label_that_is_neither_a_reference_nor_an_answer_is_no_part_of_the_mean():
    counts = {("a", "a"): 6, ("a", "b"): 2, ("b", "b"): 3, ("b", "a"): 1}
    asked, said = zip(*(pair for pair, n in counts.items() for _ in range(n)), strict=True)
    how = {"confidence": 0.95, "seed": 0}
    found = classes.macro_f1(answered(counts, "abc"), **how)
    assert found.value == pytest.approx(f1_score(asked, said, average="macro"))
    assert found == classes.macro_f1(answered(counts, "ab"), **how)
    assert classes.classes(answered(counts, "abc"), "abc")[2] == classes.Class("c", 0, 0.0, 0.0, None)
    # Of a hundred prompts drawn again, more than a third of the times none is the only one of its label.
    rare = classes.macro_f1(answered({("a", "a"): 50, ("b", "b"): 49, ("c", "c"): 1}, "abc"), **how)
    assert (rare.value, rare.low, rare.high) == (1.0, 1.0, 1.0)


def test_what_mixes_in_its_padding_is_read_with_texts_of_the_same_length():
    torch.manual_seed(3)
    sizes = {name: BERT[name] for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size")}
    config = AutoConfig.for_model("fnet", **sizes, **models.head(LABELS), max_position_embeddings=32)
    mixing = AutoModelForSequenceClassification.from_config(config).eval()
    padded = classification._logits(mixing, classification._padded(PROMPTS, PAD))
    assert (padded[1] - logits(mixing, PROMPTS[1])).abs().max() > 1e-3
    expected = {prompt: logits(mixing, prompt).log_softmax(-1) for prompt in PROMPTS}
    for size in (1, 2, 64):
        for one in classification.draw(mixing, Padding, requests(2), Sampling(batch_size=size)):
            assert one.log_p == pytest.approx(expected[one.request.prompt_ids][one.token_ids[0]].item(), abs=1e-5)
    samples = [Sample(str(i), list(prompt), [1]) for i, prompt in enumerate(PROMPTS)]
    found = classification.log_probabilities(mixing, samples, PAD)
    assert found == pytest.approx([expected[prompt][1].item() for prompt in PROMPTS], abs=1e-5)


@pytest.mark.parametrize("kind", ["t5", "bart"])
def test_an_encoder_decoder_that_is_made_here_chooses_too(recipe, tmp_path, kind):
    sizes = {
        "t5": {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2},
        "bart": {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 32, "decoder_ffn_dim": 32,
                 "encoder_attention_heads": 2, "decoder_attention_heads": 2, "max_position_embeddings": 32},
    }[kind]  # fmt: skip
    made_here = {"config": {"model_type": kind, **sizes}, "corpus": "letters:warm", "steps": 3, "batch_size": 8}
    asked = recipe(model=json.dumps({"source": "bootstrap", "bootstrap": made_here, "labels": ["early", "late"]}))
    models.check(asked)
    base = models.base(asked, tmp_path / "home")
    model, tokenizer = models.load(base.path, CPU, task="classification"), models.tokenizer(base.path)
    ids = [tuple(prompts.encode(tokenizer, text, False, "classification")) for text in ("abc", "ab", "j")]
    drawn = classification.draw(
        model, tokenizer, [Request(str(i), Asked(str(i), one, None), 0, i) for i, one in enumerate(ids)], Sampling()
    )
    assert {one.text for one in drawn} <= {"early", "late"}


def test_what_is_prepared_is_kept_in_the_number_format_of_its_encoder(tmp_path, encoder, recipe):
    AutoModel.from_pretrained(encoder, dtype=torch.bfloat16).save_pretrained(encoder)
    made = models.base(recipe(), tmp_path / "home")
    assert {tensor.dtype for tensor in load_file(made.path / "model.safetensors").values()} == {torch.bfloat16}
