"""models/ and bootstrap.py: finding, loading, choosing, saving and verifying weights; and making small ones."""

import json
import os
import shutil
import string
import time

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedTokenizerFast,
)

from rsft_pipeline import bootstrap, lineage, models, prompts, training
from rsft_pipeline.devices import Device
from rsft_pipeline.models import ModelError, checkpoints, configuration
from rsft_pipeline.models.trainable import select_trainable
from rsft_pipeline.prompts import encode, templates
from rsft_pipeline.recipe.model import Bootstrap, Lora, Model
from rsft_pipeline.recipe.prompts import Prompts
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.sampling import Teacher
from rsft_pipeline.recipe.training import Training
from rsft_pipeline.tasks import causal

CPU = Device("cpu", "float32")
LLAMA = {
    "model_type": "llama",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}
GPT2 = {"model_type": "gpt2", "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
BERT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = torch.tensor([[1, 5, 6, 7]])


def characters() -> PreTrainedTokenizerFast:
    settings = Bootstrap(config=LLAMA, corpus="-")
    return bootstrap._tokenizer(settings, [string.ascii_lowercase])


def tiny(config=LLAMA, **settings):
    torch.manual_seed(0)
    sizes = {key: value for key, value in config.items() if key != "model_type"}
    config = AutoConfig.for_model(config["model_type"], **sizes, vocab_size=30, eos_token_id=2, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def trained(model, tmp_path):
    """The model after a few real steps."""
    samples = [training.Sample("a", [1, 5, 6], [7, 8, 2]), training.Sample("b", [1, 9], [10, 2])]
    settings = Training(epochs=4, batch_size=1, learning_rate=1e-2)
    where = {"scratch": tmp_path / "scratch", "device": CPU}
    training.fit(model, samples, settings, task=causal, start="tiny", seed=0, pad_id=0, **where)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(TEXT).logits


def a_recipe(folder, source="bootstrap", **bootstrapped):
    """A recipe file beside a corpus of a to z, each letter followed by the next two."""
    rows = [{"prompt": f"{a}=", "completion": chr(ord(a) + 1) + chr(ord(a) + 2)} for a in string.ascii_lowercase[:24]]
    (folder / "corpus.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    model = {"source": source}
    if source == "bootstrap":
        model["bootstrap"] = {"config": LLAMA, "corpus": "corpus.jsonl", "steps": 4, "batch_size": 8, **bootstrapped}
    tree = {
        "description": "letters",
        "model": model,
        "prompts": {"source": "corpus.jsonl", "template": "{prompt}", "eval_fraction": 0.25},
        "scoring": {"scorers": [{"kind": "length", "at_most": 3}]},
        "acceptance": {"rule": "top_k", "k": 1},
    }
    file = folder / "letters.yaml"
    file.write_text(json.dumps(tree))  # JSON is YAML
    return load(file)


def asking(folder, **how):
    """The recipe with another wording of its prompts."""
    asked = a_recipe(folder)
    section = {**asked.prompts.model_dump(exclude={"template"}), **how}
    return asked.model_copy(update={"prompts": Prompts.model_validate(section)})


def held_out_of(questions):
    """Those of one column that are held out."""
    return {question for question in questions if lineage.in_eval_split(lineage.question([question]), 0.25)}


# --- checkpoints ------------------------------------------------------------------------------


def test_a_checkpoint_is_named_after_its_content_and_comes_back_as_it_was(tmp_path):
    model = tiny()
    before = logits(model)
    saved = checkpoints.save(model, characters(), tmp_path, {"round": "r000"}, "# a card")
    assert saved.path == tmp_path / saved.digest
    assert saved.digest == checkpoints.content_digest(saved.path) == checkpoints.read_meta(saved.path)["digest"]
    assert checkpoints.read_meta(saved.path)["round"] == "r000"
    assert (saved.path / "README.md").read_text() == "# a card"
    assert torch.equal(logits(models.load(saved.path, CPU)), before)
    assert checkpoints.verify(saved) == []
    assert [path.name for path in tmp_path.iterdir()] == [saved.digest]


def test_the_digest_follows_from_content_and_never_from_what_is_said_about_it(tmp_path):
    first = checkpoints.save(tiny(), characters(), tmp_path, {"round": "r000"}, "one")
    padded = characters()
    padded(["a", "bcd"], padding=True)
    again = checkpoints.save(tiny(), padded, tmp_path, {"round": "r001"}, "two")
    assert again == first
    assert checkpoints.read_meta(first.path)["round"] == "r000"
    other = checkpoints.save(trained(tiny(), tmp_path), characters(), tmp_path, {}, "three")
    assert other.digest != first.digest


def test_a_single_changed_byte_is_named(tmp_path):
    saved = checkpoints.save(tiny(), characters(), tmp_path, {}, "")
    weights = saved.path / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert checkpoints.verify(saved) == ["model.safetensors"]
    (saved.path / "chat_template.jinja").write_text("added since")
    (saved.path / "tokenizer.json").unlink()
    assert checkpoints.verify(saved) == ["chat_template.jinja", "model.safetensors", "tokenizer.json"]


def test_a_change_that_leaves_size_and_time_is_found_by_hashing_anew(tmp_path):
    saved = checkpoints.save(tiny(), characters(), tmp_path, {}, "")
    weights = saved.path / "model.safetensors"
    then, content = weights.stat(), bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert checkpoints.verify(saved) == []  # as this process has hashed it
    assert checkpoints.verify(saved, anew=True) == ["model.safetensors"]


def test_a_record_that_was_rewritten_to_match_is_named_too(tmp_path):
    saved = checkpoints.save(tiny(), characters(), tmp_path, {}, "")
    (saved.path / "config.json").write_text("{}")
    record = checkpoints.read_meta(saved.path)
    record["files"]["config.json"] = lineage.file_digest(saved.path / "config.json")
    (saved.path / "meta.json").write_text(json.dumps(record))
    assert checkpoints.verify(saved) == ["meta.json"]


def test_a_damaged_one_is_replaced_when_the_same_is_saved_again(tmp_path):
    saved = checkpoints.save(tiny(), characters(), tmp_path, {}, "")
    weights = saved.path / "model.safetensors"
    good = weights.read_bytes()
    for damage in (lambda: weights.write_bytes(good[:-1]), lambda: (saved.path / "meta.json").unlink()):
        damage()
        checkpoints.describe(checkpoints.save(tiny(), characters(), tmp_path, {}, ""), {"said": "again"}, "")
        assert checkpoints.verify(saved) == [] and weights.read_bytes() == good
    beside = {path.name.partition("-")[0]: path for path in tmp_path.iterdir() if path != saved.path}
    assert set(beside) == {saved.digest} and (beside[saved.digest] / "config.json").is_file()  # nothing of it is lost


def test_the_weights_of_another_folder_are_not_those_of_this_one(tmp_path):
    saved = checkpoints.save(tiny(), characters(), tmp_path, {}, "")
    other = checkpoints.save(trained(tiny(), tmp_path), characters(), tmp_path, {}, "")
    shutil.rmtree(saved.path)
    shutil.copytree(other.path, saved.path)  # a backup that was put into the wrong place
    assert checkpoints.verify(saved) == ["meta.json"] and checkpoints.verify(other) == []


def test_what_a_killed_save_left_goes_after_a_day_and_a_second_save_of_the_same_keeps_the_first(tmp_path):
    for name, age in (("old", 90_000), ("new", 1000)):
        (tmp_path / f".saving-{name}").mkdir()
        (tmp_path / f".saving-{name}" / "model.safetensors").write_bytes(b"half of it")
        os.utime(tmp_path / f".saving-{name}", (time.time() - age,) * 2)
    first = checkpoints.save(tiny(), characters(), tmp_path, {"said": "first"}, "")
    assert checkpoints.save(tiny(), characters(), tmp_path, {"said": "second"}, "") == first
    assert checkpoints.read_meta(first.path)["said"] == "first"
    assert {path.name for path in tmp_path.iterdir()} == {first.digest, ".saving-new"}


def test_a_folder_without_a_record_cannot_be_verified(tmp_path):
    assert checkpoints.read_meta(tmp_path) == {}
    with pytest.raises(ModelError, match="not saved as a checkpoint"):
        checkpoints.verify(checkpoints.Checkpoint("0" * 32, tmp_path))


def test_a_bf16_base_trains_in_float32_and_is_saved_in_bf16_again(tmp_path):
    tiny().to(torch.bfloat16).save_pretrained(tmp_path / "base", max_shard_size="4KB")
    norm = min((tmp_path / "base").glob("*.safetensors"))  # one shard of several may have another
    save_file({name: tensor.float() for name, tensor in load_file(norm).items()}, norm, {"format": "pt"})
    model = models.load(tmp_path / "base", CPU, train=True)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    saved = checkpoints.save(trained(model, tmp_path), characters(), tmp_path, {}, "")
    assert {tensor.dtype for tensor in load_file(saved.path / "model.safetensors").values()} == {torch.bfloat16}
    assert models.load(saved.path, Device("cpu", "bfloat16")).dtype == torch.bfloat16


# --- what trains ------------------------------------------------------------------------------


def moved(model, tmp_path) -> set[str]:
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trained(model, tmp_path)
    return {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}


def test_all_parameters_train(tmp_path):
    model, trainable, total = select_trainable(tiny(), Model(source="-"))
    assert trainable == total == sum(p.numel() for p in model.parameters())
    assert moved(model, tmp_path) == {name for name, _ in model.named_parameters()}


@pytest.mark.parametrize(
    ("config", "tied", "expected"),
    [
        (LLAMA, False, ("model.layers.1.", "model.norm.", "lm_head.")),
        (LLAMA, True, ("model.layers.1.", "model.norm.")),
        (GPT2, True, ("transformer.h.1.", "transformer.ln_f.")),
    ],
)
def test_the_last_layers_are_blocks_norm_and_an_untied_head(tmp_path, config, tied, expected):
    model, trainable, _ = select_trainable(
        tiny(config, tie_word_embeddings=tied), Model(source="-", train="last_layers", last_layers=1)
    )
    names = {name for name, _ in model.named_parameters() if name.startswith(expected)}
    assert trainable == sum(model.get_parameter(name).numel() for name in names)
    assert moved(model, tmp_path) == names


def test_the_last_layers_leave_an_embedding_alone_that_is_tied_deep_within_a_head():
    config = AutoConfig.for_model(
        "roberta", vocab_size=30, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        is_decoder=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    assert model.lm_head.decoder.weight is model.get_input_embeddings().weight
    select_trainable(model, Model(source="-", train="last_layers", last_layers=1))
    assert not model.get_input_embeddings().weight.requires_grad and model.lm_head.dense.weight.requires_grad


def test_what_transformers_cannot_load_is_told_in_a_line(tmp_path):
    tiny().save_pretrained(tmp_path)
    for task, made_with, why in (
        ("seq2seq", "AutoModelForSeq2SeqLM", "Unrecognized configuration class"),
        ("causal", "AutoModelForCausalLM", ".*num_return_sequences"),
    ):
        with pytest.raises(ModelError, match=f"cannot be loaded as a {made_with}: {why}") as told:
            models.load(tmp_path, CPU, task=task)
        assert len(str(told.value).splitlines()) == 1
        (tmp_path / "generation_config.json").write_text(json.dumps({"num_return_sequences": 4}))


def test_more_last_layers_than_there_are_is_an_error():
    with pytest.raises(ModelError, match="has 2 transformer blocks"):
        select_trainable(tiny(), Model(source="-", train="last_layers", last_layers=3))


def test_frozen_patterns_stay_and_everything_else_trains(tmp_path):
    config = Model(source="-", train="freeze", freeze=["*embed*", "*.mlp.*"])
    model, trainable, total = select_trainable(tiny(), config)
    assert total - trainable == 30 * 16 + 2 * 3 * 16 * 32
    assert not any("embed" in name or ".mlp." in name for name in moved(model, tmp_path))


def test_a_tied_weight_is_frozen_under_either_name():
    config = Model(source="-", train="freeze", freeze=["lm_head.*"])
    _, trainable, total = select_trainable(tiny(tie_word_embeddings=True), config)
    assert total - trainable == 30 * 16


def test_a_freeze_pattern_that_matches_nothing_names_what_is_near():
    config = Model(source="-", train="freeze", freeze=["model.layer.0.mlp.up_proj.weight"])
    with pytest.raises(ModelError, match=r"matches no parameter. Near: model\.layers\.0\.mlp\.up_proj\.weight"):
        select_trainable(tiny(), config)


def test_freezing_everything_is_an_error():
    with pytest.raises(ModelError, match="leaves none of the"):
        select_trainable(tiny(), Model(source="-", train="freeze", freeze=["*"]))


@pytest.mark.parametrize("config", [LLAMA, GPT2])
def test_adapters_train_alone_and_merge_into_a_checkpoint_of_the_same_logits(tmp_path, config):
    chosen = Model(source="-", train="lora", lora=Lora(rank=2, alpha=8))
    base = tiny(config)
    model, trainable, total = select_trainable(base, chosen, seed=3)
    assert trainable == sum(p.numel() for name, p in model.named_parameters() if "lora_" in name) < total
    names = moved(model, tmp_path)
    assert names and all("lora_" in name for name in names)
    adapted = logits(model)
    assert not torch.allclose(adapted, logits(tiny(config)), atol=1e-3)
    saved = checkpoints.save(model, characters(), tmp_path, {}, "")
    torch.testing.assert_close(logits(models.load(saved.path, CPU)), adapted, atol=1e-5, rtol=0)


def test_adapters_start_from_the_seed_and_unknown_targets_are_named():
    def started(seed):
        model, _, _ = select_trainable(tiny(), Model(source="-", train="lora"), seed)
        return torch.cat([p.flatten() for name, p in model.named_parameters() if "lora_A" in name])

    assert torch.equal(started(1), started(1)) and not torch.equal(started(1), started(2))
    with pytest.raises(ModelError, match=r"`model.lora.targets` is \['nope'\]"):
        select_trainable(tiny(), Model(source="-", train="lora", lora=Lora(targets=["nope"])))


@pytest.mark.parametrize("targets", [["lm_head"], ["embed_tokens"]])
def test_adapters_of_a_matrix_that_is_embedding_and_head_are_refused(targets):
    chosen = Model(source="-", train="lora", lora=Lora(targets=["q_proj", *targets]))
    select_trainable(tiny(), chosen)
    with pytest.raises(ModelError, match="embedding and head are one matrix"):
        select_trainable(tiny({**LLAMA, "tie_word_embeddings": True}), chosen)


# --- finding and loading ----------------------------------------------------------------------


def test_a_local_folder_is_used_in_place(tmp_path):
    saved = checkpoints.save(tiny(), characters(), tmp_path, {}, "")
    assert models.base(a_recipe(tmp_path, source=str(saved.path)), tmp_path / "home") == saved
    assert models.base(a_recipe(tmp_path, source=saved.digest), tmp_path / "home") == saved  # relative to the recipe


def test_a_folder_of_pickled_weights_is_refused(tmp_path):
    folder = tmp_path / "pickled"
    model = tiny()
    model.config.save_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"no \*\.safetensors weights, only pytorch_model\.bin.*safetensors only"):
        models.base(a_recipe(tmp_path, source=str(folder)), tmp_path)
    with pytest.raises(ModelError, match="safetensors only"):
        models.load(folder, CPU)


def test_a_missing_folder_or_one_without_a_model_is_named(tmp_path):
    with pytest.raises(ModelError, match=r"there is no folder .*/nowhere"):
        models.base(a_recipe(tmp_path, source="./nowhere"), tmp_path)
    with pytest.raises(ModelError, match=r"there is no config\.json.*--set model\.source="):
        models.base(a_recipe(tmp_path, source="."), tmp_path)


def test_a_hub_model_that_cannot_be_fetched_is_named_with_the_way_out(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    wanted = a_recipe(tmp_path, source="nobody/no-such-model")
    with pytest.raises(ModelError, match=r"(?s)nobody/no-such-model is neither.*--set model\.source=/path/to/folder"):
        models.base(wanted, tmp_path)


def test_a_tokenizer_without_padding_pads_with_eos_and_gains_no_token(tmp_path):
    tokenizer = characters()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(tmp_path)
    loaded = models.tokenizer(tmp_path)
    assert (loaded.pad_token, loaded.pad_token_id, len(loaded)) == ("</s>", 2, len(characters()))


@pytest.mark.parametrize(("configured", "expected"), [(2, {2}), ([7, 2], {2, 7}), (9, {2, 9}), (None, {2})])
def test_a_completion_stops_at_the_models_and_the_tokenizers_eos(configured, expected):
    model = tiny()
    model.generation_config.eos_token_id = configured
    assert configuration.stop_ids(model, characters()) == expected


@pytest.mark.parametrize(("configured", "expected"), [(7, 7), ([7, 2], 2), ([7, 9], 7), (None, 2)])
def test_a_given_text_ends_with_the_tokenizers_eos_where_the_model_has_several(configured, expected):
    model = tiny()
    model.generation_config.eos_token_id = configured
    assert configuration.end_id(model, characters()) == expected


def test_a_model_that_keeps_no_keys_and_values_is_refused(tmp_path):
    config = AutoConfig.for_model("mamba", vocab_size=48, hidden_size=16, num_hidden_layers=1)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="a MambaForCausalLM keeps no keys and values"):
        models.load(tmp_path, CPU)


def test_the_context_length_is_the_configurations(tmp_path):
    AutoConfig.for_model("gpt2", n_positions=48).save_pretrained(tmp_path / "gpt2")
    AutoConfig.for_model("llama", max_position_embeddings=96).save_pretrained(tmp_path / "llama")
    AutoConfig.for_model("bloom").save_pretrained(tmp_path / "bloom")  # relative positions: no bound
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    phi = {"hidden_size": 16, "num_attention_heads": 2, "original_max_position_embeddings": 32}
    phi = AutoConfig.for_model("phi3", **phi, max_position_embeddings=96, rope_parameters=rope)
    phi.save_pretrained(tmp_path / "phi3")  # past 32 tokens a row changes those beside it
    AutoConfig.for_model("xlm-roberta", max_position_embeddings=48, pad_token_id=1).save_pretrained(tmp_path / "xlmr")
    kinds = ("gpt2", "llama", "bloom", "phi3", "xlmr")
    assert [configuration.context_length(tmp_path / kind) for kind in kinds] == [48, 96, None, 32, 46]
    AutoConfig.for_model("mpt", max_seq_len=24).save_pretrained(tmp_path / "mpt")
    assert configuration.context_length(tmp_path / "mpt") == 24
    AutoConfig.for_model("roberta", pad_token_id=None).save_pretrained(tmp_path / "roberta")
    with pytest.raises(ModelError, match="no `pad_token_id`, from which a roberta counts on"):
        configuration.context_length(tmp_path / "roberta")


def test_a_check_goes_by_the_shorter_context_of_policy_and_teacher(tmp_path):
    AutoConfig.for_model("gpt2", n_positions=48).save_pretrained(tmp_path / "teacher")
    wanted = a_recipe(tmp_path)
    own = models.check(wanted)
    taught = wanted.sampling.model_copy(update={"source": "teacher", "teacher": Teacher(source="./teacher")})
    taught = wanted.model_copy(update={"sampling": taught})
    with pytest.raises(ModelError, match="safetensors weights"):
        models.check(taught)
    (tmp_path / "teacher" / "model.safetensors").touch()
    assert own > models.check(taught) == 48
    (tmp_path / "teacher" / "config.json").unlink()
    with pytest.raises(ModelError, match=r"--set sampling\.teacher\.source="):
        models.check(taught)


@pytest.mark.parametrize("kind", sorted(configuration.BEHIND_PADDING))
def test_a_text_as_long_as_the_context_is_read_and_none_longer_where_positions_begin_behind_padding(kind):
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    own = {
        "esm": {"position_embedding_type": "absolute"},
        "longformer": {"attention_window": 4},
        "luke": {"entity_vocab_size": 4, "entity_emb_size": 8},
        "xmod": {"languages": ["en_XX"], "default_language": "en_XX"},
    }
    sizes |= {"vocab_size": 30, "max_position_embeddings": 16, "pad_token_id": 1, **own.get(kind, {})}
    config = AutoConfig.for_model(kind, **sizes)
    model, longest = AutoModelForSequenceClassification.from_config(config).eval(), configuration.context_of(config)
    with torch.inference_mode():
        model(torch.full((1, longest), 5))
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, longest + 1), 5))


