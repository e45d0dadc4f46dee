"""The results of a visit as a page: the output of each part, and its provenance."""

from __future__ import annotations

from typing import Any

from benchmarks.gpu.visit import Visit


def write_page(visit: Visit) -> None:
    """Write ``gpu_<card>.md`` beside the JSON."""
    parts = [_section(name, result) for name, result in visit.load().items()]
    title = "# Dry run, nothing is measured" if visit.dry else "# Measured on a GPU"
    visit.path.with_suffix(".md").write_text("\n\n".join([title, *parts]) + "\n", encoding="utf-8")


def _section(name: str, result: dict[str, Any]) -> str:
    origin = result["provenance"]
    machine = origin.get("gpu", origin["cpu"])
    versions = f"PyTorch {origin['torch']}, Triton {origin.get('triton')}"
    line = f"{origin['date']}, {machine}, {versions}, commit {origin['commit']}: {result['status']}"
    return f"## {name}\n\n{line}\n\n```\n{result['output'].rstrip()}\n```"
