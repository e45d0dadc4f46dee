"""A Chromium of this machine, driven by Playwright, which never downloads one here."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome")


def executable() -> str | None:
    """LOOPED_FAST_CHROMIUM, a Chromium on PATH, Playwright's own, or None."""
    if named := os.environ.get("LOOPED_FAST_CHROMIUM"):
        return named
    if on_path := next(filter(None, map(shutil.which, NAMES)), None):
        return on_path
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        own = playwright.chromium.executable_path
    return own if Path(own).exists() else None


def missing() -> str | None:
    """Why no page can be opened here, with the remedy; None if one can."""
    if find_spec("playwright") is None:
        return "playwright is not installed: pip install playwright"
    if executable() is None:
        return (
            f"there is no Chromium ({', '.join(NAMES)}): apt-get install chromium, or name the "
            f"file of one in LOOPED_FAST_CHROMIUM"
        )
    return None


@contextmanager
def chromium() -> Iterator[Any]:
    """A headless Chromium; without its sandbox, which root can't have."""
    from playwright.sync_api import sync_playwright

    path = executable()
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()