# --- bootstrap --------------------------------------------------------------------------------

ODD = 'é😀á  two  spaces\n\n\ttab </s> <s>"don\'t" .,!'


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_a_bootstrapped_tokenizer_gives_back_the_very_text(tmp_path, kind):
    settings = Bootstrap(config=LLAMA, corpus="-", tokenizer=kind, vocabulary=300)
    bootstrap._tokenizer(settings, [ODD, "the cat the cat the cat"]).save_pretrained(tmp_path)
    AutoConfig.for_model("llama", vocab_size=300).save_pretrained(tmp_path)
    tokenizer = models.tokenizer(tmp_path)
    ids = tokenizer(ODD)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and tokenizer.eos_token_id not in ids and tokenizer.unk_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == ODD
    assert tokenizer("")["input_ids"] == [tokenizer.bos_token_id]
    assert tokenizer.pad_token_id != tokenizer.eos_token_id


def test_bpe_learns_the_corpus_and_can_still_write_any_text():
    tokenizer = bootstrap._tokenizer(
        Bootstrap(config=LLAMA, corpus="-", tokenizer="bpe", vocabulary=270), ["banana banana"]
    )
    assert len(tokenizer("banana", add_special_tokens=False)["input_ids"]) == 1
    assert tokenizer.decode(tokenizer(ODD)["input_ids"], skip_special_tokens=True) == ODD


