"""Sampling: what a candidate's id depends on, and how waves are cut."""

from rsft_pipeline import sampling
from rsft_pipeline.recipe.sampling import Until

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
    ):
        assert not set(first) & set(ids(other))


def test_a_wave_holds_all_draws_of_its_prompts_and_like_lengths_together(recipe):
    waves = plan(recipe, draws=4, wave_size=10)
    assert [len(wave) for wave in waves] == [8] * 5
    lengths = [len(request.prompt_ids) for wave in waves for request in wave]
    assert lengths == sorted(lengths)


def test_with_until_the_draws_come_in_passes_and_keep_their_ids_and_waves_are_random_samples(recipe):
    until = Until(per_prompt=1, draws=10)
    how = recipe.sampling.model_copy(update={"until": until, "draws": 4})
    assert sampling.passes(how) == [range(0, 4), range(4, 8), range(8, 10)]
    assert set(ids(plan(recipe, draws=10))) == set(ids(plan(recipe, draws=4, until=until)))
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
    assert sampling.choose(rows, 99, "r000") == rows
