"""The command line, as a person or a scheduler uses it: real processes, real output."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap
import time
import tomllib

import dagster as dg
import jsonschema
import letters_store as letters
import pytest
import yaml

from cli import here, ui
from resources import pages
from rsft_pipeline.home import ROOT
from rsft_pipeline.recipe.reading import RECIPES
from rsft_pipeline.store import Store


def rsft(*words, cwd=None):
    command = [sys.executable, "-m", "cli.main", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=os.environ, timeout=300, check=False)


NO_REFERENCE = {"scorers": [{"kind": "regex", "pattern": "a"}]}
SLOW = """
import os, signal, threading, duckdb

def rows():
    yield {"question": "ab"}  # `rsft run` reads no further before it begins
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    duckdb.sql("SELECT sum(hash(range)) FROM range(1_000_000_000_000)").fetchall()
"""


@pytest.fixture
def path(home, write_recipe):
    return write_recipe()


def test_run_prints_its_rounds_and_status_remembers_them(home, path, tmp_path):
    done = rsft("run", path, "--rounds", "2", "--set", "sampling.draws=4", "--json", cwd=tmp_path)
    assert done.returncode == 0 and "[transformers]" not in done.stderr, done.stderr
    told = json.loads(done.stdout)
    assert told["recipe"] == "letters_loop"
    assert [one["round"] for one in told["rounds"]] == ["r000", "r001"]
    first, second = told["rounds"]
    assert set(first) >= {
        "round", "candidates", "accepted", "distinct_accepted", "acceptance_rate", "eval", "policy_eval",
        "promoted", "checkpoint", "mlflow_run_id", "dagster_run_id",
    }  # fmt: skip
    assert set(first["eval"]) == {"pass_at_1", "pass_at_k", "mean_score"}
    assert first["acceptance_rate"] == first["accepted"] / first["candidates"]
    assert second["policy_eval"] == (first["eval"] if first["promoted"] else first["policy_eval"])
    assert told["champion"] in {first["checkpoint"], second["checkpoint"]}

    status = rsft("status", path, "--json")
    assert json.loads(status.stdout) == told and status.stderr == ""
    assert "r001" in rsft("status", path).stdout

    # Dagster ran them: runs, tags and partitions are in its instance, and its UI will load the recipe.
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        assert instance.get_dynamic_partitions("letters_loop_rounds") == ["r000", "r001"]
        recorded = instance.get_run_by_id(first["dagster_run_id"])
        assert recorded.is_success and json.loads(recorded.tags["rsft/set"]) == {"sampling.draws": "4"}
    assert (home / "recipes" / "letters_loop.yaml").resolve() == path


def test_status_names_the_rounds_where_none_is_finished(home):
    begun = [
        {"recipe": "one", "round": "r000", "state": "revoked", "dagster_run_id": "of a run that Dagster has forgotten"},
        {"recipe": "one", "round": "r001", "state": "started", "dagster_run_id": "of another"},
    ]
    with Store.at(home) as store:
        store.append("rounds", begun)
        store.append("quarantine", [{"recipe": "one", "reason": reason} for reason in ("empty", "too long", "empty")])
    status = rsft("status", "one")
    assert "one: rows refused: 2 empty, 1 too long (Quarantine, in the audit pages)" in status.stdout
    assert "one r000: revoked: `rsft run one` runs it again\n" in status.stdout
    assert "one r001: begun, not finished: `rsft run one` resumes it\n" in status.stdout
    assert json.loads(rsft("status", "one", "--json").stdout) == {
        "recipe": "one",
        "rounds": [],
        "unfinished": {"r000": "revoked", "r001": "started"},
        "champion": None,
        "stopped": None,
    }


@pytest.mark.parametrize(
    ("tag", "words"),
    [
        (
            '{"sampling.draws": 4, "sampling.stop": ["a"]}',
            ["--set", "sampling.draws=4", "--set", 'sampling.stop=["a"]'],
        ),
        ("[", []),  # launched with this tag by hand; the run failed because of it
    ],
)
def test_status_repeats_what_a_run_was_launched_with(home, tag, words):
    with here.instance() as instance:
        failed = dg.DagsterRun("one_round", tags={"rsft/set": tag}, status=dg.DagsterRunStatus.FAILURE)
        instance.add_run(failed)
    with Store.at(home) as store:
        row = {"recipe": "one", "round": "r000", "state": "started", "dagster_run_id": failed.run_id}
        store.append("rounds", [row])
    again = shlex.join(["rsft", "run", "one", *words])
    assert f"one r000: begun, not finished: `{again}` resumes it" in rsft("status", "one").stdout


def test_status_marks_rounds_that_were_judged_otherwise(home):
    with letters.write(home) as store:
        assert "was judged by other" not in rsft("status", letters.RECIPE).stdout
        stricter = '{"evaluation": {"pass_above": 0.9}}'
        changed = "UPDATE rounds SET settings = json_merge_patch(settings, ?) WHERE round = 'r001'"
        store.commit(lambda connection: connection.execute(changed, [stricter]))
    told = rsft("status", letters.RECIPE).stdout
    assert "r001 was judged by other scorers or settings of `evaluation` than r000: rsft audit diff letters" in told


def test_a_name_with_a_dot_is_no_other_recipe(home):
    with Store.at(home) as store:
        store.append("rounds", [{"recipe": "one", "round": "r000", "state": "started", "dagster_run_id": "gone"}])
    for words in (("status", "one.typo"), ("audit", "diff", "one.typo", "r000", "r000")):
        done = rsft(*words)
        assert done.returncode == 2 and "'one.typo'" in done.stderr


def test_stop_rules_end_a_run_and_say_why(path):
    done = rsft("run", path, "--set", "stop.rounds=1", "--json")
    assert len(json.loads(done.stdout)["rounds"]) == 1
    assert "rounds used up: 1 finished, 1 allowed" in done.stderr
    again = rsft("run", path, "--set", "stop.rounds=1", "--json")
    assert json.loads(again.stdout)["rounds"] == []


def test_one_more_round_for_the_inbox_is_named_where_asking_for_it_runs_one(home, write_recipe):
    letters.write(home).close()
    prompts = {"source": "letters:letters", "template": "{question}", "reference": "answer", "inbox": "more"}
    path = write_recipe(letters.RECIPE, prompts=prompts, stop={"rounds": 1})
    named = f"1 allowed; to read new files in {path.parent / 'more'}: rsft run {letters.RECIPE} --rounds 1\n"
    assert named in rsft("run", path).stdout
    reached = rsft("run", path, "--set", "stop.target=0").stdout
    assert "no further round: target reached" in reached and "new files" not in reached


def test_a_round_that_fails_says_where_and_why_and_exits_with_1(path):
    done = rsft("run", path, "--rounds", "1", "--set", "acceptance.threshold=1.0", "--json")
    assert done.returncode == 1
    lines = done.stderr.splitlines()
    lines = lines[lines.index("letters_loop r000 failed") :]
    assert lines[1].startswith("  check something_accepted: nothing was accepted (below threshold: ")
    assert "Combined scores are from 0 to 1, the rule is threshold (" in lines[1] and "threshold 1" in lines[1]
    told = json.loads(done.stdout)
    assert told["rounds"] == [] and told["unfinished"] == {"r000": "started"}
    assert told["failed"]["round"] == "r000" and not told["failed"]["interrupted"]
    assert told["failed"]["why"] == [lines[1].strip()]
    assert told["failed"]["dagster_run_id"] in lines[2]
    assert "Traceback" not in done.stderr and "Stack Trace" not in done.stderr  # the message says what is wrong
    again = "`rsft run letters_loop --set acceptance.threshold=1.0` resumes it"
    standing = f"letters_loop r000: begun, not finished: {again} (it ended with: {lines[1].strip()})"
    assert standing in rsft("status").stdout


def test_a_round_that_begins_again_says_what_it_had_otherwise_before(path):
    rsft("run", path, "--rounds", "1", "--set", "acceptance.threshold=1.0", "--set", 'sampling.stop=["\\n"]')
    again = rsft("run", path, "--rounds", "1").stdout
    assert "letters_loop r000 was begun with other settings; it starts over with the present ones:" in again
    assert "  acceptance.threshold was 1.0, is 0.5\n" in again
    (was,) = re.findall("as before: (.*)", again)
    assert was == r"""rsft run letters_loop --set 'sampling.stop=["\n"]' --set acceptance.threshold=1.0"""
    stricter = rsft("run", path, "--rounds", "1", "--set", "acceptance.threshold=1.0", "--set", "seed=3")
    assert "other settings" not in stricter.stdout  # a round of its own
    again = rsft("run", path, "--rounds", "1", "--set", "seed=3", "--set", "acceptance.cap=4").stdout
    as_it_was = "rsft run letters_loop --set seed=3 --set acceptance.cap=2 --set acceptance.threshold=1.0"
    assert f"as before: {as_it_was}\n" in again


def test_a_rule_that_can_decide_on_nothing_says_so_without_a_stack_and_the_round_is_finished_first(path):
    rule = "acceptance={rule: threshold, threshold: calibrate, share: 0.001}"
    done = rsft("run", path, "--rounds", "1", "--set", rule)
    assert done.returncode == 1 and "acceptance.threshold cannot be calibrated on the pilot" in done.stdout
    assert "Stack Trace" not in done.stderr and "ValueError" not in done.stdout + done.stderr
    again = rsft("run", path, "--set", "stop.rounds=1", "--json")  # what was begun is finished
    assert [one["round"] for one in json.loads(again.stdout)["rounds"]] == ["r000"]
    begun = rsft("run", path, "--rounds", "1", "--set", rule)
    assert begun.returncode == 1 and "r001 failed" in begun.stdout
    last = rsft("run", path, "--set", "stop.rounds=1", "--json")  # though the one round was used up
    assert [one["round"] for one in json.loads(last.stdout)["rounds"]] == ["r001"]


def test_an_error_that_is_not_of_the_project_comes_with_its_stack(home, path):
    (home / "models").touch()  # where a folder is to be
    done = rsft("run", path, "--rounds", "1")
    assert done.returncode == 1
    assert "letters_loop r000 failed" in done.stdout
    assert "bootstrap.py" in done.stderr


def test_an_mlflow_that_cannot_be_had_is_told_before_anything_runs(home, path, monkeypatch):
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        for uri in (f"sqlite:///{path}/mlflow.db", f"http://127.0.0.1:{nobody.getsockname()[1]}", "nowhere://at.all"):
            monkeypatch.setenv("RSFT_MLFLOW", uri)
            done = rsft("run", path, "--rounds", "1")
            assert done.returncode == 2 and "Traceback" not in done.stderr
            assert "RSFT_MLFLOW: MLflow does not answer there: " in done.stderr
    assert not (home / "store").exists()


def test_nothing_is_revoked_that_mlflow_could_not_be_told_of(mine, monkeypatch):
    monkeypatch.setenv("RSFT_MLFLOW", "http://127.0.0.1:9")
    (one, *_) = mine.query("SELECT candidate_id FROM decisions WHERE accepted")
    done = rsft("audit", "revoke", one["candidate_id"], "--by", "me", "--why", "because")
    assert done.returncode == 2 and "MLflow does not answer there" in done.stderr
    assert "Traceback" not in done.stderr and mine.query("SELECT * FROM revocations") == []
    assert rsft("audit", "trace", one["candidate_id"]).stderr.startswith("error: RSFT_MLFLOW")
    assert rsft("audit", "trace", one["candidate_id"], "--quick").returncode == 0


def test_stop_rules_are_those_of_the_file_as_it_is_by_then(home, write_recipe):
    path = write_recipe(prompts={"source": "editing:rows", "template": "{question}", "reference": "answer"},
                        training={"epochs": 1}, stop={"rounds": 3})  # fmt: skip
    (path.parent / "editing.py").write_text(f"""