def test_merges_are_learnt_from_what_is_not_held_out_and_an_alphabet_from_all(tmp_path):
    def made(kind):
        wanted = a_recipe(tmp_path, tokenizer=kind, vocabulary=290, steps=0)
        asked = {f"{letter}=" for letter in string.ascii_lowercase[:24]}
        out = held_out_of(asked)
        rows = {min(asked - out): "cherry cherry cherry", min(out): "banana banana banana é"}
        with open(tmp_path / "corpus.jsonl", "a", encoding="utf-8") as corpus:
            corpus.writelines(json.dumps({"prompt": p, "completion": c}) + "\n" for p, c in rows.items())
        return models.tokenizer(models.base(wanted, tmp_path).path)

    bpe, characters = made("bpe"), made("characters")
    assert [len(bpe(word, add_special_tokens=False)["input_ids"]) for word in ("cherry", "banana")] == [1, 6]
    assert characters.decode(characters("é")["input_ids"], skip_special_tokens=True) == "é"


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_two_builds_give_the_same_digest_and_another_seed_another(tmp_path, kind):
    wanted = a_recipe(tmp_path, tokenizer=kind, vocabulary=300)
    first = models.base(wanted, tmp_path / "one")
    torch.manual_seed(7)  # as another process would have it
    assert models.base(wanted, tmp_path / "two").digest == first.digest
    reseeded = load(tmp_path / "letters.yaml", {"seed": "1"})
    assert models.base(reseeded, tmp_path / "one").digest != first.digest


