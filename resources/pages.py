"""Pages: the addresses of the audit pages, Dagster and MLflow, and of what a round left there.

Belongs here: addresses, so that the servers and the links between them agree. Not: what is on a page.
"""

import os
from urllib.parse import quote, urlsplit

HOST = "127.0.0.1"  # reachable only from this machine
SERVERS = {  # name → environment variable with its address, and the default address
    "Dagster": ("RSFT_DAGSTER_UI", f"http://{HOST}:3000"),
    "MLflow": ("RSFT_MLFLOW_UI", f"http://{HOST}:5000"),
    "audit": ("RSFT_AUDIT_UI", f"http://{HOST}:5001"),
}


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


def at(server: str) -> str:
    """The address of one of SERVERS."""
    variable, usual = SERVERS[server]
    if server == "MLflow":
        usual = remote_tracking() or usual
    return os.environ.get(variable, usual).rstrip("/")


def remote_tracking() -> str | None:
    """The address of the MLflow server that `RSFT_MLFLOW` names, which shows its runs itself; None if it names none."""
    uri = os.environ.get("RSFT_MLFLOW", "")
    if not uri.startswith(("http://", "https://")):
        return None
    server = urlsplit(uri)
    return server._replace(netloc=server.netloc.rpartition("@")[2]).geturl()  # no password in links


def audit(page: str) -> str:
    """The address of an audit page, for links from elsewhere."""
    return at("audit") + page


def dagster_run(run_id: str) -> str:
    return at("Dagster") + path("runs", run_id)


def mlflow_run(run_id: str) -> str:
    """The address of a run's page. MLflow does not need its experiment."""
    return at("MLflow") + "/#" + path("runs", run_id)