from pathlib import Path

def rows():
    file = Path({str(path)!r})
    file.write_text(file.read_text().replace("rounds: 3", "rounds: 1"))
    for a in "abcdefghij":
        yield from ({{"question": a + b, "answer": b}} for b in "abcdefghij")
""")
    assert "rounds: 3" in path.read_text()
    done = rsft("run", path, "--json")
    assert [one["round"] for one in json.loads(done.stdout)["rounds"]] == ["r000"], done.stderr


def test_a_signal_while_duckdb_works_is_an_interruption_and_no_failure(home, write_recipe):
    path = write_recipe(prompts={"source": "slow:rows", "template": "{question}"}, scoring=NO_REFERENCE)
    (path.parent / "slow.py").write_text(SLOW)
    done = rsft("run", path, "--rounds", "1", "--json")
    assert done.returncode == 130
    assert "letters_loop r000 was interrupted; to resume it: rsft run letters_loop --rounds 1\n" in done.stderr
    failed = json.loads(done.stdout)["failed"]
    assert failed["interrupted"] and failed["why"] == ["letters_loop__prompts: interrupted"]


def test_what_a_terminal_sends_to_all_of_a_runs_processes_is_told_in_a_line(home, write_recipe, tmp_path):
    path = write_recipe(prompts={"source": "waiting:rows", "template": "{question}"}, scoring=NO_REFERENCE)
    begun = tmp_path / "begun"
    (path.parent / "waiting.py").write_text(f"""