def test_a_bootstrapped_model_is_made_once_and_again_when_its_corpus_changes(tmp_path):
    wanted, seen = a_recipe(tmp_path), []
    first = models.base(wanted, tmp_path, lambda step, steps, loss, tokens: seen.append((step, steps)))
    assert seen == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert models.base(wanted, tmp_path, lambda *_: seen.append("again")) == first
    assert len(seen) == 4
    assert [path.name for path in (tmp_path / "models" / "bootstrap").iterdir() if path.is_dir()] == []
    with open(tmp_path / "corpus.jsonl", "a") as corpus:
        corpus.write('{"completion": "zz"}\n')
    assert models.base(wanted, tmp_path).digest != first.digest


def test_a_bootstrapped_model_that_was_changed_is_not_drawn_from(tmp_path):
    wanted = a_recipe(tmp_path)
    made = models.base(wanted, tmp_path)
    (made.path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelError, match=r"is not the model that was made there: tokenizer\.json changed since"):
        models.base(wanted, tmp_path)
    made.path.rename(tmp_path / "away")
    assert models.base(wanted, tmp_path) == made


def test_a_bootstrapped_model_loads_stops_at_eos_and_is_verified(tmp_path):
    made = models.base(a_recipe(tmp_path), tmp_path)
    model, tokenizer = models.load(made.path, CPU), models.tokenizer(made.path)
    assert configuration.stop_ids(model, tokenizer) == {tokenizer.eos_token_id}
    assert model.config.vocab_size == len(tokenizer)
    assert checkpoints.verify(made) == []
    assert checkpoints.read_meta(made.path)["kind"] == "bootstrap"


