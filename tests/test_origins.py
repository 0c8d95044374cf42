"""Where candidates come from: the policy, a teacher, or the reference answers; what the lineage says of it."""

import json
import re
import shutil

import pytest
import torch

from rsft_pipeline import models, prompts, rounds
from rsft_pipeline.audit.trace import trace
from rsft_pipeline.devices import Device
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.section import RecipeError
from rsft_pipeline.store import Store
from tests.test_round import failure_of, instance, run  # noqa: F401 (a fixture)

CPU = Device("cpu", "float32")
SAMPLING = {"draws": 6, "max_tokens": 2, "wave_size": 120}


@pytest.fixture
def teacher(home, write_recipe):
    """A model of the same alphabet that was warmed up for longer."""
    longer = load(write_recipe("longer"), {"model.bootstrap.steps": "150"})
    return models.base(longer, home)


def forced_log_p(path, prompt, token_ids):
    model, tokenizer = models.load(path, CPU), models.tokenizer(path)
    ids = prompts.encode(tokenizer, prompt, False)
    with torch.no_grad():
        logits = model(torch.tensor([ids + token_ids])).logits[0].double().log_softmax(-1)
    return sum(logits[len(ids) - 1 + i, token].item() for i, token in enumerate(token_ids))


def test_a_teacher_draws_and_the_policy_learns(home, instance, write_recipe, teacher):  # noqa: F811
    sampling = {**SAMPLING, "source": "teacher", "teacher": {"source": str(teacher.path)}}
    recipe = load(write_recipe(sampling=sampling))
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        row = rounds.row_of(store, recipe.name, "r000")
        assert row["drawn_from"] == teacher.digest != row["policy"]
        drawn = store.query(
            "SELECT c.*, p.text AS prompt FROM candidates c JOIN prompts p USING (prompt_id) ORDER BY candidate_id"
        )
        origin = {(one["split"], one["origin"], one["policy"]) for one in drawn}
        assert origin == {
            ("train", "teacher", teacher.digest),
            ("eval", "policy", row["policy"]),
            ("eval", "policy", row["checkpoint"]),
        }
        for one in [one for one in drawn if one["split"] == "train"][:20]:
            assert one["log_q"] == pytest.approx(forced_log_p(teacher.path, one["prompt"], one["token_ids"]), abs=1e-4)
        # The checkpoint descends from the policy, not from the teacher.
        assert store.value("SELECT parent FROM checkpoints") == row["policy"]


def test_prompts_too_long_for_the_teacher_are_not_asked(home, instance, write_recipe):  # noqa: F811
    # 5 tokens hold a row of the corpus, but not a prompt of 3 and a completion of 3.
    short = load(write_recipe("short"), {"model.bootstrap.config.max_position_embeddings": "5"})
    sampling = {
        **SAMPLING,
        "max_tokens": 3,
        "source": "teacher",
        "teacher": {"source": str(models.base(short, home).path)},
    }
    recipe = load(write_recipe(sampling=sampling))
    result = run(instance, recipe, "r000")
    assert "none of the 100 rows of letters:letters is usable (too long: 100)" in failure_of(
        result, f"{recipe.name}__prompts"
    )


def test_a_teacher_that_reads_otherwise_is_refused(home, instance, write_recipe):  # noqa: F811
    other = load(write_recipe("other"), {"model.bootstrap.tokenizer": "bpe", "model.bootstrap.steps": "1"})
    sampling = {**SAMPLING, "source": "teacher", "teacher": {"source": str(models.base(other, home).path)}}
    recipe = load(write_recipe(sampling=sampling))
    result = run(instance, recipe, "r000")
    assert "another vocabulary than the policy" in failure_of(result, f"{recipe.name}__prompts")


def test_references_are_rated_by_the_policy_and_marked(home, instance, write_recipe):  # noqa: F811
    recipe = load(
        write_recipe(
            sampling={**SAMPLING, "draws": 1, "source": "reference"},
            acceptance={"rule": "loss", "k": "calibrate", "share": 0.5},
        )
    )
    assert run(instance, recipe, "r000").success
    with Store.at(home) as store:
        row = rounds.row_of(store, recipe.name, "r000")
        path = rounds.locate(store, recipe, home_of(home), row["policy"]).path
        drawn = store.query(
            """SELECT c.*, p.text AS prompt, p.reference FROM candidates c JOIN prompts p USING (prompt_id)
               WHERE c.split = 'train' ORDER BY candidate_id"""
        )
        end = models.tokenizer(path).eos_token_id
        for one in drawn:
            assert (one["origin"], one["text"], one["log_q"]) == ("reference", one["reference"], None)
            assert one["token_ids"][-1] == end and len(one["token_ids"]) == 2
        for one in drawn[:20]:
            assert one["log_p"] == pytest.approx(forced_log_p(path, one["prompt"], one["token_ids"]), abs=1e-4)
        accepted = store.value("SELECT avg(accepted::INTEGER) FROM decisions")
        assert accepted == pytest.approx(0.5, abs=4 * 0.5 / len(drawn) ** 0.5)
        assert row["checkpoint"] and store.value("SELECT count(*) FROM candidates WHERE origin = 'reference'") == len(
            drawn
        )


