"""Pages in a real browser: the audit pages against what a model wrote, and a round launched from Dagster's."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import dagster as dg
import letters_store as letters
import pytest
import uvicorn
from conftest import free_port, wait_for
from fastapi import FastAPI
from fastapi.responses import HTMLResponse

from rsft_pipeline import rounds
from rsft_pipeline.audit.revoke import revoke
from rsft_pipeline.home import Home
from rsft_pipeline.store import Store
from web.app import create

ROOT = Path(__file__).resolve().parent.parent
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
PATIENCE = 120_000  # milliseconds

playwright = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed: pip install -e '.[test]'")
pytestmark = pytest.mark.skipif(
    CHROMIUM is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"
)


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A page. What it says on the console, what it asks in dialogs and what fails to load is in `page.complaints`."""
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    opened = context.new_page()
    opened.set_default_timeout(PATIENCE)
    opened.complaints = []
    opened.on("console", lambda message: opened.complaints.append(message.text))
    opened.on("dialog", lambda dialog: (opened.complaints.append(dialog.message), dialog.dismiss()))
    opened.on("pageerror", lambda error: opened.complaints.append(str(error)))
    yield opened
    context.close()


def served(store, home, **how):
    """The address of the audit pages, served as `rsft audit ui` does."""
    return serving(create(store, Home(home), **how))


@contextmanager
def serving(app):
    """The address of an app, for as long as the `with`."""
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.02)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    home = tmp_path_factory.mktemp("home")
    with letters.write(home) as store, served(store, home) as address:
        yield address


ROUND = f"/recipes/{letters.RECIPE}/rounds/r000"


@pytest.mark.parametrize("number", range(len(letters.NASTY)))
def test_what_a_model_wrote_is_shown_and_does_nothing(pages, page, number):
    one = f"/recipes/letters/candidates/{letters.candidate_id('r000', number, 0)}"
    for path in (
        one,
        f"{ROUND}?prompt={letters.prompt_id(number)}",
        f"/recipes/letters/prompts/{letters.prompt_id(0)}",
    ):
        page.goto(pages + path)
        # The page around the text is unchanged: nothing is hidden, reversed, moved or stretched.
        assert page.get_by_text("Read only.").is_visible()
        assert page.evaluate("getComputedStyle(document.querySelector('footer')).direction") == "ltr"
        assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
        assert page.evaluate("document.body.scrollHeight") < 4000
        assert page.evaluate("document.images.length + document.scripts.length") == 0
    assert page.complaints == []


def test_a_long_text_is_folded_and_whole_on_request(pages, page):
    number = letters.NASTY.index(letters.LONG)
    page.goto(f"{pages}/recipes/letters/candidates/{letters.candidate_id('r000', number, 0)}")
    text = page.locator("details.fold pre.text")
    assert not text.is_visible()
    page.locator("details.fold summary").click()
    assert text.inner_text() == letters.LONG[:4000]
    page.get_by_text("The whole text").click()
    page.wait_for_url("**/text")
    assert len(page.locator("body").inner_text().strip()) == len(letters.LONG.strip())
    assert page.complaints == []


def test_filters_and_pages_by_clicking(pages, page):
    page.goto(pages)
    page.get_by_role("link", name="r000").click()
    rows = page.locator("table.candidates tbody tr")

    def listed():
        return rows.locator("td.i a").evaluate_all("links => links.map(link => link.title)")

    assert page.get_by_text("80 candidates").is_visible()
    first = listed()
    page.get_by_role("link", name="Next page →").click()
    page.wait_for_url("**after=**")
    second = listed()
    assert len(first) == len(second) == 25 and not set(first) & set(second)
    page.get_by_role("link", name="← First page").click()
    page.get_by_label("Decision").select_option("accepted")
    page.get_by_label("Completion contains").fill("ANSWER 1")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**decision=accepted**")
    assert set(listed()) == {letters.candidate_id("r000", prompt, 0) for prompt in range(10, 20)}
    assert set(rows.locator(".mark").all_inner_texts()) == {"accepted"}
    page.get_by_role("link", name="Clear").click()
    page.get_by_role("link", name="cannot judge").click()
    assert page.get_by_text("20 candidates").is_visible()
    assert page.complaints == []