def test_the_warm_up_leaves_evaluation_prompts_out_and_trains_the_rest_to_its_end(tmp_path, monkeypatch):
    seen = []
    fit = training.fit
    monkeypatch.setattr(
        training, "fit", lambda model, samples, *a, **k: seen.extend(samples) or fit(model, samples, *a, **k)
    )
    made = models.base(a_recipe(tmp_path), tmp_path)
    tokenizer = models.tokenizer(made.path)
    asked = {f"{letter}=" for letter in string.ascii_lowercase[:24]}
    held_out = {prompt for prompt in asked if lineage.in_eval_split(lineage.question([prompt]), 0.25)}
    assert 0 < len(held_out) < 24
    assert {tokenizer.decode(s.prompt_ids, skip_special_tokens=True) for s in seen} == asked - held_out
    assert {s.completion_ids[-1] for s in seen} == {tokenizer.eos_token_id}
    assert seen[0].prompt_ids == encode(tokenizer, tokenizer.decode(seen[0].prompt_ids[1:]), chat=False)
    meta = checkpoints.read_meta(made.path)
    assert (meta["rows"], meta["rows_held_out"]) == (24 - len(held_out), len(held_out))


def test_a_held_out_question_is_known_with_and_without_its_template(tmp_path):
    worded = asking(tmp_path, template="{{Q}}: {prompt}\n")
    questions = [f"{letter}=" for letter in string.ascii_lowercase]
    out = held_out_of(questions)
    assert prompts.held_out(worded, questions) == out
    assert prompts.held_out(worded, [f"{{Q}}: {q}\n" for q in questions]) >= {f"{{Q}}: {q}\n" for q in out}


