"""Make the README's pictures from a home that ran the demo: rounds plot, asset graph, accepted set, audit pages.

make demo && make ui                       # in one terminal
.venv/bin/python docs/pictures.py          # in another; needs Chromium (Debian: apt-get install chromium)
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

from resources import pages
from rsft_pipeline.home import Home

UI = "http://127.0.0.1:3000"
PICTURES = Path(__file__).parent / "pictures"
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


def main() -> None:
    PICTURES.mkdir(exist_ok=True)
    shutil.copy(Home.here().path / "reports" / "arithmetic.png", PICTURES / "rounds.png")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=FLAGS)
        page = browser.new_page(viewport={"width": 1500, "height": 760})
        page.goto(f"{UI}/assets/arithmetic/accepted?view=lineage&lineageScope=neighbors&lineageDepth=6")
        page.wait_for_timeout(9000)  # the graph is laid out and zoomed to fit
        page.screenshot(path=PICTURES / "graph.png", clip={"x": 250, "y": 360, "width": 1205, "height": 240})
        page.set_viewport_size({"width": 1500, "height": 1250})
        page.goto(f"{UI}/assets/arithmetic/accepted?view=partitions&partition=r002")
        page.get_by_text("below threshold").first.wait_for(timeout=60_000)
        page.screenshot(path=PICTURES / "accepted.png", clip={"x": 240, "y": 0, "width": 1260, "height": 1210})
        audit(browser)
        browser.close()


def audit(browser) -> None:
    """The audit pages: home, the last round, and one of its accepted candidates."""
    page = browser.new_page(viewport={"width": 1240, "height": 760})
    address = pages.audit("/")
    page.goto(address)
    page.screenshot(path=PICTURES / "audit_home.png", clip={"x": 0, "y": 0, "width": 1240, "height": 620})
    page.get_by_role("link", name="r002").first.click()
    page.get_by_label("Decision").wait_for()
    page.screenshot(path=PICTURES / "audit_round.png")
    page.goto(f"{page.url}?decision=accepted")
    page.locator("td.i a").first.click()
    page.locator("svg.chain").wait_for()
    page.screenshot(path=PICTURES / "audit_candidate.png")
    page.close()


if __name__ == "__main__":
    main()
