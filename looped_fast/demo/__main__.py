"""Write a page that shows a looped transformer loop by loop: ``python -m looped_fast.demo``.

It is one HTML file that needs no server and no network: a slider over loop steps, a regression in
one dimension, a decision tree in two, and their errors.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from looped_fast import errors
from looped_fast.config import VERSION
from looped_fast.demo.page import page
from looped_fast.demo.scenes import AVERAGED, CURVE, PLANE, scene
from looped_fast.training.command_line import Parser, program

_MOST_FRAMES = 600  # prompts x loops: a page of about 2 MB


def main(args: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = Parser(program("demo"), description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=Path("looped_fast_demo.html"),
        help="the page (default: %(default)s)",
    )  # fmt: skip
    for name, default, what in (
        ("seed", 0, "seed of the prompts"),
        ("prompts", 6, "prompts to choose from"),
        ("max-loops", 36, "last loop step of the slider"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{what} (default: %(default)s)"
        )
    options = parser.parse_args(args)
    try:
        write(options.out, options.seed, options.prompts, options.max_loops)
    except errors.EXPECTED as error:
        return errors.report(error)
    size = options.out.stat().st_size / 1e6
    print(f"{options.out} ({size:.1f} MB): open it in a browser")
    return 0


def write(out: Path, seed: int, n_prompts: int, max_loops: int) -> None:
    """Write the page to ``out``.

    Raises:
        ValueError: ``out`` is a folder, a count is out of range, or the page would be too large.
        OSError: ``out`` can't be written.
    """
    if out.is_dir():
        raise ValueError(f"{out} is a folder; give a file's name, such as {out / 'demo.html'}")
    if not out.parent.is_dir():
        raise FileNotFoundError(f"{out}: there is no folder {out.parent}; make it first")
    if seed < 0:
        raise ValueError(f"seed = {seed}: at least 0 is needed")
    if n_prompts < 1:
        raise ValueError(f"prompts = {n_prompts}: at least 1 is needed")
    if n_prompts * max_loops > _MOST_FRAMES:
        raise ValueError(
            f"prompts = {n_prompts} and max_loops = {max_loops} make {n_prompts * max_loops} "
            f"pictures of each model, and at most {_MOST_FRAMES} fit in the page; lower one of them"
        )
    words = ["python", "-m", "looped_fast.demo", "--seed", str(seed)]
    words += ["--prompts", str(n_prompts), "--max-loops", str(max_loops)]
    data = {
        "command": shlex.join(words),
        "version": VERSION,
        "loops": max_loops,
        "averaged": AVERAGED,
        "curve": scene(CURVE, n_prompts, max_loops, seed),
        "plane": scene(PLANE, n_prompts, max_loops, seed),
    }
    out.write_text(page(data), encoding="utf-8")


if __name__ == "__main__":
    sys.exit(main())
