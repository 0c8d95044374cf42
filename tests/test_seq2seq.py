"""Encoder-decoders: their draws, likelihoods and gradients, and a real T5 made, trained, saved and drawn from."""

import json
import logging
import math
import string

import numpy as np
import pytest
import scipy.stats
import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from rsft_pipeline import bootstrap, lineage, models, prompts, tasks, training
from rsft_pipeline.decoding import Draw, Shape, cache, decode, shared_encoder, shared_prefix
from rsft_pipeline.decoding.attention import attention_of
from rsft_pipeline.decoding.memory import state_bytes
from rsft_pipeline.decoding.plain import draw as draw_plainly
from rsft_pipeline.devices import Device
from rsft_pipeline.models import ModelError, checkpoints, configuration
from rsft_pipeline.models.trainable import select_trainable
from rsft_pipeline.recipe.model import Bootstrap, Lora, Model
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.sampling import Sampling
from rsft_pipeline.recipe.training import Training
from rsft_pipeline.sampling import Asked, Request
from rsft_pipeline.tasks import causal, seq2seq, writing
from rsft_pipeline.training import Sample, TrainingError

CPU = Device("cpu", "float32")
VOCABULARY, START, EOS = 48, 0, 1
STOPS = frozenset({1, 2})
SPECIAL = {"vocab_size": VOCABULARY, "decoder_start_token_id": START, "pad_token_id": 0, "eos_token_id": EOS}
T5 = {
    **SPECIAL,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 1,
    "num_decoder_layers": 2,
    "num_heads": 4,
    "relative_attention_num_buckets": 8,
    "relative_attention_max_distance": 16,
}
UNSCALED = {**T5, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "initializer_factor": 0.4}
BART = {
    **SPECIAL,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "init_std": 0.3,
    "bos_token_id": None,
}
FAMILIES = {
    "t5": ("t5", T5),
    "t5_v1_1": ("t5", UNSCALED),
    "mt5": ("mt5", UNSCALED),
    "umt5": ("umt5", T5),
    **{kind: (kind, BART) for kind in ("bart", "mbart", "plbart", "marian", "pegasus", "blenderbot")},
}
SAMPLES = [
    Sample("a", [5, 6, EOS], [7, 8, EOS]),
    Sample("b", [9, EOS], [10, EOS]),
    Sample("c", [11, 12, 13, 14, EOS], [11, 12, 13, 14, 0, EOS]),  # the padding token, drawn
    Sample("d", [3, 4, 5, 6, 7, EOS], [8]),
]


def tiny(family: str = "t5", **settings):
    torch.manual_seed(0)
    kind, sizes = FAMILIES[family]
    config = transformers.AutoConfig.for_model(kind, **{**sizes, **settings})
    return transformers.AutoModelForSeq2SeqLM.from_config(config).eval()


def mixed_draws(number: int = 5, draws: int = 6) -> list[Draw]:
    """Draws of prompts of 1, 9, 4, ... tokens, not in the order of length."""
    generator = np.random.default_rng(7)
    lengths = [1, 9, 4, 17, 12][:number]
    ids = [tuple(int(i) for i in generator.integers(5, VOCABULARY, n)) for n in lengths]
    return [Draw(prompt, 1000 * i + draw) for draw in range(draws) for i, prompt in enumerate(ids)]


def shape(temperature=1.0, top_p=1.0, top_k=None, max_tokens=20, stop_ids=STOPS) -> Shape:
    return Shape(temperature, top_p, top_k, max_tokens, stop_ids)


def plain(model, draws, shape):
    with torch.inference_mode():
        return [drawn for _, drawn in sorted(draw_plainly(model, list(enumerate(draws)), shape, 0, len(draws)))]


