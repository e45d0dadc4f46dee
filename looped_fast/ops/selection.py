"""Selecting one of several implementations by rules that can explain themselves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from looped_fast.errors import check_name


@dataclass(frozen=True)
class Selection:
    """What was chosen, and why each other was not.

    Attributes:
        kind: what there is a choice of: ``backend`` or ``attention``.
        chosen: name of the implementation that runs.
        reasons: name of each other implementation -> why it does not.
        attention: who computes attention, where the triton backend was chosen.
    """

    kind: str
    chosen: str
    reasons: dict[str, str]
    attention: Selection | None = None

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.chosen}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        lines += [] if self.attention is None else [str(self.attention)]
        return "\n".join(lines)


def select_by(
    kind: str, wanted: str, unsupported: Mapping[str, str | None], preference: str = "comes first"
) -> Selection:
    """The first implementation that supports the call, or the one that is wanted.

    Args:
        kind: what there is a choice of; the name of the argument that forces one.
        wanted: ``auto``, or the name of one.
        unsupported: for each implementation, the preferred first, why it can't run the call; None
            if it can, as at least one must.
        preference: why those that come first do.

    Raises:
        ValueError: ``wanted`` is unknown, or can't run the call; the reason is in the message.
    """
    check_name(kind, wanted, ("auto", *unsupported))
    able = [name for name, reason in unsupported.items() if reason is None]
    if wanted in able:
        chosen, others = wanted, f"{wanted} was asked for"
    elif wanted != "auto":
        raise ValueError(
            f"{kind} {wanted!r} can't run this: {unsupported[wanted]}. "
            f"Use {kind}='auto', or see looped_fast.explain_backend"
        )
    else:
        chosen, others = able[0], f"{able[0]} {preference}"
    reasons = {name: why or others for name, why in unsupported.items() if name != chosen}
    return Selection(kind, chosen, reasons)
