"""Decoding: draws follow the stated distribution, and neither batch mates nor a shared prefix change them."""

import gc
import itertools
import logging
import math
import weakref

import numpy as np
import pytest
import scipy.stats
import torch
import transformers

from rsft_pipeline import decoding, devices
from rsft_pipeline.decoding import Draw, Shape, attention, cache, cpu_attention, decode, shared_prefix
from rsft_pipeline.decoding.draws import choose, uniforms
from rsft_pipeline.decoding.memory import draws_at_once, state_bytes
from rsft_pipeline.decoding.plain import _batches
from rsft_pipeline.decoding.plain import draw as draw_plainly
from rsft_pipeline.models import configuration

VOCABULARY = 48
STOPS = frozenset({1, 2})

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES = {
    "llama": (transformers.LlamaConfig, {}),
    "smollm2": (transformers.LlamaConfig, {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen2_sliding": (
        transformers.Qwen2Config,
        {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    ),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "mistral": (transformers.MistralConfig, {"sliding_window": None}),
    "mistral_sliding": (transformers.MistralConfig, {"sliding_window": 6}),
    "phi3": (transformers.Phi3Config, {"pad_token_id": 0}),
    "gemma3": (
        transformers.Gemma3TextConfig,
        {"head_dim": 8, "sliding_window": 5, "num_hidden_layers": 7, "initializer_range": 0.1},
    ),
    "gpt_neox": (transformers.GPTNeoXConfig, {}),
    "mixtral": (transformers.MixtralConfig, {"num_local_experts": 4}),
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.5,
    "bos_token_id": None,
    "eos_token_id": None,
}
ALL = ["gpt2", *FAMILIES]


def tiny(family: str, seed: int = 0):
    torch.manual_seed(seed)
    if family == "gpt2":
        config = transformers.GPT2Config(**GPT2)
    else:
        kind, more = FAMILIES[family]
        config = kind(**{**SMALL, **more})
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def mixed_draws(prompts: int = 5, draws: int = 6) -> list[Draw]:
    """Draws of prompts of 1, 4, 9, ... tokens, not in the order of length."""
    generator = np.random.default_rng(7)
    lengths = [1, 9, 4, 17, 12][:prompts]
    ids = [tuple(int(i) for i in generator.integers(5, VOCABULARY, n)) for n in lengths]
    return [Draw(prompt, 1000 * i + draw) for draw in range(draws) for i, prompt in enumerate(ids)]


def shape(temperature=1.0, top_p=1.0, top_k=None, max_tokens=20, stop_ids=STOPS) -> Shape:
    return Shape(temperature, top_p, top_k, max_tokens, stop_ids)


def plain(model, draws, shape):
    with torch.inference_mode():
        return [drawn for _, drawn in sorted(draw_plainly(model, list(enumerate(draws)), shape, 0, len(draws)))]


def teacher_forced(model, draw: Draw, token_ids: list[int], temperature: float = 1.0) -> float:
    """Log-probability of a completion by one forward pass over prompt and completion, alone in its batch."""
    ids = torch.tensor([[*draw.prompt_ids, *token_ids]])
    with torch.inference_mode():
        logits = model(input_ids=ids).logits[0, len(draw.prompt_ids) - 1 : -1].double() / temperature
    return logits.log_softmax(-1)[range(len(token_ids)), token_ids].sum().item()


# --- exactness --------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("capacity", [30, 7], ids=["all at once", "places refilled"])
@pytest.mark.parametrize("attention", ["compiled", "of operations"])
def test_log_p_is_that_of_a_plain_forward_pass_and_tokens_are_the_plain_loops(
    family, capacity, attention, monkeypatch, caplog
):
    compiled = attention == "compiled" and cpu_attention._library() is not None  # also where it is not worth it
    monkeypatch.setattr(cpu_attention, "usable", lambda device, dtype: compiled)
    monkeypatch.setitem(cache.BLOCK, "cpu", 4)  # suffixes of several blocks
    model, draws, settings = tiny(family), mixed_draws(), shape()
    made = decode(model, draws, settings, pad_id=0, at_once=capacity)

    assert not caplog.records  # the plain loop would have left a note
    assert len({len(drawn.token_ids) for drawn in made}) > 3  # rows ended at different times
    assert {drawn.stopped for drawn in made} == {True, False}
    for draw, drawn, reference in zip(draws, made, plain(model, draws, settings), strict=True):
        assert drawn.token_ids == reference.token_ids
        assert drawn.stopped == reference.stopped == (drawn.token_ids[-1] in STOPS)
        assert len(drawn.token_ids) == 20 or drawn.stopped
        assert not STOPS & set(drawn.token_ids[:-1])
        assert drawn.log_p == pytest.approx(teacher_forced(model, draw, drawn.token_ids), abs=1e-4)
        assert drawn.log_q == drawn.log_p


def test_a_draw_does_not_depend_on_its_batch_mates():
    model, draws, settings = tiny("llama"), mixed_draws(), shape()
    together = decode(model, draws, settings, pad_id=0, at_once=11)
    for i in (0, 8, 29):
        (alone,) = decode(model, [draws[i]], settings, pad_id=0)
        assert alone.token_ids == together[i].token_ids
        assert alone.log_p == pytest.approx(together[i].log_p, abs=5e-5)


@pytest.mark.parametrize("attention", ["compiled", "of operations"])
def test_steps_taken_before_the_host_looks_again_change_nothing(attention, monkeypatch):
    """As on a GPU: rows that have ended go on unnoticed for some steps."""
    compiled = attention == "compiled" and cpu_attention._library() is not None  # also where it is not worth it
    monkeypatch.setattr(cpu_attention, "usable", lambda device, dtype: compiled)
    model, draws, settings = tiny("llama"), mixed_draws(), shape()
    expected = decode(model, draws, settings, pad_id=0, at_once=7)
    monkeypatch.setitem(shared_prefix.STRIDE, "cpu", 8)
    made = decode(model, draws, settings, pad_id=0, at_once=7)
    assert [drawn.token_ids for drawn in made] == [drawn.token_ids for drawn in expected]
    assert [d.log_p for d in made] == pytest.approx([d.log_p for d in expected], abs=5e-5)
    assert [d.stopped for d in made] == [d.stopped for d in expected]


@pytest.mark.parametrize("attention", ["compiled", "of operations"])
@pytest.mark.parametrize("family", ["llama", "qwen2_sliding"])
def test_draws_that_have_gone_the_same_way_are_computed_once(family, attention, monkeypatch):
    compiled = attention == "compiled" and cpu_attention._library() is not None
    monkeypatch.setattr(cpu_attention, "usable", lambda device, dtype: compiled)
    monkeypatch.setitem(cache.BLOCK, "cpu", 4)
    model, draws, settings = tiny(family), mixed_draws(draws=24), shape(temperature=0.3)
    expected = plain(model, draws, settings)
    computed = rows_computed(model, monkeypatch)
    for at_once in (len(draws), 30, 7):
        computed.clear()
        made = decode(model, draws, settings, pad_id=0, at_once=at_once)
        assert [one.token_ids for one in made] == [one.token_ids for one in expected]
        assert [one.log_q for one in made] == pytest.approx([one.log_q for one in expected], abs=3e-4)
        paths = [(draw.prompt_ids, *one.token_ids) for draw, one in zip(draws, made, strict=True)]
        steps = sum(len(path) - 2 for path in paths)  # the first token comes with the prompt
        ways = len({path[:end] for path in paths for end in range(2, len(path))})
        assert ways <= sum(computed) < steps
        if at_once == len(draws):  # what begins later shares no row with what began before
            assert sum(computed) == ways < 0.7 * steps


def test_greedy_draws_of_a_prompt_are_one_row(monkeypatch):
    model, draws, settings = tiny("llama"), mixed_draws(draws=20), shape(top_k=1)
    computed = rows_computed(model, monkeypatch)
    expected = plain(model, draws, settings)
    made = decode(model, draws, settings, pad_id=0)
    assert [one.token_ids for one in made] == [one.token_ids for one in expected]
    assert sum(computed) == sum(len(one.token_ids) - 1 for one in made[:5])  # of five prompts


def rows_computed(model, monkeypatch) -> list[int]:
    """Rows of each step from now on."""
    decode(model, mixed_draws(1, 1), shape(), pad_id=0)  # the trial that a model stands once
    computed: list[int] = []
    before = shared_prefix.Loop._logits
    monkeypatch.setattr(
        shared_prefix.Loop, "_logits", lambda self, rows: (computed.append(rows), before(self, rows))[1]
    )
    return computed


def test_one_prompt_with_more_draws_than_rows_is_read_once(monkeypatch):
    model, draws = tiny("llama"), [Draw((9, 8, 7), seed) for seed in range(40)]
    decode(model, draws[:1], shape(), pad_id=0)  # the trial that a model stands once
    read = []
    original = shared_prefix.Loop._read
    monkeypatch.setattr(shared_prefix.Loop, "_read", lambda self, batch: (read.append(batch), original(self, batch)))
    made = decode(model, draws, shape(), pad_id=0, at_once=6)
    assert len(read) == 1
    assert [drawn.token_ids for drawn in made] == [drawn.token_ids for drawn in plain(model, draws, shape())]


def test_a_single_token_needs_no_step_after_the_prompt():
    model, draws = tiny("llama"), mixed_draws()
    made = decode(model, draws, shape(max_tokens=1), pad_id=0, at_once=4)
    assert [len(drawn.token_ids) for drawn in made] == [1] * len(draws)
    assert [drawn.token_ids for drawn in made] == [d.token_ids for d in plain(model, draws, shape(max_tokens=1))]


def test_no_rows_make_no_draws():
    assert decode(tiny("llama"), [], shape(), pad_id=0) == []


def test_the_models_own_attention_is_back_afterwards():
    model = tiny("llama")
    before = model.config._attn_implementation
    decode(model, mixed_draws(2, 2), shape(), pad_id=0)
    assert model.config._attn_implementation == before


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"), [(0.7, 1.0, None), (1.0, 0.8, None), (1.3, 0.9, 12), (1.0, 1.0, 5)]
)
def test_log_q_is_that_of_the_distribution_sampled_from(temperature, top_p, top_k):
    """Against Transformers' own logits processors, applied to a plain forward pass."""
    model, draws = tiny("qwen3"), mixed_draws(4, 5)
    settings = shape(temperature, top_p, top_k)
    warpers = [transformers.TemperatureLogitsWarper(temperature)] if temperature != 1.0 else []
    warpers += [transformers.TopKLogitsWarper(top_k)] if top_k else []
    warpers += [transformers.TopPLogitsWarper(top_p)] if top_p < 1.0 else []
    for draw, drawn in zip(draws, decode(model, draws, settings, pad_id=0, at_once=9), strict=True):
        ids = torch.tensor([[*draw.prompt_ids, *drawn.token_ids]])
        with torch.inference_mode():
            logits = model(input_ids=ids).logits[0, len(draw.prompt_ids) - 1 : -1]
        for warper in warpers:
            logits = warper(None, logits)
        log_q = logits.double().log_softmax(-1)[range(len(drawn.token_ids)), drawn.token_ids].sum().item()
        assert drawn.log_q == pytest.approx(log_q, abs=1e-4)
        assert drawn.log_p == pytest.approx(teacher_forced(model, draw, drawn.token_ids), abs=1e-4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("family", ALL)
@pytest.mark.parametrize("capacity", [30, 7], ids=["all at once", "places refilled"])
def test_on_a_gpu_log_p_is_that_of_a_plain_forward_pass(family, capacity):
    model, draws, settings = tiny(family).cuda(), mixed_draws(), shape(max_tokens=90, stop_ids=frozenset({1}))
    made = decode(model, draws, settings, pad_id=0, at_once=capacity)
    on_cpu = decode(tiny(family), draws, settings, pad_id=0)
    reference = tiny(family)
    for draw, drawn in zip(draws, made, strict=True):
        expected = teacher_forced(reference, draw, drawn.token_ids)
        assert drawn.log_p == pytest.approx(expected, abs=1e-4 * len(drawn.token_ids))
    same = sum(gpu.token_ids == cpu.token_ids for gpu, cpu in zip(made, on_cpu, strict=True))
    assert same >= 0.9 * len(draws)  # u may fall on an edge, within rounding


# --- the distribution -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1.0, 1.0, None), (0.6, 1.0, None), (1.0, 0.7, None), (1.0, 1.0, 3), (1.5, 0.8, 4)],
)
def test_draws_follow_the_enumerated_distribution(temperature, top_p, top_k):
    """All sequences of up to 3 tokens out of 6, one of which stops: chi-square of 6,000 draws of two prompts."""
    torch.manual_seed(3)
    sizes = {"vocab_size": 6, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "head_dim": 8}
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**{**SMALL, **sizes, "num_hidden_layers": 1, "initializer_range": 0.2})
    ).eval()
    settings = Shape(temperature, top_p, top_k, 3, frozenset({0}))
    for prompt in ((3,), (1, 5, 2, 4)):
        made = decode(model, [Draw(prompt, seed) for seed in range(6000)], settings, pad_id=0, at_once=3000)
        probability = enumerate_sequences(model, prompt, settings)
        assert sum(probability.values()) == pytest.approx(1.0, abs=1e-5)
        seen = {sequence: 0 for sequence in probability}
        for drawn in made:
            sequence = tuple(drawn.token_ids)
            assert probability[sequence] > 0
            assert drawn.log_q == pytest.approx(math.log(probability[sequence]), abs=1e-4)
            seen[sequence] += 1
        expected = np.array([6000 * p for p in probability.values()])
        counts = np.array(list(seen.values()))
        rare = expected < 5  # lumped together, as the chi-square approximation needs
        groups = [(counts[~rare], expected[~rare])]
        if rare.any():
            groups.append(([counts[rare].sum()], [expected[rare].sum()]))
        observed, wanted = (np.concatenate(part) for part in zip(*groups, strict=True))
        assert len(observed) >= 5
        assert scipy.stats.chisquare(observed, wanted * observed.sum() / wanted.sum()).pvalue > 1e-3


