"""Fill the page's template with style, script and data: one file that loads nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent


def page(data: dict[str, Any]) -> str:
    """The HTML page that shows ``data``.

    Raises:
        ValueError: a number in ``data`` is not finite.
    """
    text = (_FOLDER / "page.html").read_text(encoding="utf-8")
    parts = {
        "style": (_FOLDER / "page.css").read_text(encoding="utf-8"),
        "script": (_FOLDER / "page.js").read_text(encoding="utf-8"),
        # A "<" inside a string would end the element early, as in </script>.
        "data": json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c"),
    }
    for name, part in parts.items():
        text = text.replace(f"/*{{{name}}}*/", part)
    return text
