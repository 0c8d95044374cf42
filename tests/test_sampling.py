"""Sampling: what a candidate's id depends on, and how waves are cut."""

import hashlib

import letters_store as letters
import pytest

from rsft_pipeline import bootstrap, lineage, prompts, sampling
from rsft_pipeline.recipe.evaluation import Evaluation
from rsft_pipeline.recipe.model import Bootstrap
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.recipe.sampling import Teacher, Until
from rsft_pipeline.rounds import Round, RoundError
from rsft_pipeline.steps import draw, ingest

PROMPTS = [sampling.Asked(f"p{i}", tuple(range(1 + i % 3)), None) for i in range(10)]


def plan(recipe, scope="r000", policy="w", **changes):
    how = recipe.sampling.model_copy(update=changes)
    return [
        wave for draws in sampling.passes(how) for wave in sampling.waves(recipe, scope, policy, PROMPTS, how, draws)
    ]


def ids(waves):
    return [request.candidate_id for wave in waves for request in wave]


def test_ids_follow_from_recipe_round_policy_prompt_draw_and_settings_alone(recipe):
    first = ids(plan(recipe))
    assert len(set(first)) == 10 * recipe.sampling.draws
    assert first == ids(plan(recipe, batch_size=3))
    assert set(first) == set(ids(plan(recipe, wave_size=7)))
    assert set(first) < set(ids(plan(recipe, draws=recipe.sampling.draws + 2)))
    for other in (
        plan(recipe, scope="r001"),
        plan(recipe, policy="v"),
        plan(recipe, temperature=0.5),
        plan(recipe, top_k=3),
        plan(recipe, max_tokens=9),
        plan(recipe, stop=["a"]),
        plan(recipe.model_copy(update={"seed": 1})),
    ):
        assert not set(first) & set(ids(other))


def test_ids_are_hashes_of_the_same_json_for_ever():
    def hashed(text):
        return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()

    assert lineage.digest({"é": [1, None], "a": "\ud800"}) == hashed('{"a":"\ud800","é":[1,null]}')[:32]
    assert lineage.set_digest(["b", "a"]) == hashed('["a","b"]')[:32]
    assert lineage.candidate_id("r", "r000", "w", "p", 3, "s") == hashed('["r","r000","w","p",3,"s"]')[:32]
    assert lineage.seed_of("c", 7) == int(hashed('["seed","c",7]')[:15], 16)
    assert lineage.prompt_id(" a\n") == hashed('["prompt"," a\\n"]')[:32]
    assert lineage.same_text(" a\n") == hashed('["prompt","a"]')[:32]
    assert lineage.question(["b  c", "a"]) == hashed('["split","a","b c"]')[:32]


def test_the_reference_answers_are_part_of_an_id_where_they_are_the_candidates(recipe):
    how = recipe.sampling.model_copy(update={"source": "reference"})
    assert len({sampling.settings(how, 0, answers) for answers in (None, "", "one", "another")}) == 3
    assert len({sampling.settings(recipe.sampling, 0, answers) for answers in (None, "one", "another")}) == 1


def test_held_out_candidates_are_draws_of_the_weights_evaluated(recipe):
    round_ = {"source": "teacher", "teacher": Teacher(source="t"), "until": Until(accepted=1, draws=9), "top_p": 0.9}
    evaluation = Evaluation(temperature=0.5, draws=3, k=2)
    changed = {"sampling": recipe.sampling.model_copy(update=round_), "evaluation": evaluation}
    how = sampling.evaluation_sampling(recipe.model_copy(update=changed))
    assert (how.source, how.teacher, how.until, how.most_draws) == ("policy", None, None, 3)
    assert (how.temperature, how.top_p, how.top_k) == (0.5, 0.9, None)
    greedy = {"evaluation": Evaluation(greedy=True, draws=1, k=1)}
    assert sampling.evaluation_sampling(recipe.model_copy(update=greedy)).top_k == 1


def test_a_wave_holds_all_draws_of_its_prompts_and_like_lengths_together(recipe):
    waves = plan(recipe, draws=4, wave_size=10)
    assert [len(wave) for wave in waves] == [8] * 5
    lengths = [len(request.prompt_ids) for wave in waves for request in wave]
    assert lengths == sorted(lengths)
    assert [len(wave) for wave in plan(recipe, draws=4, wave_size=3)] == [4] * 10  # at least one prompt