def enumerate_sequences(model, prompt: tuple[int, ...], settings: Shape) -> dict[tuple[int, ...], float]:
    """Probability of each sequence, written out by hand: temperature, then top-k, then top-p."""

    def next_token(done: tuple[int, ...]) -> list[float]:
        with torch.inference_mode():
            logits = model(input_ids=torch.tensor([[*prompt, *done]])).logits[0, -1].double()
        p = (logits / settings.temperature).softmax(-1).tolist()
        order = sorted(range(len(p)), key=lambda i: -p[i])[: settings.top_k]
        total = sum(p[i] for i in order)
        kept, mass = [], 0.0
        for i in order:
            if mass < settings.top_p:
                kept.append(i)
            mass += p[i] / total
        total = sum(p[i] for i in kept)
        return [p[i] / total if i in kept else 0.0 for i in range(len(p))]

    found: dict[tuple[int, ...], float] = {}
    open_ends = {(): 1.0}
    while open_ends:
        done, probability = open_ends.popitem()
        for token, p in enumerate(next_token(done)):
            sequence = (*done, token)
            if token == 0 or len(sequence) == settings.max_tokens:
                found[sequence] = probability * p
            elif p > 0:
                open_ends[sequence] = probability * p
    return {sequence: p for sequence, p in found.items() if p > 0}


