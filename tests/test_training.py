"""training.py and the loss of tasks/causal.py, on two-layer models that really train."""

import os
import signal
import subprocess
import sys
from collections import Counter
from itertools import groupby
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rsft_pipeline.devices import Device
from rsft_pipeline.recipe.training import Training
from rsft_pipeline.tasks import causal
from rsft_pipeline.training import Sample, TrainingError, factor, fit, parts, plan

CPU, BF16 = Device("cpu", "float32"), Device("cpu", "bfloat16")
EOS = 2
SIZES = {"vocab_size": 17, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
SAMPLES = [
    Sample("a", [1, 5, 6], [7, 8, EOS]),
    Sample("b", [1, 9], [10, EOS]),
    Sample("c", [1], [11, 12, 13, 14, 15, EOS]),
    Sample("d", [1, 3, 4, 5, 6, 7], [8]),
    Sample("e", [1, 4], [9, 9, EOS]),
]


def tiny(kind: str = "llama", **settings):
    torch.manual_seed(0)
    sizes = dict(SIZES) if kind == "gpt2" else {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **settings))
    return model.eval()


def train(model, samples, scratch, start="tiny", seed=0, device=CPU, on_step=lambda *_: None, **settings):
    return fit(
        model,
        samples,
        Training(**{"learning_rate": 1e-2, **settings}),
        task=causal,
        start=start,
        seed=seed,
        device=device,
        pad_id=EOS,
        scratch=scratch,
        on_step=on_step,
    )


