"""Choosing one of several implementations by rules that can explain themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from looped_fast.errors import unknown_name


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why each other was not."""

    kind: str  # what there is a choice of: "backend", "attention"
    chosen: str
    reasons: dict[str, str]  # implementation that was not chosen -> why

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


def choose(
    kind: str, wanted: str, obstacles: Mapping[str, str | None], preference: str = "comes first"
) -> Choice:
    """The first implementation that nothing is in the way of, or the one that is wanted.

    Args:
        kind: what there is a choice of; the name of the argument that forces one.
        wanted: ``auto``, or the name of one.
        obstacles: for each implementation, the preferred first, why it can't run; None if it can,
            as at least one must.
        preference: why those that come first do.

    Raises:
        ValueError: ``wanted`` is unknown, or unable; the reason is in the message.
    """
    if wanted != "auto" and wanted not in obstacles:
        raise unknown_name(kind, wanted, ["auto", *obstacles])
    able = [name for name, obstacle in obstacles.items() if obstacle is None]
    if wanted in able:
        chosen, others = wanted, f"{wanted} was asked for"
    elif wanted != "auto":
        raise ValueError(
            f"{kind} {wanted!r} can't run this: {obstacles[wanted]}. "
            f"Use {kind}='auto', or see looped_fast.explain_backend"
        )
    else:
        chosen, others = able[0], f"{able[0]} {preference}"
    reasons = {name: why or others for name, why in obstacles.items() if name != chosen}
    return Choice(kind, chosen, reasons)
