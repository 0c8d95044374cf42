"""Recipes: what is wrong is said with file, field, expectation and the nearest name, before anything runs."""

import jsonschema
import pytest
import yaml

from rsft_pipeline.recipe.reading import RECIPES, find, load, schema
from rsft_pipeline.recipe.recipe import Recipe
from rsft_pipeline.recipe.section import RecipeError


def changed(write_recipe, **sections):
    with pytest.raises(RecipeError) as caught:
        load(write_recipe(**sections))
    return str(caught.value)


def test_every_recipe_of_the_project_loads_and_satisfies_its_own_schema():
    files = sorted(RECIPES.glob("*.yaml"))
    assert files
    for file in files:
        assert load(file).name == file.stem
        jsonschema.validate(yaml.safe_load(file.read_text()), schema())


def test_every_field_is_described():
    def undescribed(schema):
        return [
            f"{name}.{field}"
            for name, section in schema["$defs"].items()
            for field, value in section["properties"].items()
            if field not in ("kind", "rule") and "description" not in value
        ]

    assert undescribed(Recipe.model_json_schema()) == []


def test_a_wrong_key_is_named_with_file_path_and_nearest_name(write_recipe):
    message = changed(write_recipe, sampling={"drawz": 4})
    assert "letters_loop.yaml" in message
    assert "sampling.drawz: unknown field. Did you mean 'draws'? Expected one of: batch_size, draws" in message


def test_a_key_that_is_there_twice_is_named_with_its_line(write_recipe):
    path = write_recipe()
    lines = path.read_text().count("\n")
    path.write_text(path.read_text() + "sampling: {draws: 99}\n")
    with pytest.raises(RecipeError, match=rf"'sampling' is there twice\n.*line {lines + 1}"):
        load(path)


def test_a_wrong_key_inside_one_of_several_kinds_names_the_fields_of_that_kind(write_recipe):
    message = changed(write_recipe, acceptance={"rule": "top_k", "k": 1, "threshold": 3})
    assert "acceptance.threshold: unknown field" in message
    assert "Expected one of: cap, distinct, k, rule" in message


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        ({"sampling": {"draws": "many"}}, "sampling.draws: Input should be a valid integer"),
        ({"sampling": {"temperature": 0}}, "sampling.temperature: Input should be greater than 0 (got 0)"),
        ({"acceptance": {"rule": "treshold"}}, "acceptance.rule: got 'treshold'. Did you mean 'threshold'?"),
        ({"acceptance": {"k": 2}}, "acceptance.rule: this field is required. Expected one of: threshold, top_k"),
        (
            {"scoring": {"scorers": [{"match": "exact"}]}},
            "scoring.scorers.0.kind: this field is required. Expected one of: answer, blocklist",
        ),
        (
            {"acceptance": {"rule": "rejection", "target": "answer"}},
            "acceptance.target is 'answer', whose scores are no log-probabilities",
        ),
        ({"training": {"start": "champ"}}, "training.start: got 'champ'. Did you mean 'champion'?"),
        ({"scoring": {"scorers": []}}, "scoring.scorers: List should have at least 1 item"),
        ({"acceptance": {"rule": "threshold"}}, "acceptance.threshold: this field is required"),
        (
            {"acceptance": {"rule": "rejection", "M": "estmate"}},
            "acceptance.M: got 'estmate'. Did you mean 'estimate'? Expected one of: estimate, calibrate; or: Input "
            "should be a valid number, unable to parse string as a number (got 'estmate')",
        ),
        ({"stop": 3}, "stop: got 3. Expected a section, whose fields are among: patience, rounds, target, tokens"),
        ({"acceptance": 3}, "acceptance: got 3. Expected a section, whose fields are among: M, beta"),
        ({"model": {"source": "bootstrap"}}, "go together"),
        ({"evaluation": {"draws": 2, "k": 3}}, "`k` cannot be larger than `draws`"),
        ({"seed": 10**24}, "seed: Input should be less than or equal to 9223372036854775807"),
        ({"acceptance_rate": [0.9, 0.1]}, "acceptance_rate: expected two shares from 0 to 1, the lower one first"),
        ({"acceptance_rate": [-5, 70]}, "acceptance_rate: expected two shares from 0 to 1, the lower one first"),
        (
            {"acceptance": {"rule": "threshold", "threshold": "calibrate", "share": 0.5, "pilot": 9}},
            "`acceptance.pilot` is 9: it has to fit into the 6 `sampling.draws`",
        ),
        (
            {"acceptance": {"rule": "rejection", "M": "estimate", "pilot": 6}},
            "the 6 `sampling.draws`, and another draw, since the pilot's are never accepted",
        ),
        ({"stop": {"target": 1.5}}, "stop.target is 1.5, and pass_at_1 is a share, 1 at most"),
        ({"promotion": {"require": "not_worse"}}, "`require: not_worse` needs a `margin:` above 0"),
        (
            {
                "scoring": {"scorers": [{"kind": "likelihood", "source": "other"}]},
                "acceptance": {"rule": "rejection", "target": "likelihood"},
                "sampling": {"stop": ["\n"]},
            },
            "acceptance.target: 'likelihood' takes every finished completion as ended by the end-of-sequence token",
        ),
        ({"acceptance": {"rule": "rejection", "target": "teacher"}}, "expected one of policy, answer"),
        ({"scoring": {"scorers": [{"kind": "regex", "pattern": "("}]}}, "is not a regular expression"),
        ({"training": {"clip": float("inf")}}, "training.clip: Input should be a finite number"),
        (
            {"scoring": {"scorers": [{"kind": "function", "function": "a:b", "arguments": {"x": float("nan")}}]}},
            "`arguments` are recorded as JSON, which has no such value",
        ),
    ],
)
def test_a_wrong_value_says_what_was_expected(write_recipe, sections, expected):
    assert expected in changed(write_recipe, **sections)