def test_from_a_candidate_to_its_checkpoint_by_the_graph(pages, page):
    page.goto(f"{pages}/find?q={letters.candidate_id('r000', 9, 0)[:10]}")
    graph = page.locator("svg.chain")
    assert graph.locator("text.title").all_text_contents() == [
        "source", "prompt", "policy", "candidate", "score", "decision", "checkpoint", "later checkpoints",
    ]  # fmt: skip
    assert graph.locator("path.edge").count() == 7
    graph.get_by_text("checkpoint", exact=True).click()
    page.wait_for_url(f"**/checkpoints/{letters.CHECKPOINTS['r000']}")
    page.get_by_role("button", name="Verify now").click()
    page.wait_for_url("**verify=1**")
    assert page.get_by_text("not as recorded").is_visible()
    assert page.get_by_text("there is no folder").is_visible()


def test_revoking_asks_first_and_needs_to_be_allowed(page, tmp_path):
    one = letters.candidate_id("r000", 9, 0)
    with letters.write(tmp_path) as store:
        with served(store, tmp_path) as address:
            page.goto(f"{address}/recipes/letters/candidates/{one}")
            assert page.get_by_role("link", name="Revoke…").count() == 0
        with served(store, tmp_path, revoke=partial(revoke, store)) as address:
            page.goto(f"{address}/recipes/letters/candidates/{one}")
            page.get_by_role("link", name="Revoke…").click()
            page.get_by_role("link", name="Cancel").click()
            assert store.query("SELECT * FROM revocations") == []
            page.get_by_role("link", name="Revoke…").click()
            page.get_by_label("Who is responsible").fill("an auditor")
            page.get_by_label("Why").fill("it is private")
            page.get_by_role("button", name="Revoke candidate").click()
            page.wait_for_url("**/revocations")
            assert page.get_by_text("it is private").is_visible()
            assert (
                store.value("SELECT count(*) FROM revocations WHERE cause IS NULL AND what = $one", {"one": one}) == 1
            )

            # Another site's form that is posted here changes nothing, even with the right token.
            token = token_of(page, address, one)
            with another_site(
                FORGED.format(action=f"{address}/recipes/letters/revoke/candidate/{one}", token=token)
            ) as evil:
                page.goto(evil)
                page.get_by_role("button").click()
                page.wait_for_url(f"{address}/**")
                assert page.get_by_text("was not sent by a page of this server").is_visible()


FORGED = """<form method="post" action="{action}"><input name="token" value="{token}">
<input name="who" value="nobody"><input name="why" value="mischief"><button>Win a prize</button></form>"""


def token_of(page, address, one):
    page.goto(f"{address}/recipes/letters/revoke/candidate/{one}")
    return page.locator("input[name=token]").get_attribute("value")


def another_site(html):
    """The address of a page on another port, which makes it another origin."""
    app = FastAPI()
    app.get("/", response_class=HTMLResponse)(lambda: html)
    return serving(app)


# --- Dagster ---------------------------------------------------------------------------------


@pytest.fixture
def servers(home, write_recipe, tmp_path, monkeypatch):
    """Addresses of Dagster's web server, with its daemon, and of the audit pages, all as a person starts them."""
    for name in ("dagster", "recipes"):
        (home / name).mkdir()
    shutil.copy(ROOT / "dagster.yaml", home / "dagster")
    path = write_recipe()
    (home / "recipes" / path.name).symlink_to(path)
    dagster, audit = free_port(), free_port()
    addresses = f"http://127.0.0.1:{dagster}", f"http://127.0.0.1:{audit}"
    monkeypatch.setenv("DAGSTER_HOME", str(home / "dagster"))
    monkeypatch.setenv("RSFT_AUDIT_UI", addresses[1])
    with dg.DagsterInstance.get():  # makes its databases, before two servers try to
        pass
    workspace = ["-w", str(ROOT / "workspace.yaml")]
    commands = [
        ["dagster_webserver", "-h", "127.0.0.1", "-p", str(dagster), *workspace],
        ["dagster._daemon", "run", *workspace],
        ["cli.main", "audit", "ui", "--port", str(audit), "--allow-revoke"],
    ]
    with open(tmp_path / "servers.log", "w") as log:
        how = {"stdout": log, "stderr": log, "cwd": ROOT, "env": dict(os.environ), "start_new_session": True}
        processes = [subprocess.Popen([sys.executable, "-m", *command], **how) for command in commands]
        try:
            for address in addresses:
                wait_for(address, processes)
            yield addresses
        finally:
            for process in processes:
                end(process)


