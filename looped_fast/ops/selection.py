"""Select one of several implementations, with a reason against each of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from looped_fast.errors import check_name


@dataclass(frozen=True)
class Selection:
    """The chosen implementation, and why each other one was not chosen.

    Attributes:
        kind: what was selected: ``backend`` or ``attention``.
        chosen: name of the implementation that runs.
        reasons: name of each other implementation -> why it does not run.
        attention: the selection of attention, if the triton backend was chosen.
        limit: what keeps the chosen one from its full speed here, if anything does.
    """

    kind: str
    chosen: str
    reasons: dict[str, str]
    attention: Selection | None = None
    limit: str | None = None

    def __str__(self) -> str:
        lines = [f"{self.kind}: {self.chosen}" + (f", {self.limit}" if self.limit else "")]
        lines += [f"  not {name}: {reason}" for name, reason in self.reasons.items()]
        lines += [] if self.attention is None else [str(self.attention)]
        return "\n".join(lines)


def select_by(
    kind: str, wanted: str, unsupported: Mapping[str, str | None], preference: str = "comes first"
) -> Selection:
    """Select the first implementation that supports the call, or the one that is wanted.

    Args:
        kind: what is selected; also the name of the argument that forces an implementation.
        wanted: ``auto``, or the name of an implementation.
        unsupported: implementation, the preferred ones first -> why it can't run the call, or None;
            at least one must be None.
        preference: completes "not <other>: <chosen> ..." under ``auto``.

    Raises:
        ValueError: ``wanted`` is unknown, or can't run the call; the message gives the reason.
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
