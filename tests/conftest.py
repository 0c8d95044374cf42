"""What the tests share: a home of their own, and recipes that run in seconds on two-layer models."""

import os
import shutil
import socket
import textwrap
import time
import urllib.request

import dagster as dg
import pytest
import yaml

import definitions
from assets.shared import rounds_of
from automation.jobs import job_name
from rsft_pipeline.environment import settle_environment
from rsft_pipeline.recipe.reading import load
from rsft_pipeline.store import Store

# Before anything imports torch: one thread for each of pytest's processes, which are as many as there are cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
settle_environment()

FUNCTIONS = '''
def letters():
    """Prompts: two letters to continue. The reference is the second letter."""
    for a in "abcdefghij":
        for b in "abcdefghij":
            yield {"question": a + b, "answer": b}


def babble():
    """Warm-up: the next letter is the last one again half of the time, else another."""
    import random

    chance = random.Random(0)
    for _ in range(6):
        for row in letters():
            answer = row["answer"] if chance.random() < 0.5 else chance.choice("abcdefghij")
            yield {"prompt": row["question"], "completion": answer}
'''

RECIPE = """
description: Repeat the last letter.
model:
  source: bootstrap
  bootstrap:
    config: {model_type: llama, hidden_size: 32, intermediate_size: 64, num_hidden_layers: 2,
             num_attention_heads: 2, num_key_value_heads: 1, max_position_embeddings: 16}
    corpus: letters:babble
    tokenizer: characters
    steps: 60
    batch_size: 64
    learning_rate: 0.01
prompts:
  source: letters:letters
  template: "{question}"
  reference: answer
  eval_fraction: 0.3
sampling: {draws: 6, max_tokens: 2, wave_size: 120}
scoring:
  scorers:
    - {kind: answer, match: exact}
acceptance: {rule: threshold, threshold: 0.5, cap: 2}
training: {epochs: 4, batch_size: 16, learning_rate: 0.005, save_every: 2}
evaluation: {draws: 8, k: 4}
largest_share: 0.5
stop: {rounds: 5}
"""


@pytest.fixture(scope="session")
def tracking_database(tmp_path_factory):
    """An empty MLflow database: making one takes seconds of migrations, copying it none."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


def run_rounds(folder, tracking_database, text=RECIPE):
    """Run two rounds of a recipe in a home of their own. Returns the folder of both."""
    (folder / "home" / "mlflow").mkdir(parents=True)
    shutil.copy(tracking_database, folder / "home" / "mlflow")
    (folder / "letters.py").write_text(FUNCTIONS)
    (folder / "letters_loop.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch, dg.DagsterInstance.ephemeral() as instance:
        patch.setenv("RSFT_HOME", str(folder / "home"))
        recipe = load(folder / "letters_loop.yaml")
        assert all(run_round(instance, recipe, key).success for key in ("r000", "r001"))
    return folder


def run_round(instance, recipe, round_key, **tags):
    """Run a round as Dagster's job. Returns what came of it."""
    instance.add_dynamic_partitions(rounds_of(recipe).name, [round_key])
    job = definitions.build([recipe]).resolve_job_def(job_name(recipe))
    return job.execute_in_process(instance=instance, partition_key=round_key, tags=tags, raise_on_error=False)


@pytest.fixture(scope="session")
def ran(tmp_path_factory, tracking_database):
    """The folder of a home in which two rounds have run, with the recipe beside it: to be read only."""
    return run_rounds(tmp_path_factory.mktemp("ran"), tracking_database)


@pytest.fixture
def mine(ran, tmp_path, monkeypatch):
    """The store of a copy of that home, to change. The environment names the copy."""
    shutil.copytree(ran / "home", tmp_path / "home")
    monkeypatch.setenv("RSFT_HOME", str(tmp_path / "home"))
    with Store.at(tmp_path / "home") as store:
        yield store


@pytest.fixture
def home(tmp_path, monkeypatch, tracking_database):
    """A home that the environment names, with nothing in it but MLflow's empty database."""
    folder = tmp_path / "home"
    (folder / "mlflow").mkdir(parents=True)
    shutil.copy(tracking_database, folder / "mlflow")
    monkeypatch.setenv("RSFT_HOME", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    return folder


@pytest.fixture
def write_recipe(tmp_path):
    """Write a recipe file: the small one with sections replaced. Returns its path."""

    def write(name="letters_loop", **sections):
        folder = tmp_path / "elsewhere"
        folder.mkdir(exist_ok=True)
        (folder / "letters.py").write_text(textwrap.dedent(FUNCTIONS))
        path = folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump({**yaml.safe_load(RECIPE), **sections}, allow_unicode=True))
        return path

    return write


@pytest.fixture
def recipe(write_recipe):
    """The small recipe, loaded."""
    return load(write_recipe())


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def wait_for(address, processes, patience=120):
    """Wait until a server of the processes answers, before any of them ends."""
    deadline = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                assert answer.status == 200
                return
        except OSError:
            assert all(process.poll() is None for process in processes) and time.monotonic() < deadline
            time.sleep(0.3)