import time
from pathlib import Path

def rows():
    yield {{"question": "ab"}}
    Path({str(begun)!r}).touch()
    time.sleep(300)
""")
    command = [sys.executable, "-m", "cli.main", "run", str(path)]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, start_new_session=True, **streams) as process:
        deadline = time.monotonic() + 120
        while not begun.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        said, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "letters_loop r000 was interrupted" in said
    assert "Traceback" not in said + errors


def test_an_interrupt_while_the_command_is_still_loading_ends_it_without_a_traceback(home):
    script = """
        import signal
        from cli import rsft

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
        rsft()
    """
    command = [sys.executable, "-X", "importtime", "-c", textwrap.dedent(script), "status"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while "typer" not in process.stderr.readline():  # a line for each module once it is loaded
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=120)
    assert (process.returncode, said) == (130, "") and "Traceback" not in errors


def test_a_signal_while_duckdb_works_outside_of_a_round_is_told_in_a_word(home):
    script = """
        import os, signal, threading, duckdb
        from cli import main, status

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it

        def slow(*_):
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
            duckdb.sql("SELECT sum(hash(range)) FROM range(1_000_000_000_000)").fetchall()

        status.show = slow
        main.main()
    """
    with Store.at(home) as store:
        store.append("rounds", [{"recipe": "one", "round": "r000", "state": "started"}])
    command = [sys.executable, "-c", textwrap.dedent(script), "status"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "interrupted\n")


def test_streams_that_are_closed_stop_no_command(home):
    for closed, status in ((">&-", 0), ("2>&-", 2), (">&- 2>&-", 0)):
        words = f'exec "$0" -m cli.main {"status" if status == 0 else "check nothing"} {closed}'
        done = subprocess.run(["sh", "-c", words, sys.executable], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (status, "")


def test_progress_is_told_where_there_is_no_terminal(home, tmp_path):
    script = """
        import logging, sys
        from rsft_pipeline import progress
        progress.watch()
        progress.LINE_EVERY = 0
        with progress.track("r000 draws", None, logging.getLogger()) as show:
            show(3, "waves", 9)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == "r000 draws: 3 of 9 waves\n" and not done.stdout
    reader, writer = os.pipe()
    os.close(reader)  # if nobody reads the progress any more, that is not a failure
    done = subprocess.run(
        [*command[:-1], command[-1] + "\nprint('on')"], stdout=subprocess.PIPE, stderr=writer, text=True
    )
    os.close(writer)
    assert done.stdout == "on\n"


