"""Tracking: one MLflow run per round, through explicit run ids; nothing global is ever active.

Dagster's run id stands in MLflow's tags and MLflow's run id in Dagster's metadata, so either leads
to the other.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dagster as dg
from pydantic import Field

from rsft_pipeline.home import Home


class Tracking(dg.ConfigurableResource):
    """Writes rounds to MLflow and moves the `champion` alias of its model registry."""

    uri: str = Field("", description="MLflow tracking URI; default: a SQLite database in $RSFT_HOME.")
    ui: str = Field("http://127.0.0.1:5000", description="Where people open MLflow; links point there.")

    def client(self):
        """An MlflowClient; MLflow takes seconds to import, so only steps that write to it do."""
        from mlflow import MlflowClient

        return MlflowClient(self.uri or f"sqlite:///{Home.here().mlflow / 'mlflow.db'}")

    def begin(self, recipe: str, round_key: str, *, resume: str | None, params: Mapping[str, Any], **tags: str) -> str:
        """The id of the round's run: `resume` where an earlier attempt began it, else a new one."""
        client = self.client()
        if resume:
            client.update_run(resume, status="RUNNING")
            run_id = resume
        else:
            run_id = client.create_run(self._experiment(client, recipe), run_name=f"{recipe}/{round_key}").info.run_id
            for name, value in _flat(params):
                client.log_param(run_id, name, str(value)[:6000])
        for name, value in {"recipe": recipe, "round": round_key, **tags}.items():
            client.set_tag(run_id, f"rsft.{name}", value)
        return run_id

    def _experiment(self, client, recipe: str) -> str:
        found = client.get_experiment_by_name(recipe)
        if found:
            return found.experiment_id
        artifacts = None if self.uri else (Home.here().mlflow / "artifacts" / recipe).as_uri()
        return client.create_experiment(recipe, artifact_location=artifacts)

    def curve(self, run_id: str, name: str, points: list[tuple[int, float]]) -> None:
        """A metric over steps."""
        import time

        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, value in points]
        client = self.client()
        for i in range(0, len(metrics), 1000):  # MLflow's limit for one call
            client.log_batch(run_id, metrics=metrics[i : i + 1000])

    def metrics(self, run_id: str, values: Mapping[str, float | None]) -> None:
        """Single numbers; those that are None are left out."""
        from mlflow.entities import Metric

        self.client().log_batch(run_id, metrics=[Metric(n, float(v), 0, 0) for n, v in values.items() if v is not None])

    def tags(self, run_id: str, **values: str) -> None:
        client = self.client()
        for name, value in values.items():
            client.set_tag(run_id, f"rsft.{name}", value)

    def text(self, run_id: str, name: str, content: str) -> None:
        """A text file among the run's artifacts."""
        self.client().log_text(run_id, content, name)

    def file(self, run_id: str, path: Path) -> None:
        """A copy of a file among the run's artifacts."""
        self.client().log_artifact(run_id, str(path))

    def register(self, run_id: str, recipe: str, checkpoint: str, path: Path) -> str:
        """Register a checkpoint as a version of the recipe's model; the same one is registered once."""
        from mlflow.exceptions import MlflowException

        client = self.client()
        try:
            client.create_registered_model(recipe)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in client.search_model_versions(f"name = '{recipe}'"):
            if version.tags.get("rsft.checkpoint") == checkpoint:
                return version.version
        tags = {"rsft.checkpoint": checkpoint}
        return client.create_model_version(recipe, path.as_uri(), run_id=run_id, tags=tags).version

    def crown(self, recipe: str, version: str) -> None:
        """Move the alias `champion` to this version; only the promotion gate calls this."""
        self.client().set_registered_model_alias(recipe, "champion", version)

    def end(self, run_id: str, status: str = "FINISHED") -> None:
        self.client().set_terminated(run_id, status)

    def url(self, recipe: str, run_id: str) -> str:
        """The page of a run in MLflow's UI."""
        experiment = self.client().get_experiment_by_name(recipe).experiment_id
        return f"{self.ui}/#/experiments/{quote(experiment)}/runs/{quote(run_id)}"


def _flat(tree: Mapping[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