def test_yaml_that_is_broken_or_no_mapping_is_said_so(tmp_path):
    for text, expected in (
        ("a: [", "not readable as YAML"),
        ("a: 2024-13-45", "month must be in 1..12"),
        ("- 1", "expected a mapping"),
        ("", "expected a mapping"),
        ("a: &x [*x]", "not readable as YAML"),  # a list in itself
    ):
        path = tmp_path / "broken.yaml"
        path.write_text(text)
        with pytest.raises(RecipeError, match=expected):
            load(path)


def test_overrides_reach_into_sections_and_lists(write_recipe):
    path = write_recipe()
    overrides = {"sampling.draws": "3", "scoring.scorers.0.match": "numeric", "stop.target": "0.5"}
    recipe = load(path, overrides)
    assert (recipe.sampling.draws, recipe.scoring.scorers[0].match, recipe.stop.target) == (3, "numeric", 0.5)
    assert recipe.digest != load(path).digest
    with pytest.raises(RecipeError, match=r"sampling\.drawz"):
        load(path, {"sampling.drawz": "3"})
    with pytest.raises(RecipeError, match="expected a list position from 0 to 0"):
        load(path, {"scoring.scorers.7": "{}"})
    with pytest.raises(RecipeError, match="description is a value, not a section"):
        load(path, {"description.a": "1"})


def test_a_recipe_is_found_by_name_or_path_and_near_names_are_offered(write_recipe):
    path = write_recipe()
    assert find(path) == path
    assert find("arithmetic") == RECIPES / "arithmetic.yaml"
    with pytest.raises(RecipeError, match="Did you mean 'arithmetic'"):
        find("arithmetics")
    with pytest.raises(RecipeError, match="there is no such file"):
        find(path.with_name("nowhere.yaml"))


def test_a_name_that_dagster_cannot_take_is_refused(write_recipe):
    with pytest.raises(RecipeError, match="lower-case letters"):
        load(write_recipe(name="My-Recipe"))


def test_an_override_changes_its_own_place_alone_where_yaml_names_two_at_once(write_recipe):
    path, shared = write_recipe(), {"tolerance": 50}
    tree = yaml.safe_load(path.read_text())
    scorer = {"kind": "function", "function": "a:b", "arguments": shared}
    tree["scoring"]["scorers"] = [{**scorer, "name": name} for name in ("one", "two")]
    path.write_text(yaml.dump(tree))
    assert "*id" in path.read_text()  # an alias
    recipe = load(path, {"scoring.scorers.0.arguments.tolerance": "7"})
    assert [one.arguments for one in recipe.scoring.scorers] == [{"tolerance": 7}, {"tolerance": 50}]


def test_a_recipe_extends_another_whole_section_by_whole_section(write_recipe):
    beneath = write_recipe()
    path = beneath.with_name("variant.yaml")
    path.write_text("extends: letters_loop\nsampling: {draws: 3}\n")
    made, other = load(path), load(beneath)
    assert made.name == "variant"
    assert (made.sampling.draws, made.sampling.max_tokens) == (3, 64)  # not 2, as beneath: nothing is merged
    assert made.model == other.model and made.training == other.training
    assert load(path, {"sampling.draws": "5"}).sampling.draws == 5


def test_what_cannot_be_extended_is_said(write_recipe):
    beneath = write_recipe()
    variant, third = beneath.with_name("variant.yaml"), beneath.with_name("third.yaml")
    variant.write_text("extends: letter_loop\n")
    with pytest.raises(
        RecipeError, match=r"extends: there is no recipe .*letter_loop\.yaml.* Did you mean 'letters_loop'"
    ):
        load(variant)
    variant.write_text("extends: letters_loop\n")
    third.write_text("extends: variant\n")
    with pytest.raises(RecipeError, match=r"variant\.yaml extends another recipe itself; extend that one"):
        load(third)


def test_a_name_whose_file_is_right_here_is_pointed_to(write_recipe, monkeypatch):
    monkeypatch.chdir(write_recipe().parent)
    with pytest.raises(
        RecipeError, match=r"no recipe is called 'letters_loop'\. Did you mean the file letters_loop.yaml\?"
    ):
        find("letters_loop")


def test_recipes_differ_by_fields_that_set_takes(write_recipe):
    rule, odd = {"rule": "top_k", "k": 2}, "😀 é \u2028 \x07"
    one, other = (
        load(write_recipe()),
        load(write_recipe("other", seed=7, description=odd, acceptance=rule, sampling={"stop": ["\n"]})),
    )
    found = one.differing(other)
    assert set(found) == {
        "seed",
        "description",
        "acceptance",
        "sampling.draws",
        "sampling.max_tokens",
        "sampling.wave_size",
        "sampling.stop",
    }
    assert found["description"][1] == r'"😀 é \U00002028 \u0007"'
    assert found["seed"] == ("0", "7") and found["sampling.stop"] == ("[]", r'["\n"]') and one.differing(one) == {}
    again = load(other.file, {path: here for path, (here, _) in found.items()})
    assert (
        again.digest == one.digest
        and load(one.file, {path: v for path, (_, v) in found.items()}).digest == other.digest
    )