def teacher_forced(model, prompt_ids, token_ids) -> float:
    """Log-probability of a completion by one forward pass, alone in its batch."""
    read = torch.tensor([[START, *token_ids[:-1]]])
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([list(prompt_ids)]), decoder_input_ids=read).logits[0].double()
    return logits.log_softmax(-1)[range(len(token_ids)), token_ids].sum().item()


# --- draws ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_log_p_is_that_of_a_plain_forward_pass_and_tokens_are_the_plain_loops(family, monkeypatch, caplog):
    monkeypatch.setitem(cache.BLOCK, "cpu", 4)  # suffixes of several blocks
    model, draws, settings = tiny(family), mixed_draws(), shape()
    made = decode(model, draws, settings, pad_id=0, at_once=7)

    assert not caplog.records  # the plain loop would have left a note
    assert len({len(drawn.token_ids) for drawn in made}) > 3  # rows of different age shared a batch
    assert {drawn.stopped for drawn in made} == {True, False}
    for draw, drawn, reference in zip(draws, made, plain(model, draws, settings), strict=True):
        assert drawn.token_ids == reference.token_ids
        assert drawn.stopped == reference.stopped == (drawn.token_ids[-1] in STOPS)
        assert drawn.log_p == pytest.approx(teacher_forced(model, draw.prompt_ids, drawn.token_ids), abs=1e-4)
        assert drawn.log_q == drawn.log_p


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_a_draw_does_not_depend_on_its_batch_mates(family):
    model, draws, settings = tiny(family), mixed_draws(), shape()
    together = decode(model, draws, settings, pad_id=0, at_once=11)
    for i in (0, 8, 29):
        (alone,) = decode(model, [draws[i]], settings, pad_id=0)
        assert alone.token_ids == together[i].token_ids
        assert alone.log_p == pytest.approx(together[i].log_p, abs=5e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_steps_taken_before_the_host_looks_again_change_nothing(family, monkeypatch):
    """As on a GPU: rows that have ended go on unnoticed for some steps."""
    model, draws, settings = tiny(family), mixed_draws(), shape()
    expected = decode(model, draws, settings, pad_id=0, at_once=7)
    monkeypatch.setitem(shared_prefix.STRIDE, "cpu", 8)
    made = decode(model, draws, settings, pad_id=0, at_once=7)
    assert [drawn.token_ids for drawn in made] == [drawn.token_ids for drawn in expected]
    assert [d.log_p for d in made] == pytest.approx([d.log_p for d in expected], abs=5e-5)


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_draws_that_have_gone_the_same_way_are_computed_once(family, monkeypatch):
    monkeypatch.setitem(cache.BLOCK, "cpu", 4)
    model, draws, settings = tiny(family), mixed_draws(draws=24), shape(temperature=0.5)
    expected = plain(model, draws, settings)
    decode(model, draws[:1], settings, pad_id=0)  # the trial that a model stands once
    computed: list[int] = []
    before = shared_encoder.Loop._logits
    monkeypatch.setattr(
        shared_encoder.Loop, "_logits", lambda self, rows: (computed.append(rows), before(self, rows))[1]
    )
    made = decode(model, draws, settings, pad_id=0)
    assert [one.token_ids for one in made] == [one.token_ids for one in expected]
    assert [one.log_q for one in made] == pytest.approx([one.log_q for one in expected], abs=1e-4)
    paths = [(draw.prompt_ids, *one.token_ids) for draw, one in zip(draws, made, strict=True)]
    ways = len({path[:end] for path in paths for end in range(2, len(path))})  # the first token comes with the prompt
    assert sum(computed) == ways < 0.9 * sum(len(path) - 2 for path in paths)


def test_one_prompt_with_more_draws_than_rows_is_encoded_once():
    model, draws = tiny(), [Draw((9, 8, 7), seed) for seed in range(40)]
    decode(model, draws[:1], shape(), pad_id=0)  # the trial that a model stands once
    encoded = []
    model.encoder.register_forward_hook(lambda module, inputs, output: encoded.append(output[0].shape))
    made = decode(model, draws, shape(), pad_id=0, at_once=6)
    assert encoded == [(1, 3, 32)]
    assert [drawn.token_ids for drawn in made] == [drawn.token_ids for drawn in plain(model, draws, shape())]


@pytest.mark.parametrize("max_tokens", [1, 2])
def test_the_first_tokens_need_few_steps(max_tokens):
    model, draws = tiny(), mixed_draws()
    made = decode(model, draws, shape(max_tokens=max_tokens), pad_id=0, at_once=4)
    assert max(len(drawn.token_ids) for drawn in made) == max_tokens
    assert [d.token_ids for d in made] == [d.token_ids for d in plain(model, draws, shape(max_tokens=max_tokens))]


@pytest.mark.parametrize("family", ["t5", "bart"])
def test_the_model_is_its_own_again_afterwards(family):
    model = tiny(family)
    before = model.config._attn_implementation
    decode(model, mixed_draws(2, 2), shape(), pad_id=0)
    for part in (model, model.get_encoder(), model.get_decoder()):
        assert part.config._attn_implementation == before
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(1.0, 1.0, None), (0.6, 1.0, None), (1.0, 0.7, None), (1.5, 0.8, 4)]
)
def test_draws_follow_the_enumerated_distribution(temperature, top_p, top_k):
    """All sequences of up to 3 tokens out of 6, one of which stops: chi-square of 3,000 draws of two prompts."""
    model = tiny(vocab_size=6, d_model=16, d_ff=16, num_decoder_layers=1, num_heads=2, initializer_factor=0.7)
    settings = Shape(temperature, top_p, top_k, 3, frozenset({1}))
    for prompt in ((3,), (2, 5, 2, 4)):
        made = decode(model, [Draw(prompt, seed) for seed in range(3000)], settings, pad_id=0, at_once=1500)
        probability = enumerate_sequences(model, prompt, settings)
        assert sum(probability.values()) == pytest.approx(1.0, abs=1e-5)
        seen = dict.fromkeys(probability, 0)
        for drawn in made:
            sequence = tuple(drawn.token_ids)
            assert drawn.log_q == pytest.approx(math.log(probability[sequence]), abs=1e-4)
            seen[sequence] += 1
        expected, counts = np.array([3000 * p for p in probability.values()]), np.array(list(seen.values()))
        rare = expected < 5  # lumped together, as the chi-square approximation needs
        wanted = np.append(expected[~rare], expected[rare].sum() or [])
        observed = np.append(counts[~rare], counts[rare].sum() if rare.any() else [])
        assert len(observed) >= 5
        assert scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def enumerate_sequences(model, prompt: tuple[int, ...], settings: Shape) -> dict[tuple[int, ...], float]:
    """Probability of each sequence, by Transformers' own logits processors and plain forward passes."""
    warpers = [transformers.TemperatureLogitsWarper(settings.temperature)]
    warpers += [transformers.TopKLogitsWarper(settings.top_k)] if settings.top_k else []
    warpers += [transformers.TopPLogitsWarper(settings.top_p)] if settings.top_p < 1.0 else []
    found: dict[tuple[int, ...], float] = {}
    open_ends: dict[tuple[int, ...], float] = {(): 1.0}
    while open_ends:
        done, probability = open_ends.popitem()
        with torch.inference_mode():
            read = torch.tensor([[START, *done]])
            scores = model(input_ids=torch.tensor([prompt]), decoder_input_ids=read).logits[:, -1].double()
        for warper in warpers:
            scores = warper(None, scores)
        for token, p in enumerate(scores.softmax(-1)[0].tolist()):
            sequence = (*done, token)
            if p > 0:
                ends = token in settings.stop_ids or len(sequence) == settings.max_tokens
                (found if ends else open_ends)[sequence] = probability * p
    return found