def test_a_token_is_chosen_where_the_distribution_function_passes_u():
    # Cumulative probabilities 0.1, 0.1, 0.4, 0.4, 1.0.
    logits = torch.tensor([[0.0] * 5, [0.1, 0.0, 0.3, 0.0, 0.6]]).log()
    row = torch.ones(6, dtype=torch.long)  # of all draws
    u = torch.tensor([0.0, 0.09, 0.11, 0.39, 0.41, 1 - 2**-53], dtype=torch.float64)
    chosen, log_q, log_p = choose(logits, row, u, shape())
    assert chosen.tolist() == [0, 0, 2, 2, 4, 4]
    expected = [math.log(p) for p in (0.1, 0.1, 0.3, 0.3, 0.6, 0.6)]
    assert log_q.tolist() == pytest.approx(expected, abs=1e-6)
    assert log_p.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("entries", [5, 64, 65, 1000])
def test_a_token_of_probability_zero_is_never_chosen(entries):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(500, entries, generator=generator) * 3
    logits[torch.rand(500, entries, generator=generator) < 0.7] = -torch.inf
    logits[:, 3] = 0.0  # something is left in every row
    logits[:, -1] = -torch.inf
    for extreme in (0.0, 0.5, 1 - 2**-53):
        chosen, log_q, _ = choose(logits, torch.arange(500), torch.full((500,), extreme, dtype=torch.float64), shape())
        assert torch.isfinite(logits.gather(1, chosen[:, None])).all()
        assert torch.isfinite(log_q).all()