def test_a_held_out_prompt_is_known_in_whichever_way_its_columns_are_told_apart(tmp_path):
    asked = [(place, str(n)) for place in ("York", "New York", "A New York") for n in range(20)]
    out = {f"{place} {n}: {place}" for place, n in asked if lineage.in_eval_split(lineage.question([place, n]), 0.25)}
    found = prompts.held_out(asking(tmp_path, template="{place} {n}: {place}"), [f"{p} {n}: {p}" for p, n in asked])
    assert out and found >= out and len(found) < len(asked)
    # If a text can be read in only one way, no other prompt is held out.
    kept = [f"{place} / {n}" for place, n in asked]
    out = {f"{place} / {n}" for place, n in asked if lineage.in_eval_split(lineage.question([place, n]), 0.25)}
    assert prompts.held_out(asking(tmp_path, template="{place} / {n}"), kept) == out
    # A column that occurs twice has the same text twice, so this is not such a prompt.
    assert not any("n" in one for one in templates.readings("{place} {n}: {place}", "York 3: Cork"))
    ways = [list(one.values()) for one in templates.readings("{place} {n}", "New York 3")]
    assert ways == [["New", "York 3"], ["New York", "3"]]
    assert list(templates.readings("{a} + {b}?", "1 + 2?")) == [{"a": "1", "b": "2"}]
    assert [list(one.values()) for one in templates.readings("{a}{b}", "xy")] == [["", "xy"], ["x", "y"], ["xy", ""]]


