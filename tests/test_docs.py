"""The documentation matches the code."""

import re
import subprocess
import sys
from pathlib import Path

import typer

from cli.main import app
from rsft_pipeline.store import Store

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_tables_of_fields_are_those_of_the_recipe():
    done = subprocess.run([sys.executable, "-m", "docs.tables", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_link_to_a_file_leads_to_one_and_to_a_heading_in_it():
    followed = 0
    for page in PAGES:
        for target, _, heading in re.findall(r"\]\(([^)#\s]*)(#([^)\s]*))?", page.read_text(encoding="utf-8")):
            if "://" in target:
                continue
            file = page.parent / target if target else page
            assert file.exists(), f"{page.relative_to(ROOT)}: {target}"
            if heading:
                headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.MULTILINE)
                anchors = {re.sub(r"[^\w\- ]", "", one.lower()).replace(" ", "-") for one in headings}
                assert heading in anchors, f"{page.relative_to(ROOT)}: {target}#{heading}"
                followed += 1
    assert followed > 10


def test_every_command_that_is_shown_is_one():
    """Names and flags exist, and commands shown to be typed have all required options."""
    rsft, shown = typer.main.get_command(app), 0
    for page in PAGES:
        for line in page.read_text(encoding="utf-8").replace("\\\n", " ").splitlines():
            for words in re.findall(r"(?<![\w./-])rsft ([^`#>]+)", line):
                commands, rest = named(rsft, words.split())
                flags = set(re.findall(r"--[a-z][a-z-]*", " ".join(rest)))
                for command in commands:
                    known = {flag: option for option in command.params for flag in option.opts}
                    wrong = flags - known.keys() - {"--help"}
                    if line.startswith(("    ", "$ ")) and rest:
                        options = [option for option in command.params if option.param_type_name == "option"]
                        wrong |= {one.opts[0] for one in options if one.required and not flags & set(one.opts)}
                    assert not wrong, f"{page.relative_to(ROOT)}: rsft {words}: {wrong}"
                    shown += 1
    assert shown > 100


def named(command, words):
    """The commands that the words begin with (several for `a|b`), and the remaining words."""
    commands = [command]
    while words and hasattr(commands[0], "commands") and re.fullmatch(r"[a-z|]+", words[0]):
        name, *words = words
        commands = [commands[0].commands[one] for one in name.split("|")]
    return commands, words


def test_every_query_that_is_shown_can_be_asked(ran):
    shown = 0
    with Store.at(ran / "home") as store:
        candidate = store.value("SELECT min(candidate_id) FROM training_samples")
        told = {"recipe": "letters_loop", "candidate": candidate, "term": "a", "prompt": "nobody", "round": "r000"}
        for page in PAGES:
            for sql in re.findall(r"```sql\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
                asked = set(re.findall(r"\$(\w+)", re.sub(r"'[^']*'", "", sql)))
                store.query(sql, {name: told[name] for name in asked})
                shown += 1
    assert shown > 8