@pytest.mark.parametrize("entries", [48, 300, 1000])
def test_blocks_find_what_one_cumulative_sum_finds(entries):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(200, entries, generator=generator) * 2
    u = torch.rand(200, generator=generator, dtype=torch.float64)
    chosen, _, _ = choose(logits, torch.arange(200), u, shape())
    cumulative = logits.double().softmax(-1).cumsum(-1)
    expected = torch.searchsorted(cumulative, u[:, None], right=True)[:, 0]
    assert (chosen != expected).sum() <= 1  # u may fall on an edge, within float32


def test_top_p_beyond_the_first_look_sorts_the_whole_vocabulary():
    generator = torch.Generator().manual_seed(2)
    flat, steep = torch.randn(20, 1000, generator=generator) * 0.1, torch.randn(20, 1000, generator=generator) * 9
    logits = torch.cat([flat, steep])
    row = torch.arange(80) // 2 % 40  # two draws of each, in turns
    u = torch.rand(80, generator=generator, dtype=torch.float64)
    chosen, log_q, _ = choose(logits, row, u, shape(top_p=0.9))
    kept = transformers.TopPLogitsWarper(0.9)(None, logits).double().log_softmax(-1)
    assert (torch.isfinite(kept).sum(-1)[:20] > 128).all()
    assert log_q.tolist() == pytest.approx(kept[row, chosen].tolist(), abs=1e-4)
    assert torch.isfinite(log_q).all()


