"""packing.py: the prefix tree, and that computing through it gives what each row gives alone."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from rsft_pipeline import packing
from rsft_pipeline.tasks import causal, writing
from rsft_pipeline.training import Sample

SIZES = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4}
PROMPT = [1, 5, 6, 7, 8]
SAMPLES = [
    Sample("long", [1, 30, 31], list(range(10, 29))),
    Sample("first", PROMPT, [9, 10, 2]),
    Sample("shorter", [1, 5], [33, 2]),
    Sample("second", PROMPT, [9, 11, 12, 13, 2]),
    Sample("twin", PROMPT, [9, 10, 2]),
    Sample("other", [3], [34, 35, 36]),
]
NODES = 22 + 7 + 2 + 4 + 0 + 4  # [1] is read once for four of them, [1, 5] for four, PROMPT and 9 once, the twin never
LONGEST = 22

PACKED = ["llama", "gpt2", "qwen2", "mistral", "gpt_neox", "roberta", "granite"]  # granite has a scale of its own
# Soft caps, no attention, no positions, layers that hand nothing on, a window.
PADDED = ["gemma2", "mamba", "bloom", "nemotron", "short-sighted mistral"]


def tiny(kind: str):
    torch.manual_seed(0)
    settings: dict = {**SIZES, "tie_word_embeddings": False}
    if kind in ("llama", "qwen2", "mistral", "granite", "gemma2", "nemotron", "short-sighted mistral"):
        settings |= {"intermediate_size": 32, "num_key_value_heads": 2}
    if kind == "short-sighted mistral":
        kind, settings["sliding_window"] = "mistral", 8
    if kind == "roberta":
        settings |= {"intermediate_size": 32, "is_decoder": True, "pad_token_id": 0, "max_position_embeddings": 64}
    if kind == "gemma2":
        settings["head_dim"] = 4
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **settings))
    with torch.no_grad():  # as they come, the weights are so small that all tokens look alike
        for parameter in model.parameters():
            parameter.mul_(4.0 if parameter.dim() > 1 else 1.0)
    return model.eval()


def alone(model, sample: Sample) -> torch.Tensor:
    """A sample's summed loss, by the model as it is, from the sample alone."""
    ids, start = torch.tensor([sample.prompt_ids + sample.completion_ids]), len(sample.prompt_ids)
    return torch.nn.functional.cross_entropy(model(ids).logits[0, start - 1 : -1], ids[0, start:], reduction="sum")


def gradients(model, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(loss, list(named.values()), materialize_grads=True)
    return dict(zip(named, found, strict=True))


def tokens_read(model) -> list[int]:
    """A list that gets the number of tokens each time the model reads some."""
    seen: list[int] = []
    model.get_input_embeddings().register_forward_hook(lambda module, inputs, output: seen.append(inputs[0].numel()))
    return seen


def test_the_tree_has_a_node_for_each_beginning():
    nodes, first = packing.tree([[5, 6, 7], [5, 6], [4], [5, 6, 8, 9], [5, 6, 7]])
    assert nodes.tolist() == [[1, 2, 3, -1], [1, 2, -1, -1], [0, -1, -1, -1], [1, 2, 4, 5], [1, 2, 3, -1]]
    assert first.tolist() == [8, 4, 5, 2, 14, 15]


@pytest.mark.parametrize("kind", PACKED + PADDED)
def test_losses_and_gradients_are_those_of_each_sample_alone(kind):
    model = tiny(kind)
    implementation, seen = model.config._attn_implementation, tokens_read(model)
    weights = torch.tensor([0.5, 1.0, 2.0, 0.25, 3.0, 1.0])

    losses = causal.token_losses(model, causal.collate(SAMPLES, pad_id=0))
    assert seen[-1] == (NODES if kind in PACKED else len(SAMPLES) * LONGEST)
    assert model.config._attn_implementation == implementation
    expected = torch.stack([alone(model, sample) for sample in SAMPLES])
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    alike = gradients(model, (weights * expected).sum())
    for name, gradient in gradients(model, (weights * losses).sum()).items():
        assert (gradient - alike[name]).abs().max() <= 1e-5 * alike[name].abs().max() + 1e-8, name


@pytest.mark.parametrize("kind", PACKED)
def test_no_sample_sees_another(kind):
    """The loss of one sample has exactly no gradient at a token that only another sample has."""
    model = tiny(kind)
    table = model.get_input_embeddings().weight
    for place, sample in enumerate(SAMPLES):
        losses = causal.token_losses(model, causal.collate(SAMPLES, pad_id=0))
        (gradient,) = torch.autograd.grad(losses[place], table)
        assert set(gradient.abs().sum(dim=1).nonzero().flatten().tolist()) == {
            *sample.prompt_ids,
            *sample.completion_ids[:-1],
        }


def test_a_model_with_a_mask_of_its_own_is_not_packed():
    """Doge's mask depends on later tokens too, so even its own loss of a sample is not that of a draw."""
    settings = {**SIZES, "intermediate_size": 32, "num_key_value_heads": 2, "keep_window_size": 4}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("doge", **settings)).eval()
    seen = tokens_read(model)
    causal.token_losses(model, causal.collate(SAMPLES, pad_id=0))
    assert seen[-1] == len(SAMPLES) * LONGEST