def test_out_of_memory_halves_the_rows_and_loses_no_draw_made(monkeypatch, caplog):
    model, draws, settings = tiny(), mixed_draws(5, 8), shape()
    expected = decode(model, draws, settings, pad_id=0, at_once=40)
    steps: list[int] = []
    before = shared_encoder.Loop._logits

    def logits(self, rows):
        steps.append(rows)
        if rows > 10 and len(steps) > 6:
            raise torch.OutOfMemoryError("the test's device is full")
        return before(self, rows)

    monkeypatch.setattr(shared_encoder.Loop, "_logits", logits)
    made = decode(model, draws, settings, pad_id=0, at_once=40)
    assert [drawn.token_ids for drawn in made] == [drawn.token_ids for drawn in expected]
    assert max(steps[8:]) <= 10
    assert "out of memory" in caplog.text


@pytest.mark.parametrize(("family", "layers"), [("t5", 2), ("bart", 2)])
def test_state_bytes_count_what_is_allocated(family, layers):
    model, draws, settings = tiny(family), mixed_draws(5, 6), shape(max_tokens=32)
    # 2 (keys, values) · the decoder's layers · 4 heads · dimension 8 · 4 bytes
    assert state_bytes(model, 1) == 2 * layers * 4 * 8 * 4
    loop = shared_encoder.Loop(model, list(enumerate(draws)), settings, 0, 30)
    with (
        torch.inference_mode(),
        attention_of(model, shared_encoder.NAME),
        shared_encoder._own_positions(model),
    ):
        assert len(list(loop.run())) == 30
    suffixes = sum(layer.keys.nbytes + layer.values.nbytes for layer in loop.cache.layers)
    prefixes = sum(layer.prefix_keys.nbytes + layer.prefix_values.nbytes for layer in loop.cache.layers)
    assert suffixes == 30 * state_bytes(model, 32)  # the start token, and all drawn but the last
    assert prefixes == 5 * state_bytes(model, 32)  # 17 tokens and the start, in whole vectors of 16


