"""Home: where all state lives: one folder, `$RSFT_HOME`, by default `var` beside the code."""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Home:
    """The folders of a home. Each is made when it is first asked for."""

    path: Path

    @classmethod
    def here(cls) -> "Home":
        """The home that the environment names. Raises OSError, with the reason, if it cannot be used."""
        path = Path(os.environ.get("RSFT_HOME") or ROOT / "var").expanduser().resolve()
        if found := set("?%*[\\") & set(str(path)):
            raise OSError(
                f"RSFT_HOME is {path}: MLflow and Dagster read a path as a URL and DuckDB as a pattern of many, so it "
                f"cannot have {min(found)!r}"
            )
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(f"RSFT_HOME is {path}, which is no folder")
        return cls(path)

    def folder(self, name: str) -> Path:
        folder = self.path / name
        folder.mkdir(parents=True, exist_ok=True)
        return folder

    @contextmanager
    def lock(self, name: str, *, wait: bool) -> Iterator[bool]:
        """Hold a lock against this home's other processes; it is released with the process, however that ends.

        Yields whether it was acquired: always, unless `wait` is off and somebody else holds it.
        """
        with open(self.folder("locks") / name, "w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
            else:
                yield True

    @property
    def checkpoints(self) -> Path:
        """Content-addressed weights that rounds made."""
        return self.folder("checkpoints")

    @property
    def scratch(self) -> Path:
        """Training states that a killed run resumes from."""
        return self.folder("scratch")

    @property
    def recipes(self) -> Path:
        """Links to recipes that live elsewhere, so that Dagster shows them too."""
        return self.folder("recipes")

    @property
    def dagster(self) -> Path:
        return self.folder("dagster")

    @property
    def mlflow(self) -> Path:
        return self.folder("mlflow")
