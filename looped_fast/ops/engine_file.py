"""The CPU engine's compiled file: found, or built once for the PyTorch that runs.

A wheel may have an engine for one PyTorch. For others it is compiled at its first use, into the
user's cache folder. The file's name says which PyTorch it is for, and has a hash of its sources.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from looped_fast.csrc import build
from looped_fast.csrc.build import BuildError
from looped_fast.ops import cache

PACKAGED = Path(__file__).parent  # where setup.py puts a wheel's engine


def unsupported() -> str | None:
    """Return why no engine could run here, even if it were built, or None."""
    if reason := build.unsupported_platform():
        return reason
    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability.startswith("AVX") else "it needs AVX2"


def load(retry: bool = False) -> Path:
    """Load the engine for this PyTorch, which is compiled first if there is none; return its file.

    Args:
        retry: compile even if the same compiler has failed before.

    Raises:
        BuildError: it can't be compiled, or does not load; the message says why, and what to do.
    """
    name = build.file_name()
    try:
        compiled = folder() / name
        for file in PACKAGED / name, compiled:
            if _load_error(file) is None:
                return file
        with _alone(compiled.with_suffix(".lock")):
            if _load_error(compiled):  # else another process has compiled it meanwhile
                _compile(compiled, retry)
        if reason := _load_error(compiled):
            raise BuildError(f"{compiled} does not load: {reason}")
        return compiled
    except BuildError as error:
        raise BuildError("; ".join([*_why_not_packaged(name), str(error)])) from None
    except OSError as error:
        cause = (
            f"the engine can't be written ({error}); set XDG_CACHE_HOME to a folder that can hold "
            f"it, and TMPDIR to one for its parts"
        )
        raise BuildError("; ".join([*_why_not_packaged(name), cause])) from error


def folder() -> Path:
    """Where engines are kept that were compiled on this machine."""
    try:
        return cache.folder() / "engines"
    except RuntimeError as error:  # the user has no home folder
        raise OSError(str(error)) from None


def _load_error(file: Path) -> str | None:
    if not file.exists():
        return "there is no such file"
    try:
        torch.ops.load_library(str(file))
    except OSError as error:  # the file is for a later C or C++ library, say
        return str(error.__cause__ or error)
    return None


@contextlib.contextmanager
def _alone(lock: Path) -> Iterator[None]:
    """Wait until no other process is here."""
    import fcntl  # where there is an engine, there is POSIX

    lock.parent.mkdir(parents=True, exist_ok=True)
    with lock.open("ab") as stream:
        with contextlib.suppress(OSError):  # no locks on this file system: some work is done twice
            fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _compile(file: Path, retry: bool) -> None:
    """Compile to ``file``. A failure is remembered beside it, as it can take half a minute."""
    compiler = build.find_compiler()
    version = build.run([*compiler, "--version"], "--version")
    failure = file.with_suffix(".failed")
    if not retry and failure.exists():
        past_version, _, reason = failure.read_text(encoding="utf-8").partition("\n\n")
        if past_version == version.strip():
            raise BuildError(reason)
    start = time.monotonic()
    reasons = "; ".join(_why_not_packaged(file.name))
    _say(
        f"compiling the CPU engine for PyTorch {torch.__version__}, once; it takes half a minute"
        + (f" ({reasons})" if reasons else "")
    )
    try:
        build.compile_engine(file)
    except BuildError as error:
        log = file.with_suffix(".log")
        log.write_text(error.output, encoding="utf-8")
        reason = f"{error} (all of it: {log}); python -m looped_fast.build tries again"
        failure.write_text(f"{version.strip()}\n\n{reason}", encoding="utf-8")
        raise BuildError(reason) from None
    failure.unlink(missing_ok=True)
    _say(f"compiled in {time.monotonic() - start:.0f} s: {file}")


def _say(message: str) -> None:
    print(f"looped_fast: {message}", file=sys.stderr, flush=True)


def _why_not_packaged(name: str) -> list[str]:
    """Why the engines that came with the package, if any, are not used."""
    if (PACKAGED / name).exists():
        return [f"{PACKAGED / name} does not load: {_load_error(PACKAGED / name)}"]
    versions = [file.name.split("-")[1].removeprefix("torch") for file in PACKAGED.glob("engine-*")]
    return [f"the installed engine is for PyTorch {v}, not {torch.__version__}" for v in versions]