def test_another_neighbour_changes_no_loss():
    model = tiny("llama")
    before = causal.token_losses(model, causal.collate(SAMPLES, pad_id=0))
    changed = [Sample("long", [1, 32, 31], list(range(28, 9, -1))), *SAMPLES[1:]]
    after = causal.token_losses(model, causal.collate(changed, pad_id=0))
    torch.testing.assert_close(after[1:], before[1:], atol=1e-5, rtol=0)
    assert abs(after[0] - before[0]) > 1


def test_low_rank_adapters_are_packed_too():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny("llama"), LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False))
    seen = tokens_read(model)
    losses = causal.token_losses(model, causal.collate(SAMPLES, pad_id=0))
    assert seen == [NODES]
    expected = torch.stack([alone(model, sample) for sample in SAMPLES])
    torch.testing.assert_close(losses, expected, atol=1e-5, rtol=1e-5)
    alike = gradients(model, expected.sum())
    for name, gradient in gradients(model, losses.sum()).items():
        torch.testing.assert_close(gradient, alike[name], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("adapted", [False, True])
def test_where_samples_are_padded_the_head_is_applied_only_where_one_has_a_completion(adapted):
    from peft import LoraConfig, get_peft_model

    model, shapes = tiny("gemma2"), []
    model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(tuple(output.shape)))
    if adapted:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2))
    samples = [Sample("long", [1] * 30, [5, 6]), Sample("short", [2] * 28, [5, 6, 7])]
    causal.token_losses(model, causal.collate(samples, pad_id=0))
    assert shapes == [(2, 4, 40)]  # of 32 columns


@pytest.mark.parametrize("several", [1, 3, 100])
def test_a_softmax_in_parts_gives_the_same_losses_and_gradients(monkeypatch, several):
    logits, targets = torch.randn(7, 11, requires_grad=True), torch.randint(11, (7,))
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
    (alike,) = torch.autograd.grad((expected * torch.arange(7)).sum(), logits)
    monkeypatch.setattr(writing, "SOFTMAX", 11 * several)
    found = writing.surprisals(logits, targets)
    (gradient,) = torch.autograd.grad((found * torch.arange(7)).sum(), logits)
    assert torch.equal(found, expected)
    torch.testing.assert_close(gradient, alike)
    with torch.inference_mode():
        assert torch.equal(writing.surprisals(logits, targets), expected)


def test_what_the_draws_of_a_prompt_share_is_read_once_for_their_probabilities_too():
    model = tiny("llama")
    seen = tokens_read(model)
    found = causal.log_probabilities(model, SAMPLES, pad_id=0)
    assert seen == [NODES]
    assert found == pytest.approx([-alone(model, sample).item() for sample in SAMPLES], abs=1e-4)