@pytest.mark.parametrize("cut", [{}, {"temperature": 0.7}, {"temperature": 0.7, "top_p": 0.9}, {"top_k": 5}], ids=str)
def test_logits_of_half_precision_are_reckoned_with_in_float32(cut):
    generator = torch.Generator().manual_seed(3)
    half = (torch.randn(200, 100, generator=generator) * 3).bfloat16()
    u = torch.rand(200, generator=generator, dtype=torch.float64)
    found, expected = (choose(logits, torch.arange(200), u, shape(**cut)) for logits in (half, half.float()))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)


def test_uniforms_are_each_seeds_own_stream():
    first = uniforms([5, 6], 8)
    assert first.shape == (2, 8)
    assert (uniforms([6], 8)[0] == first[1]).all()
    assert (uniforms([5], 3)[0] == first[0, :3]).all()
    assert len(set(itertools.chain(*first.tolist()))) == 16
    most = 2**60 - 1  # of a candidate
    assert (uniforms([5, most], 8)[1] == np.random.Generator(np.random.Philox(key=most)).random(8)).all()


# --- memory -----------------------------------------------------------------------------------


def test_out_of_memory_halves_the_rows_and_loses_no_draw_made(monkeypatch, caplog):
    model, draws, settings = tiny("llama"), mixed_draws(5, 8), shape()
    expected = decode(model, draws, settings, pad_id=0, at_once=40)
    rows_seen: list[int] = []
    before = shared_prefix.Loop._step
    results: list[int] = []

    def step(self):
        rows_seen.append(len(self.number))
        if len(self.number) > 10 and len(rows_seen) > 6:
            raise torch.OutOfMemoryError("the test's device is full")
        before(self)

    released = shared_prefix.Loop._release

    def release(self):
        for number, drawn in released(self):
            results.append(number)
            yield number, drawn

    monkeypatch.setattr(shared_prefix.Loop, "_step", step)
    monkeypatch.setattr(shared_prefix.Loop, "_release", release)
    made = decode(model, draws, settings, pad_id=0, at_once=40)
    assert [drawn.token_ids for drawn in made] == [drawn.token_ids for drawn in expected]
    assert sorted(results) == list(range(40))  # each was made exactly once
    assert max(rows_seen[8:]) <= 10
    assert "out of memory" in caplog.text


def test_out_of_memory_with_a_single_row_is_raised(monkeypatch):
    def step(self):
        raise torch.OutOfMemoryError("the test's device is full")

    monkeypatch.setattr(shared_prefix.Loop, "_step", step)
    with pytest.raises(torch.OutOfMemoryError):
        decode(tiny("llama"), mixed_draws(1, 4), shape(stop_ids=frozenset()), pad_id=0, at_once=4)


