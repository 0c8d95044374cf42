"""The architecture of the folder tree: imports go one way, and the method stands without Dagster."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DOWNWARDS = ["cli", "web", "definitions", "automation", "assets", "resources", "rsft_pipeline"]


def modules(file: Path) -> set[str]:
    """Every module that a file imports, anywhere in it, and every name that it imports from one, after a dot."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def imports(file: Path) -> set[str]:
    """The top-level names of these."""
    return {name.partition(".")[0] for name in modules(file)}


def files_of(layer: str) -> list[Path]:
    return [ROOT / f"{layer}.py"] if layer == "definitions" else sorted((ROOT / layer).rglob("*.py"))


def test_every_package_is_installed():
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]["packages"]
    layers = [layer for layer in DOWNWARDS if layer != "definitions"]
    there = {file.parent.relative_to(ROOT) for layer in layers for file in (ROOT / layer).rglob("__init__.py")}
    assert sorted(listed) == sorted(".".join(folder.parts) for folder in there)


def test_imports_go_down_the_list_only():
    for i, layer in enumerate(DOWNWARDS):
        assert files_of(layer), layer
        for file in files_of(layer):
            upwards = imports(file) & set(DOWNWARDS[:i])
            assert not upwards, f"{file.relative_to(ROOT)} imports {sorted(upwards)}, which stand above it"


def test_the_audit_pages_stand_on_resources_and_the_method_alone():
    for file in files_of("web"):
        assert not imports(file) & {"dagster", "mlflow", "definitions", "automation", "assets"}, file


def test_the_method_imports_no_dagster_and_no_mlflow():
    for file in files_of("rsft_pipeline"):
        assert not imports(file) & {"dagster", "mlflow"}, file


def test_where_the_method_takes_rows_and_numbers_it_knows_no_store():
    """It meets the store in `steps/`; beside these, only what a round is and what people ask about it does."""
    meet = {"steps", "audit", "store.py", "rounds.py", "revocations.py", "report.py"}
    for file in files_of("rsft_pipeline"):
        if file.relative_to(ROOT / "rsft_pipeline").parts[0] not in meet:
            asked = {"store", "steps"} & {
                name.split(".")[1] for name in modules(file) if name.startswith("rsft_pipeline.")
            }
            assert not asked, f"{file.relative_to(ROOT)} imports {asked}"


def test_the_method_works_where_dagster_mlflow_and_duckdb_are_not_installed():
    code = """
import sys
for absent in ("dagster", "mlflow", "duckdb"):
    sys.modules[absent] = None
from rsft_pipeline import decoding, devices, models, sampling, scoring, training
from rsft_pipeline.tasks import causal
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_loading_the_definitions_loads_no_model_library():
    code = """
import sys
import definitions
definitions.defs()
assert not {"mlflow", "torch", "transformers", "datasets"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