def test_a_model_that_the_hub_does_not_give_is_named_with_the_remedy(path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    done = rsft("run", path, "--rounds", "1", "--set", "model={source: no-one/nothing}")
    assert done.returncode == 1
    assert "the model no-one/nothing is neither a local folder nor could it be fetched" in done.stdout
    assert "--set model.source=/path/to/folder" in done.stdout


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("run", "arithmetics"), "Did you mean 'arithmetic'?"),
        (("check", "arithmetic", "--set", "sampling.draw=1"), "Did you mean 'draws'?"),
        (("check", "arithmetic", "--set", "sampling"), "expected a.b=value"),
        (("run", "arithmetic", "--set", "prompts.source=nowhere.jsonl"), "nowhere.jsonl"),
        (("status", "arithmetic"), "has no rounds yet"),
        (("check", "elsewhere/mine.yml"), "ends in .yaml; rename it"),
        (("check", "arithmetic", "--set", "model.revision=2024-02-30"), "is not YAML"),
        (("check", "~nobody_of_that_name/x.yaml"), "home directory"),
        (("check", "arithmetic", "--set", "scoring.scorers.²=1"), "expected a list position"),
        (("check", "arithmetic", "--set", "prompts.template=what is {sum}?"), "no column 'sum'; there is 'question'"),
        (("check", "arithmetic", "--set", "group_by=sum"), "group_by: no prompt has a column 'sum'"),
        (("check", "arithmetic", "--set", "schedule=daily"), "`schedule` or `owners`: Found invalid cron schedule"),
        (("check", "stories", "--set", "prompts.source=stories:openings"), "docs/real-input.md says where it is from"),
        (("check", "arithmetic", "--set", "model.bootstrap.corpus=no.jsonl"), "there is no file"),
        (("check", "arithmetic", "--set", "model.bootstrap.config.hidden=8"), "llama has no such setting"),
        (("check", "arithmetic", "--set", "model={source: /nowhere}"), "there is no folder /nowhere"),
        (("check", "stories", "--set", "prompts.source=arithmetic:sums"), "no column 'opening'"),
        (("check", "arithmetic", "--set", "model.bootstrap.config.hidden_size=33"), "config makes no model"),
        (("check", "arithmetic", "--set", "sampling.max_tokens=32"), "nothing is left for a prompt"),
        (("check", "arithmetic", "--set", "scoring.scorers=[{kind: reward, model: /no}]"), "there is no folder /no"),
        (("status", "sentimnt"), "Did you mean 'sentiment'?"),
        (("ui", "--port", "4999", "--audit-port", "4999"), "--port and --audit-port are both 4999"),
    ],
)
def test_what_a_person_got_wrong_is_one_message_and_no_traceback(home, words, expected):
    done = rsft(*words)
    assert done.returncode != 0
    output = " ".join((done.stdout + done.stderr).split())
    assert expected in output
    assert "Traceback" not in done.stderr


