"""Results: how a benchmark's numbers are published: JSON for machines, a Markdown table and a plot for people.

Belongs here: what all benchmarks do once they have measured. Not: how anything is measured.
"""

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # not imported at run time: some benchmarks time themselves from the process's start
    from matplotlib.figure import Figure

FOLDER = Path(__file__).parent.parent / "docs" / "benchmarks"
VERSIONS = ("torch", "transformers", "duckdb", "dagster", "mlflow")


def publish(folder: Path, name: str, numbers: dict[str, Any], tables: str, figure: "Figure") -> None:
    """Write `name`.json, `name`.md and `name`.png, with the command and the machine; print the tables."""
    import torch

    record = {
        "command": shlex.join(["python", *sys.orig_argv[1:]]),
        "machine": {
            "processor": platform.processor() or platform.machine(),
            "vectors": torch.backends.cpu.get_cpu_capability(),
            "cores": os.cpu_count(),
            "threads": os.environ.get("OMP_NUM_THREADS") or "as many as cores",
            "load": os.getloadavg(),
            "python": platform.python_version(),
            **{package: importlib.metadata.version(package) for package in VERSIONS},
        },
        **numbers,
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    (folder / f"{name}.md").write_text(f"Made by `{record['command']}`; {name}.json says where.\n\n{tables}\n", "utf-8")
    figure.savefig(folder / f"{name}.png", dpi=120)
    print(tables)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def figure(width: float, height: float) -> "Figure":
    """An empty figure, in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def bars(panels: Mapping[str, Mapping[str, Sequence[float]]], label: str, number: str) -> "Figure":
    """A panel of horizontal bars for each case: name → [value] or [lower quartile, median, upper quartile]."""
    names = {name for values in panels.values() for name in values}
    width = 3.5 + 0.08 * max(map(len, names))
    drawn = figure(width * len(panels), 1 + 0.4 * max(map(len, panels.values())))
    for axis, (title, values) in zip(drawn.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for name, of in values.items():
            middle = of[len(of) // 2]
            axis.barh(name, middle, color="tab:blue")
            axis.plot([of[0], of[-1]], [name, name], color="black")
            axis.annotate(number.format(middle), (of[-1], name), (6, 0), textcoords="offset points", va="center")
        axis.set(title=title, xlabel=label)
        axis.margins(x=0.25)
        axis.locator_params(axis="x", nbins=5)
        axis.invert_yaxis()
    return drawn