def test_what_was_kept_for_draws_goes_with_them(monkeypatch):
    caches = []
    before = cache.SharedPrefixCache.__init__
    monkeypatch.setattr(
        cache.SharedPrefixCache,
        "__init__",
        lambda self, *sizes: (before(self, *sizes), caches.append(weakref.ref(self)))[0],
    )
    model = tiny("llama")
    gc.disable()  # which would hide a circle of references
    try:
        for _ in range(3):
            decode(model, mixed_draws(), shape(), pad_id=0)
        assert len(caches) == 4 and not any(cache() for cache in caches)
    finally:
        gc.enable()


def test_a_cpu_without_memory_is_told_from_other_errors():
    with pytest.raises(RuntimeError) as full:
        torch.empty(2**55)
    assert devices.out_of_memory(full.value)
    assert devices.out_of_memory(RuntimeError("CUDA error: out of memory"))
    assert not devices.out_of_memory(MemoryError()) and not devices.out_of_memory(RuntimeError("shapes do not match"))


def test_a_container_has_less_memory_than_its_host(tmp_path, monkeypatch):
    own, job = tmp_path / "own", tmp_path / "job_1"
    assert devices.of_a_container(tmp_path, own) is None
    own.write_text("0::/job_1/task\n")
    (job / "task").mkdir(parents=True)  # which has no bound of its own
    (job / "memory.stat").write_text("anon 500\ninactive_file 100\n")
    (job / "memory.current").write_text("600\n")
    (job / "memory.max").write_text("max\n")
    assert devices.of_a_container(tmp_path, own) is None
    (job / "memory.max").write_text("1000\n")
    assert devices.of_a_container(tmp_path, own) == (500, 1000)  # files in memory are dropped where there is need
    own.write_text("7:cpuset:/x\n9:cpu,memory:/of/the/host\n")  # what a container sees at the top is its own
    (tmp_path / "memory").mkdir()
    for name, said in (("limit_in_bytes", "1000"), ("usage_in_bytes", "1200"), ("stat", "total_inactive_file 50")):
        (tmp_path / "memory" / f"memory.{name}").write_text(said)
    assert devices.of_a_container(tmp_path, own) == (0, 1000)
    monkeypatch.setattr(devices, "of_a_container", lambda: (500, 1000))
    assert devices.memory("cpu").items() >= {"free": 500, "total": 1000}.items()


def test_the_plain_loop_reads_no_more_at_once_than_the_shared_ones(monkeypatch):
    monkeypatch.setattr("rsft_pipeline.decoding.plain.PREFILL_TOKENS", 40)
    prompts = [(i,) * length for length in (3, 9, 50) for i in range(10)]
    draws = list(enumerate(Draw(prompt, seed) for seed in range(3) for prompt in prompts))
    batches = list(_batches(draws, 64))
    assert sorted(number for batch in batches for number, _ in batch) == list(range(len(draws)))
    for batch in batches:
        different = {draw.prompt_ids for _, draw in batch}
        (length,) = {len(prompt) for prompt in different}
        assert len(batch) <= 64 and (length * len(different) <= 40 or len(different) == 1)
    assert len(batches) == 1 + 3 + 10


def test_a_gpu_that_only_emulates_bf16_has_fp32(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation)
    assert devices.resolve() == devices.Device("cuda", "float32")


def test_another_error_is_not_taken_for_a_lack_of_memory(monkeypatch):
    def step(self):
        raise RuntimeError("shapes do not match")

    model = tiny("llama")
    decode(model, mixed_draws(), shape(), pad_id=0)  # the trial that a model stands once
    monkeypatch.setattr(shared_prefix.Loop, "_step", step)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        decode(model, mixed_draws(1, 4), shape(stop_ids=frozenset()), pad_id=0, at_once=4)