def test_a_home_that_a_database_url_could_not_name_is_refused(tmp_path, monkeypatch):
    for name in ("is this it?", "all*", "one[1]"):  # as a pattern it would match files of other homes
        monkeypatch.setenv("RSFT_HOME", str(tmp_path / name))
        done = rsft("status")
        (odd,) = set(name) & set("?*[")
        assert done.returncode == 2 and f"it cannot have {odd!r}" in done.stderr


def test_a_home_that_is_a_file_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("RSFT_HOME", str(tmp_path / "file"))
    done = rsft("status")
    assert done.returncode == 2 and f"RSFT_HOME is {tmp_path / 'file'}, which is no folder" in done.stderr


def test_a_recipe_that_was_moved_away_from_under_its_link_is_told_with_the_place_it_was_at(home, path):
    (home / "recipes").mkdir()
    (home / "recipes" / path.name).symlink_to(path)
    path.rename(path.with_name("moved.yaml"))
    done = rsft("check", "letters_loop")
    assert done.returncode == 2 and f"{path}: cannot be read: No such file" in done.stderr


def test_a_store_that_cannot_be_opened_is_one_message(home):
    (home / "store").mkdir()
    (home / "store" / "catalog.sqlite").write_bytes(b"no catalog at all" * 1000)
    done = rsft("status")
    assert done.returncode == 2 and "cannot be opened" in done.stderr and "Traceback" not in done.stderr