@pytest.mark.parametrize(
    ("template", "rendered"),
    [
        (None, "system: Be {{kind}}.\nuser:  {} ?\nassistant:"),
        (
            "<s>{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}{% endfor %}",
            "<s>[system]Be {{kind}}.[user]{} ?",
        ),
    ],
)
def test_a_held_out_conversation_is_known_as_it_is_rendered_and_by_its_message(tmp_path, template, rendered):
    messages = [{"role": "system", "content": "Be {{kind}}."}, {"role": "user", "content": " {prompt} ?"}]
    worded, tokenizer = asking(tmp_path, messages=messages), characters()
    tokenizer.chat_template = template
    questions = [f"{letter}=" for letter in string.ascii_lowercase]
    out = held_out_of(questions)
    for wording in ("{}", " {} ?", rendered):
        found = prompts.held_out(worded, [wording.format(q) for q in questions], tokenizer)
        assert found >= {wording.format(q) for q in out} and len(found) < len(questions)


def test_a_chat_recipe_is_warmed_up_on_the_tokens_that_its_policy_reads(tmp_path):
    worded, tokenizer = asking(tmp_path, messages=[{"role": "user", "content": "{prompt}"}]), characters()
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0].content }}"
    rows = [{"prompt": "<s>ab", "completion": "c"}, {"prompt": "", "completion": "c"}]
    read = [sample.prompt_ids for sample in bootstrap._samples(worded, tiny(), tokenizer, rows)]
    assert read == [encode(tokenizer, "<s>ab", chat=True), [tokenizer.bos_token_id]]