def test_state_bytes_count_what_is_allocated():
    model, draws, settings = tiny("llama"), mixed_draws(5, 6), shape(max_tokens=33)
    # 2 (keys, values) · 2 layers · 2 heads · dimension 8 · 4 bytes = 256 bytes a token
    assert state_bytes(model, 1) == 256
    loop = shared_prefix.Loop(model, list(enumerate(draws)), settings, 0, 30)
    with torch.inference_mode(), attention.attention_of(model):
        for _ in loop.run():
            pass
    suffixes = sum(layer.keys.nbytes + layer.values.nbytes for layer in loop.cache.layers)
    prefixes = sum(layer.prefix_keys.nbytes + layer.prefix_values.nbytes for layer in loop.cache.layers)
    assert suffixes == 30 * state_bytes(model, 32)  # the last token is never fed back
    assert prefixes == 5 * state_bytes(model, 32)  # 17 tokens, in whole vectors of 16


def test_draws_at_once_follow_free_memory(monkeypatch):
    model, draws, settings = tiny("llama"), mixed_draws(5, 6), shape(max_tokens=20)
    # a suffix of 20 tokens, 2 prefixes of 17 tokens shared by 6 draws, and 48 logits of 4 + 16 bytes
    each = 20 * 256 + 2 * 17 * 256 / 6 + 48 * 20
    for fits, expected in ((10.5, 10), (0.1, 1), (1e6, 4096)):
        free = {"free": int(fits * each / 0.5)}
        monkeypatch.setattr(devices, "memory", lambda device, free=free: free)
        assert draws_at_once(model, draws, settings) == expected


# --- models that cannot share -----------------------------------------------------------------

LATENT = {  # DeepSeek's attention, which keeps less than it attends to
    **{"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8},
    **{"n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 16},
    **{"num_key_value_heads": 4, "first_k_dense_replace": 1},
}


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (transformers.BloomConfig(vocab_size=48, hidden_size=32, n_layer=1, n_head=2), "AttentionInterface"),
        (transformers.Gemma2Config(**{**SMALL, "head_dim": 8}), "softcap"),
        (transformers.GptOssConfig(**{**SMALL, "head_dim": 8, "num_local_experts": 4}), "s_aux"),
        (transformers.DeepseekV3Config(**{**SMALL, **LATENT}), "other keys and values than it keeps"),
        (transformers.NemotronConfig(**{**SMALL, "head_dim": 8}), "nats a token from what the model gives them"),
        (transformers.DiffLlamaConfig(**{**SMALL, "head_dim": 8}), "nats a token from what the model gives them"),
        (
            transformers.Lfm2Config(**{**SMALL, "layer_types": ["conv", "full_attention"], "pad_token_id": 0}),
            "LinearAttentionLayer",
        ),
    ],
    ids=lambda given: given.model_type if isinstance(given, transformers.PreTrainedConfig) else "",
)
def test_a_model_that_cannot_share_is_drawn_from_plainly_with_a_note(config, reason, caplog, monkeypatch):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    draws, settings = mixed_draws(3, 3), shape(max_tokens=5)
    with caplog.at_level(logging.WARNING, logger="rsft_pipeline.decoding"):
        made = decode(model, draws, settings, pad_id=0, at_once=4)
    assert reason in caplog.text
    for draw, drawn in zip(draws, made, strict=True):
        assert drawn.log_p == pytest.approx(teacher_forced(model, draw, drawn.token_ids), abs=1e-3)
    monkeypatch.setattr(decoding, "_rated", None)  # a trial is made once
    again = decode(model, draws, settings, pad_id=0, at_once=4)
    assert [one.token_ids for one in again] == [one.token_ids for one in made]


@pytest.mark.parametrize(
    "config",
    [
        transformers.BartConfig(
            **{"vocab_size": VOCABULARY, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4},
            **{"decoder_ffn_dim": 48, "is_decoder": True, "init_std": 0.5, "max_position_embeddings": 128},
        ),
        transformers.RobertaConfig(**{**SMALL, "is_decoder": True, "pad_token_id": 1}),
        transformers.Gemma4TextConfig(
            **{**SMALL, "num_hidden_layers": 3, "head_dim": 8, "global_head_dim": 16, "sliding_window": 8},
            **{"vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 4},
        ),
    ],
    ids=lambda config: config.model_type,
)
def test_a_draw_is_as_the_model_rates_it_beside_prompts_of_other_lengths(config):
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    draws, settings = mixed_draws(4, 3), shape(max_tokens=5)
    for draw, drawn in zip(draws, decode(model, draws, settings, pad_id=0), strict=True):
        assert drawn.log_p == pytest.approx(teacher_forced(model, draw, drawn.token_ids), abs=1e-3)


def test_a_model_that_keeps_what_it_read_elsewhere_is_not_drawn_from():
    of_recurrent_gemma = {"lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"]}
    config = transformers.RecurrentGemmaConfig(**{**SMALL, "head_dim": 8, **of_recurrent_gemma})
    with pytest.raises(RuntimeError, match="a RecurrentGemmaForCausalLM cannot be drawn from"):
        decode(transformers.AutoModelForCausalLM.from_config(config).eval(), mixed_draws(), shape(), pad_id=0)


