"""The loop driven by Dagster's own daemon: the sensor starts each round, with a reader open all the while."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.workspace.context import WorkspaceProcessContext
from dagster._core.workspace.load_target import WorkspaceFileTarget
from dagster_graphql.cli import execute_query
from dagster_graphql.client.query import LAUNCH_PIPELINE_EXECUTION_MUTATION

from resources import process
from rsft_pipeline import rounds
from rsft_pipeline.store import Store

ROOT = Path(__file__).resolve().parent.parent
STOP = {"rounds": 2}


@pytest.fixture
def instance(home, monkeypatch):
    (home / "dagster").mkdir()
    shutil.copy(ROOT / "dagster.yaml", home / "dagster")
    monkeypatch.setenv("DAGSTER_HOME", str(home / "dagster"))
    with dg.DagsterInstance.get() as made:
        yield made


@pytest.fixture
def daemon(instance, tmp_path):
    """Start the daemon as `rsft ui` does; stop it with everything it started."""
    begun = []

    def begin():
        log = open(tmp_path / "daemon.log", "w")  # noqa: SIM115 (as long as the daemon)
        command = [sys.executable, "-m", "dagster._daemon", "run", "-w", str(ROOT / "workspace.yaml")]
        begun.append(subprocess.Popen(command, stdout=log, stderr=log, env=os.environ, start_new_session=True))

    yield begin
    for one in begun:
        os.killpg(one.pid, signal.SIGTERM)
        try:
            one.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(one.pid, signal.SIGKILL)


def known(home, path):
    """Make a recipe known to a home, as `rsft run` does."""
    (home / "recipes").mkdir(exist_ok=True)
    (home / "recipes" / path.name).symlink_to(path)


def workspace(instance):
    return WorkspaceProcessContext(instance, WorkspaceFileTarget([str(ROOT / "workspace.yaml")]))


def turn_on(instance, *sensors):
    """Switch sensors on, as `dagster sensor start` does for one at a time."""
    with workspace(instance) as loaded:
        repository = loaded.create_request_context().get_code_location("rsft").get_repository("__repository__")
        for sensor in sensors:
            instance.start_sensor(repository.get_sensor(sensor))


def launch(instance, selector, tags=()):
    """Launch a run as the UI's buttons do: into the queue."""
    where = {"repositoryLocationName": "rsft", "repositoryName": "__repository__"}
    given = {"selector": {**where, **selector}, "executionMetadata": {"tags": list(tags)}}
    with workspace(instance) as loaded:
        told = execute_query(loaded, LAUNCH_PIPELINE_EXECUTION_MUTATION, {"executionParams": given})
    assert told["data"]["launchPipelineExecution"]["__typename"] == "LaunchRunSuccess", told


def last_ticks(instance, *sensors):
    """Why each of the sensors started nothing when it last looked; None: it did, or has not looked."""
    states = {state.name: state for state in instance.all_instigator_state()}
    of = (states[sensor] for sensor in sensors)
    ticks = [instance.get_ticks(state.instigator_origin_id, state.selector_id, limit=1) for state in of]
    return [tick[0].skip_reason if tick else None for tick in ticks]


def wait_for(what, patience=240):
    deadline = time.monotonic() + patience
    while not what():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(1)


def test_sensors_run_two_recipes_to_their_stop_and_new_prompts_start_another_round(
    home, instance, daemon, write_recipe, tmp_path
):
    inbox = tmp_path / "inbox"
    inbox.mkdir()
    prompts = {"source": "letters:letters", "template": "{question}", "reference": "answer", "eval_fraction": 0.3}
    known(home, write_recipe("first", stop=STOP, prompts={**prompts, "inbox": str(inbox)}))
    known(home, write_recipe("second", stop=STOP))
    turn_on(instance, "first_next_round", "second_next_round", "first_new_prompts")
    daemon()
    with Store.at(home) as reader:

        def finished(recipe):
            return [row["round"] for row in rounds.history(reader, recipe)]

        wait_for(lambda: finished("first") == finished("second") == ["r000", "r001"])
        # Both sensors look once more, and the stop rule holds.
        loops, stopped = (
            ("first_next_round", "second_next_round"),
            ["stopped: rounds used up: 2 finished, 2 allowed"] * 2,
        )
        wait_for(lambda: last_ticks(instance, *loops) == stopped, patience=60)
        assert len(instance.get_runs()) == 4
        assert all(run.tags[process.TAG].endswith(run.run_id) for run in instance.get_runs())  # should one be killed
        overlapping = reader.query(
            """SELECT a.round FROM rounds a JOIN rounds b ON a.recipe = b.recipe AND a.round < b.round
               WHERE a.finished_at > b.started_at"""
        )
        assert overlapping == []

        before = reader.value("SELECT count(*) FROM prompts WHERE recipe = 'first'")
        (inbox / "more.jsonl").write_text(
            '{"question": "ab a", "answer": "a"}\n{"question": "cd d", "answer": "d"}\nnot JSON\n'
        )
        wait_for(lambda: finished("first") == ["r000", "r001", "r002"])
        assert reader.value("SELECT count(*) FROM prompts WHERE recipe = 'first'") == before + 2
        refused = reader.query("SELECT line, reason, raw FROM quarantine WHERE recipe = 'first'")
        assert refused == [{"line": 3, "reason": "broken JSON", "raw": b"not JSON"}]
    wait_for(lambda: all(run.is_success for run in instance.get_runs()), patience=60)


def test_assets_materialised_by_hand_wait_for_the_round_under_way(home, instance, daemon, write_recipe):
    known(home, write_recipe("letters_loop"))
    of_round = [{"key": "dagster/partition", "value": "r000"}]
    instance.add_dynamic_partitions("letters_loop_rounds", ["r000"])
    launch(instance, {"pipelineName": "letters_loop_round"}, of_round)
    daemon()
    wait_for(lambda: instance.get_runs()[0].status == dg.DagsterRunStatus.STARTED)
    by_hand = {"pipelineName": "__ASSET_JOB", "assetSelection": [{"path": ["letters_loop", "prompts"]}]}
    launch(instance, by_hand)
    wait_for(lambda: all(run.is_success for run in instance.get_runs()))
    first, second = sorted(instance.get_run_records(), key=lambda record: record.start_time)
    assert second.start_time >= first.end_time
