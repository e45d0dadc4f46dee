"""Take the picture in docs/demo.md: ``python tests/demo/screenshot.py docs/demo.png``."""

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

from browsers import chromium

from looped_fast.demo.__main__ import main

LOOP, PROMPT, WIDTH, HEIGHT = 5, 6, 1200, 916


def take(out: str) -> None:
    """Write the page with the default flags, and its upper part at loop ``LOOP`` to ``out``."""
    with tempfile.TemporaryDirectory() as folder, chromium() as browser:
        page_file = Path(folder, "page.html")
        if main(["--out", str(page_file)]) != 0:
            sys.exit(1)
        page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT}, color_scheme="light")
        page.goto(page_file.as_uri())
        page.locator("#prompts label").nth(PROMPT - 1).click()
        page.locator("#loop").fill(str(LOOP))
        page.evaluate("document.activeElement.blur()")
        page.screenshot(path=out)


if __name__ == "__main__":
    take(*sys.argv[1:])