def test_a_family_that_was_not_compared_is_drawn_from_plainly_with_a_note(caplog):
    torch.manual_seed(0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(transformers.M2M100Config(**{**BART, "pad_token_id": 3}))
    draws, settings = mixed_draws(3, 3), shape(max_tokens=5)
    with caplog.at_level(logging.WARNING, logger="rsft_pipeline.decoding"):
        made = decode(model.eval(), draws, settings, pad_id=3, at_once=4)
    assert "compared with no m2m_100's" in caplog.text
    for draw, drawn in zip(draws, made, strict=True):
        assert drawn.log_p == pytest.approx(teacher_forced(model, draw.prompt_ids, drawn.token_ids), abs=1e-4)


def test_a_model_that_says_not_what_it_begins_with_is_refused():
    model = tiny("t5", decoder_start_token_id=None)
    with pytest.raises(ModelError, match="no `decoder_start_token_id`"):
        decode(model, mixed_draws(1, 1), shape(), pad_id=0)
    model.generation_config.decoder_start_token_id = 5
    assert configuration.start_id(model) == 5


# --- likelihood -------------------------------------------------------------------------------


def token_by_token(model, sample: Sample) -> float:
    """Log-probability of a completion: plain calls, unpadded, one token a call, the cache carried along."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            prompt = torch.tensor([sample.prompt_ids])
            encoding = model.get_encoder()(prompt)
            cache, feed = None, [START]

            def call(token):
                return model(
                    encoder_outputs=encoding,
                    decoder_input_ids=torch.tensor([[token]]),
                    past_key_values=cache,
                    use_cache=True,
                )
        else:
            cache, feed = None, list(sample.prompt_ids)

            def call(token):
                return model(input_ids=torch.tensor([[token]]), past_key_values=cache, use_cache=True)

        total = 0.0
        for token in feed:
            out = call(token)
            cache = out.past_key_values
        for token in sample.completion_ids:
            total += out.logits[0, -1].double().log_softmax(-1)[token].item()
            out = call(token)
            cache = out.past_key_values
    return total


def padded_left(batch: dict) -> dict:
    """The same batch with the prompts' padding on their left."""
    moved = {name: tensor.clone() for name, tensor in batch.items()}
    for row, mask in enumerate(batch["attention_mask"]):
        for name in ("input_ids", "attention_mask"):
            moved[name][row] = batch[name][row].roll(int((mask == 0).sum()))
    return moved


@pytest.mark.parametrize("family", ["t5", "t5_v1_1", "umt5", "bart", "marian"])
def test_a_sequences_log_probability_is_its_tokens_one_by_one(family):
    model = tiny(family)
    expected = [token_by_token(model, sample) for sample in SAMPLES]
    assert seq2seq.log_probabilities(model, SAMPLES, pad_id=0, batch_size=3) == pytest.approx(expected, abs=1e-4)
    for number in range(4):
        (alone,) = seq2seq.log_probabilities(model, [SAMPLES[number]], pad_id=0)
        assert alone == pytest.approx(expected[number], abs=1e-4)
    if "t5" in family:  # whose positions are relative
        with torch.no_grad():
            losses = seq2seq.token_losses(model, padded_left(seq2seq.collate(SAMPLES, pad_id=0)))
        assert (-losses).tolist() == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_a_causal_sequences_log_probability_is_its_tokens_one_by_one(kind):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "initializer_range": 0.3}
    more = {} if kind == "gpt2" else {"intermediate_size": 32, "num_key_value_heads": 1}
    config = transformers.AutoConfig.for_model(kind, vocab_size=VOCABULARY, **sizes, **more)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    expected = [token_by_token(model, sample) for sample in SAMPLES]
    assert causal.log_probabilities(model, SAMPLES, pad_id=0, batch_size=3) == pytest.approx(expected, abs=1e-4)
    draws = mixed_draws(5, 2)  # whose prompts are padded on the left where they are read
    for drawn in (decode(model, draws, shape(), pad_id=0), plain(model, draws, shape())):
        one_by_one = [
            token_by_token(model, Sample("", r.prompt_ids, d.token_ids)) for r, d in zip(draws, drawn, strict=True)
        ]
        assert [one.log_p for one in drawn] == pytest.approx(one_by_one, abs=1e-4)