def end(process):
    """Stop a server with everything it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, how)
            process.wait(30)
            return
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


def test_a_round_launched_in_dagster_looked_at_and_revoked(servers, page, home):
    dagster, audit = servers
    page.goto(audit)
    assert page.get_by_text("No rounds yet.").is_visible()

    page.goto(f"{dagster}/locations/rsft/asset-groups/letters_loop/lineage")
    for asset in ("prompts", "policy", "candidates", "scores", "accepted", "checkpoint", "evaluation"):
        page.get_by_text(asset, exact=True).first.wait_for()
    page.goto(f"{dagster}/locations/rsft/jobs/letters_loop_round")
    page.get_by_role("button", name="Materialize all").click()
    page.get_by_role("button", name="Add a partition").click()
    page.get_by_placeholder("name").fill("r000")
    page.get_by_role("button", name="Save").click()
    page.get_by_placeholder("name").wait_for(state="hidden")
    if page.get_by_text("Select a partition or create one").is_visible():  # it does not always choose the new one
        page.get_by_text("Select a partition or create one").click()
        page.locator("span").filter(has_text="r000").first.click()
        page.keyboard.press("Escape")
    page.get_by_role("button", name="Launch 1 run").click()
    page.get_by_role("button", name="Cancel").wait_for(state="hidden")  # the dialog stays until the run is launched
    page.goto(f"{dagster}/runs")
    page.get_by_text("rsft/loop: letters_loop").wait_for()
    page.get_by_text("Success", exact=True).wait_for(timeout=3 * PATIENCE)

    # What the round's assets show: reasons, examples, plots.
    page.goto(f"{dagster}/assets/letters_loop/accepted?view=partitions&partition=r000")
    page.get_by_text("below threshold").first.wait_for()
    link = page.get_by_text(f"{audit}/recipes/letters_loop/rounds/r000").first.get_attribute("href")
    for asset, plot in (("scores", "combined score"), ("evaluation", "held-out metric by round")):
        page.goto(f"{dagster}/assets/letters_loop/{asset}?view=partitions&partition=r000")
        page.get_by_text("[Show Markdown]").click()
        picture = page.locator(f'img[alt*="{plot}"]')
        picture.wait_for()
        assert picture.evaluate("image => image.complete && image.naturalWidth") > 300

    # From there to the audit pages: the round, a candidate, the checkpoint, which verifies.
    page.goto(link)
    with Store.at(home) as store:
        (done,) = rounds.history(store, "letters_loop")
    assert page.get_by_text(f"{done['candidates']:,} candidates").is_visible()
    page.get_by_label("Decision").select_option("accepted")
    page.get_by_role("button", name="Show").click()
    page.wait_for_url("**decision=accepted**")
    page.locator("td.i a").first.click()
    page.wait_for_url("**/candidates/**")
    page.locator("svg.chain").get_by_text("checkpoint", exact=True).click()
    page.get_by_role("button", name="Verify now").click()
    page.get_by_text("Nothing that was compared differs from the record.").wait_for()

    # Revoking it here marks it in Dagster, and its round in the store as one to run again.
    page.get_by_role("link", name="Revoke…").click()
    page.get_by_label("Who is responsible").fill("an auditor")
    page.get_by_label("Why").fill("it is private")
    page.get_by_role("button", name="Revoke checkpoint").click()
    page.wait_for_url("**/revocations")
    page.goto(audit)
    assert page.get_by_text("revoked: to run again").is_visible()
    page.goto(f"{dagster}/assets/letters_loop/checkpoint?view=checks")
    page.get_by_text("nothing_revoked").first.wait_for()
    page.get_by_text("it is private").first.wait_for()
