"""The commands: ``looped-fast COMMAND ...``, or ``python -m looped_fast COMMAND ...``.

``looped-fast train`` runs what ``python -m looped_fast.train`` does. A command's module is imported
when the command is run, so that listing the commands takes no longer than importing the package.
"""

from __future__ import annotations

import importlib
import sys

from looped_fast import errors
from looped_fast.config import VERSION

COMMANDS = {
    "train": "train a transformer on a function class",
    "evaluate": "evaluate trained models on held-out prompts, with baselines",
    "sweep": "run one of the paper's ablations",
    "openml": "evaluate on each tabular set, held out of training in turn",
    "state-probes": "probe what the hidden states encode at each loop step",
    "reproduce": "reproduce the paper's figures",
    "demo": "write a page that shows trained models loop by loop",
    "presets": "print the presets",
    "pretrained": "make a folder of pretrained weights from a finished run",
    "build": "build the CPU engine for the PyTorch that is installed, ahead of its first use",
    "env-report": "say which backend and precision run here, and why; print the environment",
}


def main(args: list[str] | None = None) -> int:
    """Run the command that the first argument names; return its exit status."""
    args = sys.argv[1:] if args is None else args
    if not args or args[0] in ("-h", "--help"):
        print(_usage())
        return 0
    if args[0] == "--version":
        print(f"looped_fast {VERSION}")
        return 0
    try:
        module = _module(args[0])
    except ValueError as error:
        return errors.report(error)
    status: int = importlib.import_module(module).main(args[1:])
    return status


def _module(command: str) -> str:
    """The module of ``command``, which may be spelt with dashes or, as modules, underscores."""
    if command.startswith("-"):
        raise ValueError(
            f"unknown flag {command}; the command comes first: looped-fast COMMAND {command} ..."
        )
    if command.replace("_", "-") not in COMMANDS:
        raise errors.unknown_name("command", command, COMMANDS)
    module = f"looped_fast.{command.replace('-', '_')}"
    return f"{module}.__main__" if command in ("demo", "pretrained") else module  # packages


def _usage() -> str:
    width = max(map(len, COMMANDS))
    return "\n".join(
        [
            "usage: looped-fast COMMAND ... (or python -m looped_fast COMMAND ...)\n",
            *(f"  {name:{width}}  {what}" for name, what in COMMANDS.items()),
            "\nlooped-fast COMMAND --help lists the flags of a command; looped-fast --version "
            "prints the version.",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