def weights(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def gradients(samples, scratch, **settings) -> dict[str, torch.Tensor]:
    """What a step over the samples would change the weights by, before the optimiser."""
    model, seen = tiny(), {}
    for name, parameter in model.named_parameters():
        parameter.register_post_accumulate_grad_hook(lambda p, name=name: seen.update({name: p.grad.clone()}))
    train(model, samples, scratch, clip=1e9, batch_size=len(samples), **settings)
    return seen


def nll(model, sample) -> float:
    """The completion's negative log-likelihood, one token at a time and without padding."""
    total, context = 0.0, list(sample.prompt_ids)
    for token in sample.completion_ids:
        logits = model(torch.tensor([context])).logits[0, -1].double()
        total -= torch.log_softmax(logits, 0)[token].item()
        context.append(token)
    return total


# --- the loss ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["llama", "gpt2", "qwen2", "mistral"])
def test_a_rows_loss_is_its_completions_likelihood_token_by_token_whatever_it_is_padded_to(kind):
    model = tiny(kind)
    with torch.no_grad():
        losses = causal.token_losses(model, causal.collate(SAMPLES, pad_id=EOS))
        assert losses.dtype == torch.float32
        assert losses.tolist() == pytest.approx([nll(model, sample) for sample in SAMPLES], abs=1e-5)


def test_a_model_that_cannot_keep_positions_gives_the_same_loss():
    model = tiny()

    class Plain(torch.nn.Module):
        def forward(self, input_ids, use_cache):
            return model(input_ids=input_ids, use_cache=use_cache)

    batch = causal.collate(SAMPLES, pad_id=0)
    torch.testing.assert_close(causal.token_losses(Plain(), batch), causal.token_losses(model, batch))


def test_the_head_is_applied_to_completions_only():
    model, shapes = tiny(), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    causal.token_losses(model, causal.collate([Sample("long", [1] * 30, [5, 6])], pad_id=0))
    assert shapes == [(1, 2, 17)]


def test_eos_is_a_target_even_where_the_padding_is_eos():
    labels = causal.collate([Sample("a", [1, 5], [7, EOS]), Sample("b", [1], [6, 7, 8, EOS])], pad_id=EOS)["labels"]
    assert labels.tolist() == [[-100, -100, 7, EOS, -100], [-100, 6, 7, 8, EOS]]


def test_training_teaches_the_completion_and_where_it_ends(tmp_path):
    model = tiny()
    history = train(model, SAMPLES[:3], tmp_path, epochs=100, batch_size=3, learning_rate=3e-2)
    assert history.steps[-1].loss < 0.05 < history.steps[0].loss
    for sample in SAMPLES[:3]:
        drawn = model.generate(torch.tensor([sample.prompt_ids]), do_sample=False, max_new_tokens=9, eos_token_id=EOS)
        assert drawn[0, len(sample.prompt_ids) :].tolist() == sample.completion_ids


def test_training_in_bf16_keeps_its_weights_in_float32(tmp_path):
    model, seen = tiny(), set()
    model.lm_head.register_forward_hook(lambda module, inputs, output: seen.add(output.dtype))
    history = train(model, SAMPLES[:3], tmp_path, epochs=100, batch_size=3, learning_rate=3e-2, device=BF16)
    assert seen == {torch.bfloat16}
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert history.steps[-1].loss < 0.05


# --- weights and accumulation -----------------------------------------------------------------


def test_a_weight_scales_its_samples_gradient_exactly(tmp_path):
    whole = gradients([SAMPLES[0]], tmp_path)
    quarter = gradients([Sample("a", [1, 5, 6], [7, 8, EOS], weight=0.25)], tmp_path)
    assert all(torch.equal(quarter[name], 0.25 * gradient) for name, gradient in whole.items())


def test_a_step_is_the_weighted_sum_over_all_its_completion_tokens(tmp_path):
    a, b = gradients([SAMPLES[0]], tmp_path), gradients([SAMPLES[1]], tmp_path)  # of 3 and 2 tokens
    mixed = gradients([Sample("a", [1, 5, 6], [7, 8, EOS], 0.5), Sample("b", [1, 9], [10, EOS], 3.0)], tmp_path)
    for name, gradient in mixed.items():
        torch.testing.assert_close(gradient, (0.5 * 3 * a[name] + 3.0 * 2 * b[name]) / 5, atol=1e-7, rtol=1e-4)


def test_the_history_reports_the_loss_per_token_of_each_step(tmp_path):
    model, seen = tiny(), []
    expected = sum(nll(model, sample) for sample in SAMPLES) / 15
    history = train(model, SAMPLES, tmp_path, batch_size=5, on_step=lambda *step: seen.append(step))
    (step,) = history.steps
    assert (step.step, step.tokens, step.learning_rate) == (1, 15, 1e-2)
    assert step.loss == pytest.approx(expected, abs=1e-6)
    assert seen == [(1, 1, step.loss, 15)]
    assert history.tokens == 15 and history.tokens_per_second > 0


@pytest.mark.parametrize("parts", [4, 100])
def test_accumulation_changes_nothing(tmp_path, parts):
    once, often = tiny(), tiny()
    train(once, SAMPLES, tmp_path, epochs=3, batch_size=5, accumulation=1)
    train(often, SAMPLES, tmp_path, epochs=3, batch_size=5, accumulation=parts)
    for name, parameter in weights(once).items():
        torch.testing.assert_close(parameter, often.get_parameter(name).detach(), atol=1e-6, rtol=0)


def test_frozen_parameters_stay_and_the_others_move(tmp_path):
    model = tiny()
    model.model.layers[0].requires_grad_(False)
    before = weights(model)
    train(model, SAMPLES, tmp_path, weight_decay=0.1)
    moved = {name for name, parameter in weights(model).items() if not torch.equal(parameter, before[name])}
    assert moved == {name for name in before if not name.startswith("model.layers.0.")}


# --- order and schedule -----------------------------------------------------------------------


def test_every_epoch_is_a_new_shuffle_of_every_sample():
    steps = plan(range(20), batch_size=4, epochs=2, seed=1)
    assert [len(step) for step in steps] == [4] * 10
    order = [i for step in steps for i in step]
    assert sorted(order[:20]) == sorted(order[20:]) == list(range(20))
    assert order[:20] != order[20:]
    assert plan(range(20), 4, 2, seed=1) == steps != plan(range(20), 4, 2, seed=2)


def test_a_fraction_of_an_epoch_takes_that_share_of_the_samples():
    counts = Counter(i for step in plan([1] * 10, batch_size=3, epochs=1.5, seed=0) for i in step)
    assert sum(counts.values()) == 15 and set(counts.values()) == {1, 2}
    assert len(plan([1] * 10, batch_size=4, epochs=0.01, seed=0)) == 1


def test_samples_of_a_prompt_come_in_groups_of_an_eighth_of_a_step():
    prompts = [i // 6 for i in range(120)]  # 20 prompts of 6 samples: each a group of 4 and one of 2
    order = [i for step in plan(prompts, batch_size=32, epochs=1, seed=0) for i in step]
    assert sorted(order) == list(range(120))
    runs = [len(list(run)) for _, run in groupby(prompts[i] for i in order)]
    assert set(runs) <= {2, 4, 6} and runs.count(4) > 10 < runs.count(2)  # two groups of a prompt may meet

    apart = [prompts[i] for step in plan(prompts, batch_size=15, epochs=1, seed=0) for i in step]
    assert max(len(list(run)) for _, run in groupby(apart)) < 4  # groups of 1


def test_a_step_is_computed_in_parts_of_like_length_where_a_prompts_samples_are_neighbours():
    samples = [Sample(f"{p}{c}", [p] * p, [5] * c) for p, c in [(9, 9), (2, 2), (3, 3), (2, 1), (3, 1), (9, 1), (4, 1)]]
    found = parts(samples, count=1, tokens=20)
    assert [[sample.candidate_id for sample in part] for part in found] == [
        ["21", "22", "41", "31"],  # of at most 5 tokens
        ["33", "91"],  # of at most 10
        ["99"],  # of 18
    ]
    assert [len(part) for part in parts(samples, count=3, tokens=10**6)] == [3, 3, 1]
    assert parts(samples[:1], count=1, tokens=5) == [samples[:1]]  # longer than a part, and still computed


@pytest.mark.parametrize(
    ("schedule", "warmup", "expected"),
    [
        ("constant", 0.0, [1, 1, 1, 1]),
        ("linear", 0.0, [1, 0.75, 0.5, 0.25]),
        ("linear", 0.5, [1 / 3, 2 / 3, 1, 0.5]),
        ("cosine", 0.25, [0.5, 1, 0.75, 0.25]),
    ],
)
def test_the_rate_warms_up_and_decays_as_scheduled(schedule, warmup, expected):
    training = Training(schedule=schedule, warmup=warmup)
    assert [factor(step, 4, training) for step in (1, 2, 3, 4)] == pytest.approx(expected)


# --- what cannot be trained -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sample", "message"),
    [
        (Sample("bad", [1, 2], []), "bad has no completion tokens"),
        (Sample("bad", [], [3]), "bad has no prompt tokens"),
        (Sample("bad", [1] * 60, [3] * 5), "bad has 65 tokens; the model's context is 64"),
        (Sample("bad", [1], [3], weight=float("nan")), "the loss is nan.*Candidates:.* bad"),
    ],
)
def test_a_sample_that_cannot_be_trained_is_named(tmp_path, sample, message):
    with pytest.raises(TrainingError, match=message):
        train(tiny(max_position_embeddings=64), [*SAMPLES, sample], tmp_path)


def test_no_samples_and_nothing_trainable_and_rounded_weights_are_errors(tmp_path):
    with pytest.raises(TrainingError, match="no samples"):
        train(tiny(), [], tmp_path)
    with pytest.raises(TrainingError, match="no parameter"):
        train(tiny().requires_grad_(False), SAMPLES, tmp_path)
    with pytest.raises(TrainingError, match="not float32"):
        train(tiny().to(torch.bfloat16), SAMPLES, tmp_path)


# --- going on after a kill --------------------------------------------------------------------

RESUMABLE = {"epochs": 4, "batch_size": 2, "save_every": 3, "accumulation": 2}  # 10 steps; states after 3, 6, 9


def with_dropout():
    """GPT-2, whose dropout shows whether the random state was restored too."""
    return tiny("gpt2", resid_pdrop=0.3)


def test_a_training_killed_by_sigkill_ends_in_the_weights_of_one_that_was_not(tmp_path):
    child = subprocess.run([sys.executable, __file__, tmp_path], env={**os.environ, "PYTHONPATH": str(Path.cwd())})
    assert child.returncode == -signal.SIGKILL

    resumed, whole = with_dropout(), with_dropout()
    history = train(resumed, SAMPLES, tmp_path, **RESUMABLE)
    reference = train(whole, SAMPLES, tmp_path / "other", **RESUMABLE)
    assert (history.resumed_from, reference.resumed_from) == (6, 0)
    assert history.steps == reference.steps
    assert all(torch.equal(p, whole.get_parameter(name)) for name, p in resumed.named_parameters())


@pytest.mark.parametrize(
    ("samples", "settings"),
    [
        (SAMPLES, {"start": "another"}),
        (SAMPLES, {"seed": 1}),
        (SAMPLES, {"learning_rate": 2e-2}),
        ([*SAMPLES[:4], Sample("e", [1, 4], [9, 9, EOS], weight=0.5)], {}),
        ([*SAMPLES[:4], Sample("e", [1, 4], [9, 8, EOS])], {}),
    ],
)
def test_a_state_of_another_training_is_never_resumed(tmp_path, caplog, samples, settings):
    train(with_dropout(), SAMPLES, tmp_path, **RESUMABLE)
    history = train(with_dropout(), samples, tmp_path, **RESUMABLE, **settings)
    assert (history.resumed_from, len(history.steps)) == (0, 10)
    assert "other samples, settings or weights" in caplog.text


def test_a_damaged_state_is_not_resumed(tmp_path, caplog):
    train(with_dropout(), SAMPLES, tmp_path, **RESUMABLE)
    state = tmp_path / "state.pt"
    state.write_bytes(state.read_bytes()[:-1000])
    assert train(with_dropout(), SAMPLES, tmp_path, **RESUMABLE).resumed_from == 0
    assert "cannot be read" in caplog.text


if __name__ == "__main__":  # the child of the SIGKILL test

    def die(step, *_):
        if step == 8:
            os.kill(os.getpid(), signal.SIGKILL)

    train(with_dropout(), SAMPLES, Path(sys.argv[1]), on_step=die, **RESUMABLE)