def test_where_no_terminal_is_lines_are_neither_cut_nor_wrapped(ran, monkeypatch):
    monkeypatch.setenv("RSFT_HOME", str(ran / "home"))
    chain = rsft("audit", "trace", "--accepted", "letters_loop", "r000", "1", "--quick").stdout.splitlines()
    assert all(re.match("[│ ]*[├└]── ", line) for line in chain[1:]) and max(map(len, chain)) > 120
    table = rsft("audit", "whatif", ran / "letters_loop.yaml", "r000", "--set", "acceptance.cap=1").stdout
    assert re.search(
        "rule +threshold, distinct True, cap 2, .* raise_by 0 +threshold, distinct True, cap 1, .* raise_by 0 *\n",
        table,
    )


def test_words_that_are_no_text_are_refused():
    done = rsft("audit", "trace", "--text", os.fsdecode(b"caf\xe9"))
    assert done.returncode == 2 and "is not UTF-8" in done.stderr and "Traceback" not in done.stderr


def test_the_version_is_that_of_the_project():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert rsft("--version").stdout == f"{project['version']}\n"


def test_check_and_schema(home, path):
    assert "can run" in (told := rsft("check", "arithmetic").stdout) and "hub" not in told
    misspelt = rsft("check", path, "--set", "model={source: modles/mine}").stdout
    assert (
        "checked only when a round runs: modles/mine, which is not a folder here and is taken for a model on the hub"
        in misspelt
    )
    reward = "scoring={scorers: [{kind: reward, model: modles/judge}]}"
    assert (
        "checked only when a round runs: modles/judge, which is not a folder"
        in rsft("check", path, "--set", reward).stdout
    )
    schema = json.loads(rsft("schema").stdout)
    for file in RECIPES.glob("*.yaml"):
        jsonschema.validate(yaml.safe_load(file.read_text()), schema)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**yaml.safe_load(path.read_text()), "promts": {}}, schema)


def test_the_servers_of_the_ui_link_to_each_other_where_they_are(monkeypatch):
    for variable, _ in pages.SERVERS.values():
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("RSFT_AUDIT_UI", "https://audit.example/")  # where it is seen
    told = ui.environment({"Dagster": 3001, "MLflow": 5002, "audit": 5003})
    for variable, _ in pages.SERVERS.values():
        monkeypatch.setenv(variable, told[variable])
    assert pages.dagster_run("x") == "http://127.0.0.1:3001/runs/x"
    assert pages.mlflow_run("x") == "http://127.0.0.1:5002/#/runs/x"
    assert pages.audit("/revocations") == "https://audit.example/revocations"
    monkeypatch.delenv("RSFT_MLFLOW_UI")
    monkeypatch.setenv("RSFT_MLFLOW", "https://tracking.example")  # a server shows its runs itself
    assert pages.mlflow_run("x") == "https://tracking.example/#/runs/x"
    monkeypatch.setenv("RSFT_MLFLOW", "https://me:hunter2@tracking.example:8443/at")
    assert pages.mlflow_run("x") == "https://tracking.example:8443/at/#/runs/x"


def test_a_process_that_ends_does_not_look_for_garbage():
    script = """
        import atexit, gc
        from rsft_pipeline.environment import settle_environment
        atexit.register(lambda: print(gc.get_freeze_count() > 0))  # what was registered first runs last
        settle_environment()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert done.stdout == "True\n"


def test_two_recipes_of_one_name_are_refused(home, write_recipe):
    for command in ("run", "check"):
        done = rsft(command, write_recipe(name="arithmetic"))
        assert done.returncode == 2
        assert "a recipe called 'arithmetic' is already" in done.stderr


def test_a_port_that_somebody_has_is_named_before_anything_starts(home):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = rsft("ui", "--mlflow-port", port)
    assert done.returncode == 2
    assert f"port {port}, for MLflow, is not available" in done.stderr and "--mlflow-port" in done.stderr
    assert not (home / "dagster").exists()
