"""Tracking: one MLflow run for each round, always named by its id; MLflow's global active run is never used.

Dagster's run id is in MLflow's tags, and MLflow's run id in Dagster's metadata.
"""

import functools
import re
import socket
import time
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import dagster as dg
from pydantic import Field

from rsft_pipeline.home import Home
from rsft_pipeline.store import without_password

DATABASES = ("sqlite:", "postgresql", "mysql", "mssql")  # those that MLflow can keep runs in


class Tracking(dg.ConfigurableResource):
    """Writes rounds to MLflow and moves the alias `champion` in its model registry."""

    uri: str = Field("", description="MLflow tracking URI; default: a SQLite database in $RSFT_HOME.")

    def client(self):
        """An MlflowClient. Importing MLflow takes seconds, so it is imported only when it is used."""
        return _client(self.uri or f"sqlite:///{Home.here().mlflow / 'mlflow.db'}")

    def check(self) -> None:
        """Check that MLflow answers at `uri`, before anything is done that it should record.

        Raises:
            OSError: it does not; the message says why.
        """
        if not self.uri:  # the home's own, which is created if missing
            return
        try:
            if self.uri.startswith(("http://", "https://")):  # MLflow itself would retry for minutes
                server = urlsplit(self.uri)
                usual = {"http": 80, "https": 443}[server.scheme]
                if not urllib.request.getproxies().get(server.scheme):
                    socket.create_connection((server.hostname, server.port or usual), timeout=10).close()
            self.client().search_experiments(max_results=1)
        except Exception as error:  # each database's driver raises its own
            why = without_password(str(error))
            raise ConnectionError(f"RSFT_MLFLOW: MLflow does not answer there: {why}") from None

    def begin(
        self, recipe: str, round_key: str, *, instead_of: str | None, params: Mapping[str, Any], **tags: str
    ) -> str:
        """The id of a new run for the round. The earlier attempt's run `instead_of` ends as killed if it still runs."""
        from mlflow.entities import Param

        client = self.client()
        if instead_of and self.state(instead_of) == "RUNNING":
            client.set_terminated(instead_of, "KILLED")
        run_id = client.create_run(self._experiment(client, recipe), run_name=f"{recipe}/{round_key}").info.run_id
        values = {_allowed(name): str(value)[:6000] for name, value in _flat(params)}
        logged = [Param(name, value) for name, value in values.items()]
        for i in range(0, len(logged), 100):  # MLflow's limit for one call
            client.log_batch(run_id, params=logged[i : i + 100])
        for name, value in {"recipe": recipe, "round": round_key, **tags}.items():
            client.set_tag(run_id, f"rsft.{name}", value)
        return run_id

    def _experiment(self, client, recipe: str) -> str:
        # With a database and no server, MLflow would put artifacts into the current folder.
        served = self.uri and not self.uri.startswith(DATABASES)
        artifacts = None if served else (Home.here().mlflow / "artifacts" / recipe).as_uri()
        found = client.get_experiment_by_name(recipe)
        if found and found.lifecycle_stage == "deleted":  # it blocks the name, and cannot be renamed while deleted
            client.restore_experiment(found.experiment_id)
            client.rename_experiment(found.experiment_id, f"{recipe}, deleted, {found.experiment_id}")
            client.delete_experiment(found.experiment_id)
            found = None
        if found and (self.uri or artifacts == found.artifact_location):
            return found.experiment_id
        if found:  # the home has been moved: MLflow would keep writing to the old place
            before = f"{recipe}, {found.experiment_id}, in {found.artifact_location}"
            client.rename_experiment(found.experiment_id, before)
        return client.create_experiment(recipe, artifact_location=artifacts)

    def state(self, run_id: str) -> str | None:
        """The status of a run; None if MLflow does not have it or it was deleted."""
        from mlflow.exceptions import MlflowException

        try:
            run = self.client().get_run(run_id).info
        except MlflowException:  # its database was lost or replaced
            return None
        return run.status if run.lifecycle_stage == "active" else None

    def curve(self, run_id: str, name: str, points: list[tuple[int, float]]) -> None:
        """Log a metric by step."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        metrics = [Metric(name, value, now, step) for step, value in points]
        client = self.client()
        for i in range(0, len(metrics), 1000):  # MLflow's limit for one call
            client.log_batch(run_id, metrics=metrics[i : i + 1000])

    def metrics(self, run_id: str, values: Mapping[str, float | None]) -> None:
        """Log single numbers; those that are None are left out."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        known = [Metric(name, float(value), now, 0) for name, value in values.items() if value is not None]
        self.client().log_batch(run_id, metrics=known)

    def tags(self, run_id: str, **values: str) -> None:
        client = self.client()
        for name, value in values.items():
            client.set_tag(run_id, f"rsft.{name}", value)

    def file(self, run_id: str, path: Path) -> None:
        """Copy a file to the run's artifacts."""
        self.client().log_artifact(run_id, str(path))

    def register(self, run_id: str, recipe: str, checkpoint: str, path: Path) -> str:
        """The version under which a checkpoint is registered in the recipe's model. It is registered if it was not.

        If it was marked as revoked, the mark is removed: the same weights were made again without what is revoked.
        """
        from mlflow.exceptions import MlflowException

        client = self.client()
        try:
            client.create_registered_model(recipe)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        if version := self._version(client, recipe, checkpoint):
            client.delete_model_version_tag(recipe, version, "rsft.revoked")
            return version
        tags = {"rsft.checkpoint": checkpoint}
        return client.create_model_version(recipe, path.as_uri(), run_id=run_id, tags=tags).version

    def set_champion(self, recipe: str, champion: str) -> None:
        """Let the alias `champion` name this checkpoint, after a promotion or a revocation.

        The base model is not registered: while it is the champion, there is no such alias.
        """
        client = self.client()
        if version := self._version(client, recipe, champion):
            client.set_registered_model_alias(recipe, "champion", version)
        else:
            client.delete_registered_model_alias(recipe, "champion")

    def _version(self, client, recipe: str, checkpoint: str) -> str | None:
        versions = client.search_model_versions(f"name = '{recipe}'")
        return next((v.version for v in versions if v.tags.get("rsft.checkpoint") == checkpoint), None)

    def end(self, run_id: str, status: str = "FINISHED") -> None:
        self.client().set_terminated(run_id, status)


@functools.lru_cache(maxsize=4)
def _client(uri: str):
    """A client, cached: a round asks for one two dozen times, and making one takes as long as a write."""
    from mlflow import MlflowClient

    with Home.here().lock("mlflow", wait=True):  # two processes must not create the same database
        return MlflowClient(uri)


def _allowed(name: str) -> str:
    """The name with characters that MLflow does not allow replaced: recipes may have columns of any name."""
    return re.sub(r"[^\w\-. :]", "_", name)[:250]


def _flat(tree: Mapping[str, Any], prefix: str = ""):
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