def test_with_until_the_draws_come_in_passes_and_keep_their_ids_and_waves_are_random_samples(recipe):
    until = Until(per_prompt=1, draws=10)
    how = recipe.sampling.model_copy(update={"until": until, "draws": 4})
    assert sampling.passes(how) == [range(0, 4), range(4, 8), range(8, 10)]
    assert sorted(ids(plan(recipe, draws=10))) == sorted(ids(plan(recipe, draws=4, wave_size=8, until=until)))
    first_waves = [{r.asked.prompt_id for r in wave} for wave in plan(recipe, draws=4, wave_size=8, until=until)]
    assert first_waves[:5] != first_waves[5:10]  # another order in each pass


def test_only_what_is_missing_is_pending_and_waves_keep_their_numbers(recipe):
    waves = plan(recipe, draws=4, wave_size=10)
    there = {request.candidate_id for request in waves[0]} | {waves[2][0].candidate_id}
    left = list(sampling.pending(waves, there))
    assert [number for number, _ in left] == [1, 2, 3, 4]
    assert left[1][1] == waves[2][1:]


def test_prompts_of_a_round_are_chosen_by_hash_whatever_their_order(recipe):
    rows = [{"prompt_id": f"{i}"} for i in range(50)]
    chosen = sampling.choose(rows, 10, "r000")
    assert chosen == sampling.choose(rows[::-1], 10, "r000")
    assert chosen != sampling.choose(rows, 10, "r001")
    assert sampling.choose(rows, 99, "r000") == sampling.choose(rows, None, "r000") == rows


def test_a_round_asks_some_of_its_recipes_prompts_that_are_in_use_and_evaluations_always_the_same(
    tmp_path, write_recipe
):
    drawing, evaluating = {"draws": 6, "max_tokens": 2, "prompts": 7}, {"draws": 8, "k": 4, "prompts": 5}
    made = load(write_recipe(letters.RECIPE, sampling=drawing, evaluation=evaluating))
    with letters.write(tmp_path) as store:
        texts = {row["prompt_id"]: row["text"] for row in store.query("SELECT * FROM prompts")}
        tokenizer = bootstrap._tokenizer(Bootstrap(config={}, corpus="-"), list(texts.values()))

        def change(sql, *values):
            store.commit(lambda connection: connection.execute(sql, list(values)))

        def asked(round_key, split, recipe=made):
            round_ = Round(recipe, round_key, "policy", "base", "teacher", "none")
            found = draw.ask(store, round_, tokenizer, split=split, run_id="run")
            for one in found:
                assert one.prompt_ids == tuple(prompts.encode(tokenizer, texts[one.prompt_id], False))
            chosen = {one.prompt_id: one.reference for one in found}
            of = [recipe.name, round_key, split]
            kept = store.query("SELECT * FROM round_prompts WHERE recipe = ? AND round = ? AND split = ?", of)
            assert {row["prompt_id"] for row in kept} == chosen.keys() and len(kept) == len(found)
            return chosen

        change("UPDATE prompts SET settings = ?", ingest.settings(made))
        same = "'other' AS recipe, 'train' AS split, 'z' AS reference, 'other' AS settings"
        change(f"INSERT INTO prompts SELECT * REPLACE ({same}) FROM prompts")
        gone = [letters.prompt_id(number) for number in range(10)]
        change("UPDATE prompts SET active = false, settings = 'older' WHERE list_contains(?, prompt_id)", gone)
        in_use = {letters.prompt_id(n): str(n + 1) for n in range(10, letters.PROMPTS)}
        held_out = {letters.prompt_id(n, "eval"): str(n + 1) for n in range(letters.PROMPTS)}
        first, second, always = asked("r000", "train"), asked("r001", "train"), asked("r000", "eval")
        assert len(first) == len(second) == 7 and first != second and (first | second).items() <= in_use.items()
        assert len(always) == 5 and always == asked("r001", "eval") and always.items() < held_out.items()
        assert asked("r000", "eval", made.model_copy(update={"seed": 1})) != always

        change("UPDATE prompts SET settings = NULL WHERE prompt_id = ?", letters.prompt_id(10))  # from before
        assert asked("r000", "train") == first
        change("UPDATE prompts SET settings = 'of now' WHERE prompt_id = ?", letters.prompt_id(11))
        with pytest.raises(RoundError, match="its prompts were read with another section `prompts` than the round"):
            asked("r000", "train")
        revoked = {"recipe": letters.RECIPE, "kind": "checkpoint", "what": "teacher", "who": "Ada", "why": "licence"}
        store.append("revocations", [revoked])
        with pytest.raises(RoundError, match="checkpoint teacher was revoked by Ada: licence"):
            asked("r001", "train")
