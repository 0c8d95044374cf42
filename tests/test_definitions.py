"""What Dagster loads, as one snapshot; which runs sensors and the schedule ask for."""

import json
import logging
import os
import subprocess
import sys
import threading

import dagster as dg
import pytest
from toposort import CircularDependencyError

import definitions
from assets.shared import key
from automation.jobs import LOOP, job_name
from automation.runs import busy, under_way
from automation.schedules import schedules
from automation.sensors import sensors
from resources import process
from resources.accelerator import Accelerator
from rsft_pipeline.recipe.reading import RECIPES, load
from rsft_pipeline.store import Store

SUCCESS = dg.DagsterRunStatus.SUCCESS


def described(defs: dg.Definitions) -> dict:
    """Assets with what people see of them, checks, jobs, sensors and schedules, in plain values."""
    graph = defs.resolve_asset_graph()
    assets = {
        key.to_user_string(): {
            "reads": sorted(parent.to_user_string() for parent in graph.get(key).parent_keys),
            "group": graph.get(key).group_name,
            "kinds": sorted(graph.get(key).kinds),
            "partitions": getattr(graph.get(key).partitions_def, "name", None),
            "description": (graph.get(key).description or "").splitlines()[0],
        }
        for key in sorted(graph.get_all_asset_keys())
    }
    return {
        "assets": assets,
        "checks": {
            f"{key.asset_key.to_user_string()}:{key.name}": "blocking" if graph.get(key).blocking else "reports"
            for key in sorted(graph.asset_check_keys, key=str)
        },
        "jobs": sorted(job.name for job in defs.jobs),
        "sensors": sorted(sensor.name for sensor in defs.sensors),
        "schedules": sorted(schedule.name for schedule in defs.schedules),
    }


def test_the_definitions_of_a_recipe(home, write_recipe, snapshot):
    prompts = {"source": "letters:letters", "template": "{question}", "reference": "answer", "inbox": "inbox"}
    recipe = load(write_recipe(schedule="0 3 * * *", owners=["team:models"], prompts=prompts))
    defs = definitions.build([recipe])
    dg.Definitions.validate_loadable(defs)
    assert described(defs) == snapshot


def test_every_recipe_of_the_project_is_loaded_and_a_broken_one_spares_the_others(home, write_recipe, caplog):
    (home / "recipes").mkdir()
    (home / "recipes" / "broken.yaml").write_text("description: 1\nmodle: {}")
    (home / "recipes" / "letters_loop.yaml").symlink_to(write_recipe())
    expected = {f"{file.stem}_round" for file in RECIPES.glob("*.yaml")} | {"letters_loop_round"}
    assert {job.name for job in definitions.defs().jobs} == expected
    assert "broken.yaml" in caplog.text and "Did you mean 'model'" in caplog.text
    # What only Dagster can judge: the file is a recipe, but a cron line has five fields, and an owner an address.
    for name, section in (("never", {"schedule": "every night"}), ("orphan", {"owners": ["nobody"]})):
        (home / "recipes" / f"{name}.yaml").symlink_to(write_recipe(name, **section))
    assert {job.name for job in definitions.defs().jobs} == expected
    assert all(f"left out: {home.parent}/elsewhere/{name}.yaml" in caplog.text for name in ("never", "orphan"))


def test_the_schedule_starts_the_next_round_until_a_stop_rule_holds(home, write_recipe, tmp_path):
    recipe = load(write_recipe(schedule="0 3 * * *"))
    (schedule,) = schedules(recipe)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def tick():
            loaded = definitions.build([recipe]).get_repository_def()
            context = dg.build_schedule_context(
                instance=instance, repository_def=loaded, resources=definitions.usual_resources()
            )
            return schedule.evaluate_tick(context)

        (request,) = tick().run_requests
        assert request.partition_key == "r000"
        assert instance.get_dynamic_partitions("letters_loop_rounds") == ["r000"]
        evaluated = json.dumps({"pass_at_1": {"value": 0.5}})
        finished = {"recipe": "letters_loop", "state": "finished", "promoted": True, "tokens": 1}
        with Store.at(home) as store:
            for n in range(recipe.stop.rounds):
                store.append("rounds", [{**finished, "round": f"r{n:03d}", "champion_eval": evaluated}])
        assert "rounds used up: 5 finished, 5 allowed" in tick().skip_message


def test_new_files_are_asked_about_again_until_their_round_is_finished(home, write_recipe, tmp_path):
    inbox = tmp_path / "inbox"
    prompts = {"source": "letters:letters", "template": "{question}", "reference": "answer", "inbox": str(inbox)}
    recipe = load(write_recipe(prompts=prompts))
    _, sensor = sensors(recipe)
    cursor = None
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def tick():
            nonlocal cursor
            found = ticked(sensor, recipe, instance, cursor)
            if isinstance(found, dg.SkipReason):
                return found.skip_message
            cursor = found.cursor
            (request,) = found.run_requests
            return request.run_key.partition(" after ")[2]

        assert tick() == f"there is no folder {inbox} yet"
        inbox.mkdir()
        assert "nothing new" in tick()
        (inbox / "more.jsonl").write_text('{"question": "ab a", "answer": "a"}\n')
        before = ""
        for _ in range(3):
            assert tick() == before
            before = ended(instance, recipe, "r000", dg.DagsterRunStatus.FAILURE)
        assert "r000 failed 3 times" in tick()
        (inbox / "broken.jsonl").symlink_to("/proc/self/mem")  # a file that gives an I/O error stops no other
        (inbox / "mended.jsonl").write_text('{"question": "cd c", "answer": "c"}\n')
        assert tick() == before
        with Store.at(home) as store:
            begun = {"recipe": recipe.name, "round": "r000", "dagster_run_id": ended(instance, recipe, "r000", SUCCESS)}
            store.append("rounds", [{**begun, "state": "started"}])  # again, from the asset graph
            assert tick() == begun["dagster_run_id"]
            store.replace("rounds", [{**begun, "state": "finished"}], recipe=recipe.name)
        assert "nothing new" in tick()
        (inbox / "more.jsonl").unlink()  # which was read
        assert "nothing new" in tick()
        write_recipe(prompts={**prompts, "inbox": None})
        assert "has no inbox any more" in tick()