def test_a_model_that_fails_in_a_way_of_its_own_is_told_in_a_line():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "num_experts": 2}
    config = transformers.SwitchTransformersConfig(vocab_size=VOCABULARY, **sizes, decoder_start_token_id=0)
    model = transformers.AutoModelForSeq2SeqLM.from_config(config).eval()
    with pytest.raises(RuntimeError, match="a SwitchTransformersForConditionalGeneration cannot be drawn") as told:
        decode(model, mixed_draws(), shape(), pad_id=0)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("error", [AttributeError("no layer_idx"), RuntimeError("a kernel's own"), ValueError()])
def test_a_model_on_which_the_shared_loop_fails_in_any_way_is_drawn_from_by_the_plain_one(error, monkeypatch, caplog):
    draws = mixed_draws(3, 2)
    expected = [drawn.token_ids for drawn in decode(tiny("llama"), draws, shape(), pad_id=0)]

    def failing(*_):
        raise error

    monkeypatch.setattr(shared_prefix, "draw", failing)
    assert [drawn.token_ids for drawn in decode(tiny("llama"), draws, shape(), pad_id=0)] == expected
    assert f"keeps its own copy of the prompt, because {type(error).__name__}" in caplog.text


def test_a_failure_without_words_is_a_failure(monkeypatch):
    def trial(model, loop, *_):
        raise NotImplementedError

    monkeypatch.setattr(decoding, "_trial", trial)
    with pytest.raises(RuntimeError, match="a LlamaForCausalLM cannot be drawn from: NotImplementedError"):
        decode(tiny("llama"), mixed_draws(), shape(), pad_id=0)


def test_a_model_of_text_and_pictures_has_the_words_of_its_text():
    text = {**SMALL, "head_dim": 8, "num_key_value_heads": 2}
    config = transformers.Gemma3Config(text_config=text)
    assert configuration.vocabulary_of(config) == VOCABULARY and not hasattr(config, "vocab_size")


def test_a_padding_token_that_was_drawn_has_a_place_like_any_other():
    torch.manual_seed(0)
    config = transformers.RobertaConfig(**{**SMALL, "is_decoder": True, "pad_token_id": 1})
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    draw = Draw((5, 6, 7), 0)
    tokens = [9, 1, 8, 1, 7]
    read = torch.tensor([[*draw.prompt_ids, *tokens[:-1]]])
    logits = model(input_ids=read, position_ids=torch.arange(2, 2 + read.shape[1])[None]).logits[0, 2:]
    expected = logits.log_softmax(-1)[range(5), tokens].sum().item()
    assert decoding._rated(model, draw.prompt_ids, tokens) == pytest.approx(expected, abs=1e-5)


def test_a_model_that_rates_its_own_draws_otherwise_is_not_drawn_from(monkeypatch):
    model = tiny("llama")
    monkeypatch.setattr(decoding, "_rated", lambda *_: 0.0)
    with pytest.raises(RuntimeError, match=r"a LlamaForCausalLM cannot be drawn from: its draws came out .* nats"):
        decode(model, mixed_draws(1, 1), shape(), pad_id=0)


@pytest.mark.parametrize("loop", ["shared", "plain"])
def test_what_is_chosen_by_no_number_is_an_error(loop, monkeypatch):
    model, draws = tiny("llama"), mixed_draws(2, 2)
    decode(model, draws, shape(), pad_id=0)  # the trial that a model stands once
    if loop == "plain":
        monkeypatch.setattr(shared_prefix, "draw", shared_prefix_unsupported)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(RuntimeError, match=r"the logits of LlamaForCausalLM in torch.float32 are not numbers"):
        decode(model, draws, shape(), pad_id=0)


def shared_prefix_unsupported(*_):
    raise attention.Unsupported("of the test")
