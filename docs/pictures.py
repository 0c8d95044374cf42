"""Make the README's pictures from a home that ran the demo: the asset graph, the round's job, the rounds plot.

    make demo && make ui                       # in one terminal
    .venv/bin/pip install -c constraints.txt -e '.[pictures]'
    .venv/bin/python docs/pictures.py          # in another; needs Chromium (Debian: apt-get install chromium)
"""

import shutil
from pathlib import Path

from playwright.sync_api import sync_playwright

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
        page.goto(f"{UI}/locations/rsft/jobs/arithmetic_round")
        page.get_by_text("evaluation", exact=False).first.wait_for(timeout=60_000)
        page.wait_for_timeout(4000)
        page.screenshot(path=PICTURES / "graph.png")
        page.goto(f"{UI}/assets/arithmetic/evaluation?view=partitions")
        page.wait_for_timeout(6000)
        page.screenshot(path=PICTURES / "evaluation.png")
        browser.close()


if __name__ == "__main__":
    main()