def ticked(sensor, recipe, instance, cursor=None):
    """What a tick of a sensor comes to."""
    loaded = definitions.build([recipe]).get_repository_def()
    with dg.build_sensor_context(
        instance=instance, repository_def=loaded, resources=definitions.usual_resources(), cursor=cursor
    ) as context:
        return sensor(context)


def ended(instance, recipe, round_key, status, **tags):
    """A run of a round that has come to this; its id."""
    tags = {LOOP: recipe.name, "dagster/partition": round_key, **tags}
    return instance.add_run(dg.DagsterRun(job_name=job_name(recipe), tags=tags, status=status)).run_id


def test_what_failed_before_a_round_succeeded_counts_no_more_once_it_is_revoked(home, write_recipe, tmp_path):
    recipe = load(write_recipe())
    (sensor,) = sensors(recipe)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def tick():
            found = ticked(sensor, recipe, instance)
            return found.skip_message if isinstance(found, dg.SkipReason) else found.run_requests[0].run_key

        assert tick() == "r000"
        for _ in range(3):
            last = ended(instance, recipe, "r000", dg.DagsterRunStatus.FAILURE)
        assert "r000 failed 3 times" in tick()
        made = ended(instance, recipe, "r000", SUCCESS)
        with Store.at(home) as store:
            row = {"recipe": recipe.name, "round": "r000", "dagster_run_id": made}
            for state in ("revoked", "started"):  # begun from the asset graph, and left there
                store.replace("rounds", [{**row, "state": state}], recipe=recipe.name)
                assert tick() == f"r000 after {made}"
            last = ended(instance, recipe, "r000", dg.DagsterRunStatus.FAILURE)
            assert tick() == f"r000 after {last} {made}"


def test_a_step_that_was_run_again_by_itself_leaves_no_request_that_was_made_before(home, write_recipe, tmp_path):
    recipe = load(write_recipe())
    (sensor,) = sensors(recipe)
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        keys = []
        for status in (dg.DagsterRunStatus.FAILURE, SUCCESS, SUCCESS):  # the later ones are of one step alone
            keys.append(ticked(sensor, recipe, instance).run_requests[0].run_key)
            ended(instance, recipe, "r000", status)
        assert len({*keys, ticked(sensor, recipe, instance).run_requests[0].run_key}) == 4


def test_a_run_over_assets_of_two_recipes_is_of_both(home, write_recipe, tmp_path):
    both = [load(write_recipe()), load(write_recipe(name="other"))]
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        chosen = frozenset(key(recipe, "policy") for recipe in both)
        instance.add_run(dg.DagsterRun(job_name="by_hand", asset_selection=chosen, status=dg.DagsterRunStatus.STARTED))
        assert [busy(instance, recipe) for recipe in both] == [True, True]


def test_a_run_whose_process_is_gone_is_told_from_one_that_goes_on(home, write_recipe, tmp_path):
    recipe = load(write_recipe())
    gone = subprocess.Popen([sys.executable, "-c", "pass"])
    gone.wait()
    started, canceling = dg.DagsterRunStatus.STARTED, dg.DagsterRunStatus.CANCELING
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:

        def tagged(run_id, pid=None):
            tag = process.this_process(run_id)
            instance.add_run_tags(run_id, {process.TAG: tag.replace(f" {os.getpid()} ", f" {pid or os.getpid()} ")})
            return run_id

        killed = tagged(ended(instance, recipe, "r000", started), gone.pid)
        assert not busy(instance, recipe)
        assert instance.get_run_by_id(killed).status == dg.DagsterRunStatus.FAILURE
        elsewhere = process.this_process("a run").replace("pid:[", "pid:[1")  # a container of the same name
        assert not process.gone(elsewhere.replace(f" {os.getpid()} ", f" {gone.pid} "), "a run")
        # Dagster copies the tags of a run that is executed again.
        copied = instance.get_run_by_id(killed).tags[process.TAG]
        again = ended(instance, recipe, "r000", dg.DagsterRunStatus.NOT_STARTED, **{process.TAG: copied})
        assert [run.run_id for run in under_way(instance)] == [again]
        instance.delete_run(again)
        for status in (started, canceling):
            alive = tagged(ended(instance, recipe, "r000", status))
            assert busy(instance, recipe)
            instance.delete_run(alive)


def test_who_waits_for_the_accelerator_says_so_and_has_it_when_it_is_free(home, caplog):
    accelerator, had = Accelerator(kind="cpu"), threading.Event()
    log = logging.getLogger("lease")

    def other():
        with accelerator.lease(log):
            had.set()

    waiting = threading.Thread(target=other)
    with accelerator.lease(log):
        waiting.start()
        assert not had.wait(0.5)
    waiting.join(10)
    assert had.is_set() and caplog.text.count("waiting for the accelerator") == 1


def test_a_cycle_from_checkpoint_to_policy_would_be_refused_which_is_why_the_policy_looks_it_up():
    @dg.asset(deps=["checkpoint"])
    def policy(): ...

    @dg.asset(deps=[policy])
    def checkpoint(): ...

    with pytest.raises(CircularDependencyError):
        dg.Definitions.validate_loadable(dg.Definitions(assets=[policy, checkpoint]))