def test_a_warmed_up_model_knows_its_corpus(tmp_path):
    made = models.base(a_recipe(tmp_path, steps=150, learning_rate=1e-2), tmp_path)
    model, tokenizer = models.load(made.path, CPU), models.tokenizer(made.path)
    known = next(a for a in "abcdef" if not lineage.in_eval_split(lineage.question([f"{a}="]), 0.25))
    drawn = model.generate(**tokenizer(f"{known}=", return_tensors="pt"), do_sample=False, max_new_tokens=8)
    text = tokenizer.decode(drawn[0], skip_special_tokens=True)
    assert text == f"{known}={chr(ord(known) + 1)}{chr(ord(known) + 2)}" and drawn[0, -1] == tokenizer.eos_token_id


def test_a_corpus_can_be_a_function_beside_the_recipe(tmp_path):
    (tmp_path / "warmup.py").write_text("def rows():\n    yield {'completion': 'abc'}\n")
    made = models.base(a_recipe(tmp_path, corpus="warmup:rows"), tmp_path)
    assert checkpoints.read_meta(made.path)["rows"] == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "a="}', r"row 1 is \{'prompt': 'a='\}; expected"),
        ('{"prompt": "a=", "completion": ""}', "row 1 is"),
        ("not json", "line 1 is not JSON"),
        ("{}, 1", "line 1 is not JSON"),
        ("", "corpus.jsonl has no rows"),
        ('{"prompt": "o=", "completion": "pq"}', "has no row to train on"),
    ],
)
def test_a_bad_corpus_is_named_by_row(tmp_path, line, message):
    wanted = a_recipe(tmp_path)
    (tmp_path / "corpus.jsonl").write_text(line + "\n")
    with pytest.raises(ModelError, match=message):
        models.base(wanted, tmp_path)


def test_a_corpus_that_is_not_utf8_is_named_with_its_field_and_line(tmp_path):
    wanted = a_recipe(tmp_path)
    (tmp_path / "corpus.jsonl").write_bytes(b'{"completion": "a"}\n{"completion": "\xe4"}\n')
    with pytest.raises(ModelError, match=r"the warm-up's `corpus`: .*corpus\.jsonl: line 2 is not JSON: 'utf-8' codec"):
        models.check(wanted)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"corpus": "nowhere.jsonl"}, "there is no file .*nowhere.jsonl"),
        ({"config": {"hidden_size": 16}}, "has no `model_type`"),
        ({"config": {"model_type": "lama"}}, "transformers has no 'lama'. Did you mean 'llama'?"),
        ({"config": {**LLAMA, "intermediate_size": -4}}, "makes no model: .* negative dimension -4"),
        ({"config": {**LLAMA, "hiden_size": 16}}, "no such setting. Did you mean 'hidden_size'?"),
        ({"config": {**LLAMA, "num_attention_heads": 3, "head_dim": None}}, "makes no model"),
        ({"config": {"model_type": "bert", **BERT}}, "BertLMHeadModel reads its text both ways, unless .*is_decoder"),
        ({"config": {"model_type": "mamba", "hidden_size": 16, "num_hidden_layers": 1}}, "keeps no keys and values"),
    ],
)
def test_a_bad_bootstrap_section_is_explained(tmp_path, changes, message):
    for look in (models.check, lambda recipe: models.base(recipe, tmp_path)):
        with pytest.raises(ModelError, match=message):
            look(a_recipe(tmp_path, **changes))


def test_what_reads_both_ways_writes_nothing_until_it_is_a_decoder(tmp_path):
    for is_decoder in (False, True):
        config = AutoConfig.for_model("bert", vocab_size=30, is_decoder=is_decoder, **BERT)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / str(is_decoder))
    assert models.load(tmp_path / "True", CPU)
    with pytest.raises(ModelError, match="BertLMHeadModel reads its text both ways"):
        models.load(tmp_path / "False", CPU)


def test_a_padding_token_without_an_embedding_is_none(tmp_path):
    tokenizer, model = characters(), tiny()
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == model.config.vocab_size
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert models.tokenizer(tmp_path).pad_token_id == tokenizer.eos_token_id


def test_a_row_of_the_warm_up_that_is_too_long_is_named(tmp_path):
    wanted = a_recipe(tmp_path, config={**LLAMA, "max_position_embeddings": 8})
    with open(tmp_path / "corpus.jsonl", "a") as corpus:
        corpus.write(json.dumps({"prompt": "q=", "completion": "long" * 200}) + "\n")
    with pytest.raises(
        ModelError, match=r"corpus`: the row \{'prompt': 'q=',.{,99} has 804 tokens; the .*context is 8"
    ):
        models.base(wanted, tmp_path)