def test_a_teacher_that_ends_otherwise_is_refused_until_its_end_is_a_stop(home, write_recipe, teacher):
    folder = home / "ends"
    shutil.copytree(teacher.path, folder)
    told = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**told, "eos_token_id": [told["eos_token_id"], 5]}))
    token = models.tokenizer(folder).convert_ids_to_tokens(5)
    sampling = {**SAMPLING, "source": "teacher", "teacher": {"source": str(folder)}}
    with pytest.raises(models.ModelError, match=re.escape(f'with `sampling.stop: ["{token}"]` it ends there')):
        models.teacher(load(write_recipe(sampling=sampling)), teacher.path)
    assert models.teacher(load(write_recipe(sampling={**sampling, "stop": [token]})), teacher.path).path == folder


def test_a_reference_that_was_mended_is_taken_up_when_the_round_is_run_again(home, instance, write_recipe):  # noqa: F811
    path = write_recipe(
        sampling={**SAMPLING, "draws": 1, "source": "reference"}, acceptance={"rule": "loss", "k": 0.0001}
    )
    assert run(instance, load(path), "r000").success
    source = path.parent / "letters.py"
    source.write_text(source.read_text().replace('"answer": ', '"answer": "b" or '))
    assert run(instance, load(path), "r000").success
    with Store.at(home) as store:
        accepted = store.query(
            """SELECT c.text, p.reference FROM decisions d JOIN candidates c USING (candidate_id)
               JOIN prompts p ON p.prompt_id = c.prompt_id WHERE d.accepted"""
        )
        assert accepted and {(row["text"], row["reference"]) for row in accepted} == {("b", "b")}
        both = store.query("SELECT candidate_id, text FROM candidates WHERE split = 'train'")
        assert len({row["candidate_id"] for row in both}) == len(both)
        earlier = next(row["candidate_id"] for row in both if row["text"] != "b")
        for candidate in (earlier, next(row["candidate_id"] for row in both if row["text"] == "b")):
            assert not trace(store, candidate).gaps


def home_of(folder):
    from rsft_pipeline.home import Home

    return Home(folder)


TAUGHT = {**SAMPLING, "source": "teacher", "teacher": {"source": "elsewhere"}}


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"sampling": {**SAMPLING, "source": "teacher"}}, "`source: teacher` and a `teacher:` section go together"),
        (
            {"sampling": {**SAMPLING, "draws": 1, "source": "reference"}, "acceptance": {"rule": "rejection"}},
            "references are not drawn",
        ),
        ({"sampling": {**SAMPLING, "draws": 8, "source": "reference"}}, "give `draws: 1`"),
        ({"sampling": TAUGHT, "acceptance": {"rule": "loss", "k": 1}}, "`rule: loss` needs the policy's own"),
        ({"sampling": TAUGHT, "acceptance": {"rule": "rejection"}}, "`acceptance.target: policy` needs the policy's"),
        (
            {"sampling": TAUGHT, "scoring": {"scorers": [{"kind": "knowledge"}]}},
            "a scorer `knowledge` needs the policy's own",
        ),
        (
            {"sampling": {**SAMPLING, "until": {"per_prompt": 1, "draws": 9}}, "acceptance": {"rule": "top_k", "k": 1}},
            "needs a rule that decides on each candidate by itself",
        ),
        ({"sampling": {**SAMPLING, "until": {"draws": 9}}}, "give `per_prompt:`, `accepted:`, or both"),
        ({"sampling": {**SAMPLING, "until": {"per_prompt": 1, "draws": 5}}}, "cannot be less than `draws`"),
    ],
)
def test_what_does_not_go_together_is_said(write_recipe, sections, expected):
    with pytest.raises(RecipeError, match="this recipe cannot run") as caught:
        load(write_recipe(**sections))
    assert expected in str(caught.value)
