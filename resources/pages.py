"""Pages: the addresses at which people look at what a round left: in the audit pages, Dagster, MLflow.

Belongs here: addresses alone, so that the servers and the links between them agree. Not: what stands on a page.
"""

import os
from urllib.parse import quote

AUDIT = "http://127.0.0.1:5001"
DAGSTER = "http://127.0.0.1:3000"
MLFLOW = "http://127.0.0.1:5000"


def path(*segments: object) -> str:
    """The path of an audit page: `/recipes/arithmetic/rounds/r000`."""
    return "".join(f"/{quote(str(segment), safe='')}" for segment in segments)


def round_(recipe: str, key: str) -> str:
    return path("recipes", recipe, "rounds", key)


def candidate(recipe: str, candidate_id: str) -> str:
    return path("recipes", recipe, "candidates", candidate_id)


def prompt(recipe: str, prompt_id: str) -> str:
    return path("recipes", recipe, "prompts", prompt_id)


def checkpoint(recipe: str, digest: str) -> str:
    return path("recipes", recipe, "checkpoints", digest)


def audit(page: str) -> str:
    """The address of an audit page, for links from elsewhere."""
    return os.environ.get("RSFT_AUDIT_UI", AUDIT).rstrip("/") + page


def dagster_run(run_id: str) -> str:
    return os.environ.get("RSFT_DAGSTER_UI", DAGSTER).rstrip("/") + path("runs", run_id)


def mlflow_run(run_id: str) -> str:
    """A run's page, which MLflow finds without its experiment."""
    return os.environ.get("RSFT_MLFLOW_UI", MLFLOW).rstrip("/") + "/#" + path("runs", run_id)
