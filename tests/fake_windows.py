"""Windows, as far as another system can act it; nobody has run the package on the real one.

``python -X warn_default_encoding`` with ``import fake_windows; fake_windows.start()`` before the
package: no POSIX modules and functions, no folder that opens, no open file that is renamed or
removed, no name that Windows forbids, and no text file without an encoding.
"""

from __future__ import annotations

import errno
import importlib
import os
import re
import shutil
import signal
import sys
import types
import warnings
from typing import Any

MODULES = ("fcntl", "grp", "pwd", "resource", "termios")
FUNCTIONS = (
    "chown", "fork", "forkpty", "getegid", "geteuid", "getgid", "getloadavg", "getuid", "killpg",
    "mkfifo", "register_at_fork", "sched_getaffinity", "sched_setaffinity", "setsid", "sysconf",
    "uname", "wait", "WNOHANG",
)  # fmt: skip
SIGNALS = ("SIGALRM", "SIGCHLD", "SIGHUP", "SIGKILL", "SIGUSR1", "SIGUSR2")
IMPORTED = (  # before the act: they look for more of Windows than there is in it
    "matplotlib.backends.backend_agg", "matplotlib.backends.backend_pdf",
    "torch.utils.tensorboard", "tqdm", "tyro",
)  # fmt: skip
_FORBIDDEN = re.compile(
    r'[<>:"|?*\\\x00-\x1f]|[ .]$|^(con|prn|aux|nul|com\d|lpt\d)(\.|$)', re.IGNORECASE
)


def forbidden(path: str) -> str | None:
    """The first part of a path that no file can be called on Windows, or None."""
    parts = [part for part in path.split("/") if part not in ("", ".", "..")]
    return next((part for part in parts if _FORBIDDEN.search(part)), None)


def start() -> None:
    """Act Windows for what is imported from now on; there is no way back."""
    for name in IMPORTED:
        importlib.import_module(name)
    for name in MODULES:
        sys.modules[name] = None
    for owner, names in ((os, FUNCTIONS), (signal, SIGNALS)):
        for name in names:
            if hasattr(owner, name):
                delattr(owner, name)
    sys.modules["msvcrt"] = _msvcrt()
    sys.platform = "win32"
    shutil._use_fd_functions = False  # rmtree would open folders
    shutil._winapi = types.SimpleNamespace(  # which shutil.which asks since 3.12
        NeedCurrentDirectoryForExePath=lambda command: False
    )
    rename = os.rename

    def rename_to_new(source: Any, target: Any) -> None:
        if os.path.exists(target):
            raise FileExistsError(errno.EEXIST, "it exists", str(target))
        rename(source, target)

    os.rename = rename_to_new
    warnings.filterwarnings("error", category=EncodingWarning, module=r"looped_fast|kernels")
    sys.addaudithook(_refuse)


def _msvcrt() -> types.ModuleType:
    module: Any = types.ModuleType("msvcrt")
    module.LK_UNLCK, module.LK_NBLCK = 0, 2
    locked: set[tuple[int, int, int]] = set()  # device, file, byte

    def locking(descriptor: int, mode: int, n_bytes: int) -> None:
        assert n_bytes == 1
        status = os.fstat(descriptor)
        place = status.st_dev, status.st_ino, os.lseek(descriptor, 0, os.SEEK_CUR)
        if mode == module.LK_UNLCK:
            locked.remove(place)
        elif place in locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        else:
            locked.add(place)

    module.locking = locking
    return module


def _refuse(event: str, arguments: tuple) -> None:
    """Raise what Windows would; an audit hook, which can't be taken away."""
    if event == "open" and not isinstance(arguments[0], int):
        path, _, flags = os.fsdecode(arguments[0]), *arguments[1:]
        if path.startswith(("/proc/", "/dev/")):
            raise FileNotFoundError(errno.ENOENT, "No such file", path)
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            _check_name(path)
    elif event == "os.mkdir":
        _check_name(os.fsdecode(arguments[0]))
    elif event == "os.rename":
        _check_name(os.fsdecode(arguments[1]))
        _check_closed(arguments[0])
        _check_closed(arguments[1])
    elif event in ("os.remove", "os.rmdir"):
        _check_closed(arguments[0])


def _check_name(path: str) -> None:
    if forbidden(path):
        raise OSError(errno.EINVAL, "The filename, directory name, or volume label is wrong", path)


def _check_closed(path: Any) -> None:
    path = os.path.abspath(os.fsdecode(path))
    for descriptor in os.listdir("/proc/self/fd"):
        try:
            opened = os.readlink(f"/proc/self/fd/{descriptor}")
        except FileNotFoundError:  # the one that lists them
            continue
        if opened == path or opened.startswith(path + os.sep):
            raise PermissionError(errno.EACCES, f"{opened} is open", path)
