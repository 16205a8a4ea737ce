"""The folder that holds compiled kernels: the user's own, and writable by nobody else."""

from __future__ import annotations

import os
import stat
import sys
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "store"]


def cache_folder(kind: str) -> Path:
    """Return, and create if need be, the cache folder for `kind` ("host" or "cuda").

    It is CUPAGED_CACHE_DIR, or the platform's place for caches. What lies there is loaded and run as code.

    Raises
    ------
    PermissionError
        If the folder belongs to somebody else, or others can write to it.
    """
    root = _root()
    folder = root / kind
    for path in (root, folder):
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        if os.name == "posix":
            _check_owner(path)
    return folder


def store(folder: Path, name: str, content: bytes) -> Path:
    """Write a file into the cache in one step, so that no other process ever sees half of it."""
    descriptor, temporary = tempfile.mkstemp(dir=folder)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
    os.replace(temporary, folder / name)
    return folder / name


def _root() -> Path:
    named = os.environ.get("CUPAGED_CACHE_DIR")
    if named:
        return Path(named).resolve()
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local")) / "cupaged"
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "cupaged"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "cupaged"


def _check_owner(path: Path) -> None:
    status = path.stat()
    if status.st_uid != os.geteuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"the cache folder {path} must belong to the user who runs this and be writable by nobody else "
            f"(it has owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):o}): kernels are loaded from it. "
            f"Run chmod go-w on it, or let CUPAGED_CACHE_DIR name another folder"
        )