def test_a_batch_holds_what_was_drawn_and_never_the_start_token():
    batch = seq2seq.collate(SAMPLES[:2], pad_id=3)
    assert batch["input_ids"].tolist() == [[5, 6, EOS], [9, EOS, 3]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 8, EOS], [10, EOS, -100]]
    assert all(tensor.dtype == torch.int64 for tensor in batch.values())


def test_no_more_samples_are_rated_at_once_than_was_said():
    seen = []

    def collate(part, pad_id):
        seen.append(len(part))
        return seq2seq.collate(part, pad_id)

    found = writing.log_probabilities(collate, seq2seq.token_losses, tiny(), SAMPLES[:3], 0, batch_size=2)
    assert seen == [2, 1] and len(found) == 3
    assert writing.log_probabilities(collate, seq2seq.token_losses, tiny(), [], 0, batch_size=2) == []


# --- training ---------------------------------------------------------------------------------


def fit(model, samples, scratch, **settings):
    told = Training(**{"learning_rate": 1e-2, "batch_size": len(samples), **settings})
    where = {"scratch": scratch, "device": CPU, "pad_id": 0, "seed": 0, "start": "tiny"}
    return training.fit(model, samples, told, task=seq2seq, **where)


def gradients(samples, scratch) -> dict[str, torch.Tensor]:
    """What a step over the samples would change the weights by, before the optimiser."""
    model, seen = tiny(dropout_rate=0.0), {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    fit(model, samples, scratch, clip=1e9)
    return seen


def test_a_weight_scales_its_samples_gradient_exactly(tmp_path):
    whole = gradients([SAMPLES[0]], tmp_path)
    quarter = gradients([Sample("a", [5, 6, EOS], [7, 8, EOS], weight=0.25)], tmp_path)
    assert all(torch.equal(quarter[name], 0.25 * gradient) for name, gradient in whole.items())


def test_a_step_is_the_hand_weighted_loss_over_all_its_completion_tokens(tmp_path):
    weights = [0.5, 3.0, 0.0, 1.0]
    samples = [Sample(s.candidate_id, s.prompt_ids, s.completion_ids, w) for s, w in zip(SAMPLES, weights, strict=True)]
    made, model = gradients(samples, tmp_path), tiny(dropout_rate=0.0)
    for sample in samples:  # one at a time, and nothing padded
        read = torch.tensor([[START, *sample.completion_ids[:-1]]])
        logits = model(input_ids=torch.tensor([sample.prompt_ids]), decoder_input_ids=read).logits[0]
        picked = logits.log_softmax(-1)[range(len(sample.completion_ids)), sample.completion_ids]
        (-sample.weight * picked.sum() / 12).backward()  # of 3 + 2 + 6 + 1 tokens
    assert set(made) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(made[name], parameter.grad, atol=1e-6, rtol=1e-4)


def test_each_side_has_the_context_for_itself(tmp_path):
    model = tiny("bart")
    fit(model, [Sample("fits", [5] * 64, [6] * 64)], tmp_path)
    with pytest.raises(TrainingError, match="long has 65 tokens; the model's context is 64"):
        fit(model, [Sample("long", [5] * 65, [6])], tmp_path)
    fit(tiny(), [Sample("unbounded", [5] * 300, [6] * 300)], tmp_path)
    model.save_pretrained(tmp_path / "bart")
    tiny().save_pretrained(tmp_path / "t5")
    assert [configuration.context_length(tmp_path / name) for name in ("bart", "t5")] == [64, None]


@pytest.mark.parametrize(
    ("family", "settings", "expected"),
    [
        ("t5", {}, ("decoder.block.1.", "decoder.final_layer_norm.")),
        ("bart", {}, ("model.decoder.layers.1.",)),
        ("mbart", {"tie_word_embeddings": False}, ("model.decoder.layers.1.", "model.decoder.layer_norm.", "lm_head.")),
    ],
)
def test_the_last_layers_are_the_decoders(family, settings, expected):
    model, trainable, total = select_trainable(tiny(family, **settings), Model(source="-", train="last_layers"))
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name, _ in model.named_parameters() if name.startswith(expected)}
    assert 0 < trainable < total
    with pytest.raises(ModelError, match="has 2 transformer blocks"):
        select_trainable(tiny(family), Model(source="-", train="last_layers", last_layers=3))


def test_a_known_text_is_rated_as_what_the_model_writes_itself_where_it_begins_with_a_token_of_its_own():
    """BART learned its texts between <s> and </s>, and starts its decoder from </s>."""
    words = Tokenizer(WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, **{w: i + 3 for i, w in enumerate("abcdef")}}, "a"))
    words.pre_tokenizer = Whitespace()
    words.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    ends = {"bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2}
    model = tiny("bart", **ends, dropout=0.0, init_std=0.02)
    model.generation_config.forced_bos_token_id = 0  # as its generation_config.json says
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    read, labels = (tokenizer([text], return_tensors="pt")["input_ids"] for text in ("a b", "c d e"))
    for _ in range(150):
        model(input_ids=read, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    asked = Asked("p", tuple(read[0].tolist()), "c d e")
    (drawn,) = seq2seq.draw(model, tokenizer, [Request("c", asked, 0, 1)], Sampling(max_tokens=8))
    (known,) = seq2seq.completion_ids(model, tokenizer, ["c d e"])
    assert (drawn.text, drawn.token_ids) == ("c d e", known)
    (rated,) = seq2seq.log_probabilities(model, [Sample("c", list(asked.prompt_ids), known)], 1)
    assert rated == pytest.approx(drawn.log_p, abs=1e-4) and rated > -0.5


# --- a model of our own -----------------------------------------------------------------------

BOOTSTRAP = {"model_type": "t5", "d_model": 48, "d_kv": 16, "d_ff": 64, "num_layers": 2, "num_heads": 2}


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A two-layer T5 warmed up to copy a letter: its recipe and checkpoint."""
    folder = tmp_path_factory.mktemp("copy")
    rows = [{"prompt": f"{letter}=", "completion": letter * 2} for letter in string.ascii_lowercase]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"config": {**BOOTSTRAP, "dropout_rate": 0.0}, "corpus": "corpus.jsonl", "steps": 80}
    tree = {
        "description": "copy a letter",
        "task": "seq2seq",
        "model": {"source": "bootstrap", "bootstrap": {**settings, "batch_size": 16, "learning_rate": 0.01}},
        "prompts": {"source": "corpus.jsonl", "template": "{prompt}", "eval_fraction": 0.2},
        "sampling": {"temperature": 0.5, "max_tokens": 6},
        "scoring": {"scorers": [{"kind": "length", "at_most": 3}]},
        "acceptance": {"rule": "top_k", "k": 1},
    }
    (folder / "copy_letters.yaml").write_text(json.dumps(tree))
    told = load(folder / "copy_letters.yaml")
    return told, models.base(told, folder)


def loaded(checkpoint, train=False):
    return models.load(checkpoint.path, CPU, train=train, task="seq2seq"), models.tokenizer(checkpoint.path)


def test_a_bootstrapped_t5_learns_to_copy_and_is_drawn_from(made):
    told, checkpoint = made
    model, tokenizer = loaded(checkpoint)
    assert configuration.start_id(model) == tokenizer.pad_token_id == model.generation_config.decoder_start_token_id
    known = [a for a in string.ascii_lowercase if not lineage.in_eval_split(lineage.question([f"{a}="]), 0.2)]
    assert 15 < len(known) < 26
    asked = [Asked(a, tuple(prompts.encode(tokenizer, f"{a}=", False, "seq2seq")), a * 2) for a in known]
    assert all(prompt.prompt_ids[-1] == tokenizer.eos_token_id for prompt in asked)
    requests = [Request(f"{prompt.prompt_id}{i}", prompt, i, i) for prompt in asked for i in range(4)]
    candidates = tasks.of(told).draw(model, tokenizer, requests, told.sampling)
    right = [one for one in candidates if one.text == one.request.asked.reference]
    assert len(right) >= 0.9 * len(candidates)
    assert all(one.finish_reason == "stop" and one.token_ids[-1] == tokenizer.eos_token_id for one in right)
    ended = seq2seq.completion_ids(model, tokenizer, [one.text for one in right])
    assert ended == [one.token_ids for one in right]
    samples = [Sample(one.text, one.request.prompt_ids, one.token_ids) for one in candidates]
    forced = seq2seq.log_probabilities(model, samples, tokenizer.pad_token_id)
    assert [one.log_p for one in candidates] == pytest.approx(forced, abs=1e-4)
    assert all(one.log_q > one.log_p for one in right)  # at half the temperature


@pytest.mark.parametrize("max_tokens", [2, 3])
def test_an_extra_stop_token_ends_a_completion_and_is_no_part_of_its_text(made, max_tokens):
    told, checkpoint = made
    model, tokenizer = loaded(checkpoint)
    asked = [Asked(a, tuple(prompts.encode(tokenizer, f"{a}=", False, "seq2seq")), None) for a in "abcdefgh"]
    stop, end = tokenizer.convert_tokens_to_ids("b"), tokenizer.eos_token_id
    sampling = told.sampling.model_copy(update={"stop": ["b"], "max_tokens": max_tokens, "batch_size": 5})
    rows = []
    model.get_decoder().register_forward_pre_hook(
        lambda module, args, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    drawn = seq2seq.draw(model, tokenizer, [Request(one.prompt_id, one, 0, 1) for one in asked], sampling)
    for one in drawn:
        *before, last = one.token_ids
        ended = last in (stop, end)
        assert not {stop, end} & set(before) and one.finish_reason == ("stop" if ended else "length")
        assert one.text == "".join(tokenizer.convert_ids_to_tokens(before if ended else one.token_ids))
    ends = {one.token_ids[-1] for one in drawn}
    assert stop in ends and (end in ends) == (max_tokens == 3)
    assert max(rows) == 5  # of 8 draws
    for text, number in (("ab", 2), ("", 0)):
        with pytest.raises(ValueError, match=f"sampling.stop: '{text}' is {number} tokens of this tokenizer"):
            seq2seq.draw(model, tokenizer, [], sampling.model_copy(update={"stop": [text]}))


def test_a_text_is_spelt_with_all_its_spaces_and_without_what_is_none_of_it():
    tokenizer = bootstrap._tokenizer(Bootstrap(config={}, corpus="-"), ["a , b . don ' t"])
    text = " a ,  b . don ' t "
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert writing.spelt(tokenizer, [[*ids, tokenizer.eos_token_id], []]) == [text, ""]


def test_a_prompt_keeps_the_end_that_an_encoder_expects(made):
    _, tokenizer = loaded(made[1])
    assert prompts.encode(tokenizer, "ab", False, "seq2seq") == [*prompts.encode(tokenizer, "ab", False), 2]
    assert prompts.encode(tokenizer, "", False, "seq2seq") == [tokenizer.eos_token_id]


@pytest.mark.parametrize("train", ["all", "lora", "last_layers"])
def test_it_is_trained_further_saved_and_drawn_from_again(made, tmp_path, train):
    model, tokenizer = loaded(made[1], train=True)
    model, trainable, total = select_trainable(model, Model(source="-", train=train, lora=Lora(rank=4)), seed=0)
    assert (trainable < total) == (train != "all")
    prompt = prompts.encode(tokenizer, "a=", False, "seq2seq")
    (completion,) = seq2seq.completion_ids(model, tokenizer, ["zzz"])
    sample = Sample("a", prompt, completion)
    (before,) = seq2seq.log_probabilities(model, [sample], tokenizer.pad_token_id)
    fit(model, [sample], tmp_path, epochs=10, learning_rate=0.02)
    (after,) = seq2seq.log_probabilities(model, [sample], tokenizer.pad_token_id)
    assert after > before + 2
    saved = checkpoints.save(model, tokenizer, tmp_path, {}, "")
    again, tokenizer = loaded(saved)
    assert seq2seq.log_probabilities(again, [sample], tokenizer.pad_token_id) == pytest.approx([after], abs=1e-4)
    (drawn,) = decode(again, [Draw(tuple(prompt), 1)], shape(stop_ids=frozenset({2})), tokenizer.pad_token_id)
    assert drawn.log_p == pytest.approx(
        seq2seq.log_probabilities(again, [Sample("", prompt, drawn.token_ids)], tokenizer.pad_token_id)[0], abs=1e-4
    )


def test_a_head_that_is_not_scaled_stays_so_when_saved(made, tmp_path):
    """T5 v1.1, whose configuration says it by a flag that Transformers then sets otherwise."""
    model, tokenizer = tiny("t5_v1_1"), models.tokenizer(made[1].path)
    expected = seq2seq.log_probabilities(model, SAMPLES, pad_id=0)
    again, _ = loaded(checkpoints.save(model, tokenizer, tmp_path, {}, ""))
    assert seq2seq.log_probabilities(again, SAMPLES, pad_id=0) == expected
    assert not again.config.scale_decoder_outputs
