"""The folder that holds compiled kernels: the user's own, and writable by nobody else.

A file's name ends in a digest of its content. It is loaded only if it is the user's own, nobody else may write it and
the digest is right; any other file is removed and made anew.
"""

from __future__ import annotations

import errno
import hashlib
import os
import shutil
import stat
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from cupaged.errors import KernelBuildError

__all__ = ["cache_folder", "cached_file"]

ANOTHER = "let CUPAGED_CACHE_DIR name another folder"
WORK_PREFIX = "building-"
WORK_SECONDS = 24 * 3600  # no build takes as long: what is older was left by a process that was killed
DIGEST_LENGTH = 32
OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
UNMAPPED_OWNER = 65534  # what Linux shows inside a container for an owner that the container does not know


def cached_file(kind: str, stem: str, suffix: str, make: Callable[[Path], bytes]) -> Path:
    """Return a file of the cache, made only if no sound one is there.

    Processes may do this at the same time: a file appears in one step, and two that are made at once are both good.

    Parameters
    ----------
    kind : {"host", "cuda"}
        Which cache.
    stem : str
        What the content depends on; the file's name starts with it.
    suffix : str
        How the file's name ends, ``".so"``.
    make : callable
        Returns the content; it gets an empty folder to work in, which is removed afterwards.

    Raises
    ------
    KernelBuildError
        If the folder cannot be made or written, or a folder that is not empty lies in the file's place; besides,
        what `make` raises.
    PermissionError
        See `cache_folder`.
    """
    folder = cache_folder(kind)
    with _failure_names(folder):
        found = _sound_file(folder, stem, suffix)
        if found is not None:
            return found
        _remove_abandoned_work(folder)
        with tempfile.TemporaryDirectory(prefix=WORK_PREFIX, dir=folder) as work:
            content = make(Path(work))
            digest = hashlib.sha256(content).hexdigest()[:DIGEST_LENGTH]
            written = _write(Path(work) / "content", content)
            return written.replace(folder / f"{stem}-{digest}{suffix}")


def cache_folder(kind: str) -> Path:
    """Return, and create if need be, the cache folder for `kind` ("host" or "cuda").

    It is CUPAGED_CACHE_DIR, or the platform's place for caches. What lies there is loaded and run as code.

    Raises
    ------
    PermissionError
        If the folder belongs to somebody else, or others can write to it or put another folder in its place.
    KernelBuildError
        If there is no such folder and it cannot be made.
    """
    root = _root()
    with _failure_names(root):
        root = Path(os.path.realpath(root))
        _make_folder(root / kind)
        folder = Path(os.path.realpath(root / kind))
        statuses = {path: path.lstat() for path in (root, folder, *folder.parents)}
    if os.name == "posix":
        for path, status in statuses.items():
            if path in (root, folder):
                _check_is_private(path, status)
            else:
                _check_keeps_what_it_holds(folder, path, status)
    return folder


@contextmanager
def _failure_names(folder: Path) -> Iterator[None]:
    """Turn what the system refuses into one sentence that names the folder and the way out."""
    try:
        yield
    except OSError as error:
        reason = f"{error.strerror}: {error.filename}" if error.strerror and error.filename else str(error)
        raise KernelBuildError(f"compiled kernels cannot be kept in {folder} ({reason}): {ANOTHER}") from error


# --- where the folder is --------------------------------------------------------------------------------------------


def _root() -> Path:
    named = os.environ.get("CUPAGED_CACHE_DIR")
    if named:
        return _expanded(named)
    if sys.platform == "win32":
        return (_absolute("LOCALAPPDATA") or _home() / "AppData" / "Local") / "cupaged"
    if sys.platform == "darwin":
        return _home() / "Library" / "Caches" / "cupaged"
    return (_absolute("XDG_CACHE_HOME") or _home() / ".cache") / "cupaged"


def _expanded(named: str) -> Path:
    try:
        return Path(named).expanduser()
    except RuntimeError as error:
        raise KernelBuildError(f"CUPAGED_CACHE_DIR must name a folder; got {named!r} ({error})") from None


def _absolute(variable: str) -> Path | None:
    """Return the folder that a variable names; None if it is relative, which the XDG specification says to ignore."""
    folder = Path(os.environ.get(variable, ""))
    return folder if folder.is_absolute() else None


def _home() -> Path:
    """Return the user's home: what HOME says, else what the system's list of users says."""
    try:
        home = Path.home() if os.environ.get("HOME") or os.name != "posix" else _home_of_user()
    except (KeyError, RuntimeError):
        home = Path()
    if not home.is_absolute():
        raise KernelBuildError(
            f"there is no home folder to keep compiled kernels in (HOME is {os.environ.get('HOME')!r}): "
            f"let CUPAGED_CACHE_DIR name a folder"
        )
    return home


def _home_of_user() -> Path:
    import pwd

    return Path(pwd.getpwuid(os.geteuid()).pw_dir)


def _make_folder(folder: Path) -> None:
    """Make a folder and the missing ones above it, for the user alone whatever the umask is."""
    for path in reversed((folder, *folder.parents)):
        if path.exists() and not path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))
        if not path.is_dir():
            path.mkdir(mode=0o700, exist_ok=True)


# --- whom it belongs to ---------------------------------------------------------------------------------------------


def _check_is_private(path: Path, status: os.stat_result) -> None:
    if status.st_uid != os.geteuid() or status.st_mode & OTHERS_WRITE:
        raise PermissionError(
            f"the cache folder {path} must belong to the user who runs this and be writable by nobody else "
            f"(it has {_rights(status)}): kernels are loaded from it. Run chmod go-w on it, or {ANOTHER}"
        )


def _check_keeps_what_it_holds(folder: Path, parent: Path, status: os.stat_result) -> None:
    """Raise if somebody else can rename what lies in `parent`, which is above the cache folder."""
    known_owner = status.st_uid in (os.geteuid(), 0, UNMAPPED_OWNER)
    shared = status.st_mode & stat.S_IWOTH or (status.st_mode & stat.S_IWGRP and not _is_group_of_one(status))
    if not known_owner or (shared and not status.st_mode & stat.S_ISVTX):
        raise PermissionError(
            f"the cache folder {folder} must lie where nobody else can put another one in its place, but {parent} "
            f"has {_rights(status)}: kernels are loaded from it. Take the others' rights away, or {ANOTHER}"
        )


def _rights(status: os.stat_result) -> str:
    return f"owner {status.st_uid} and mode {stat.S_IMODE(status.st_mode):o}"


def _is_group_of_one(status: os.stat_result) -> bool:
    """Whether the group is the owner's own: many systems give each user a group of the same name."""
    import grp
    import pwd

    try:
        owner, group = pwd.getpwuid(status.st_uid), grp.getgrgid(status.st_gid)
    except KeyError:
        return False
    return owner.pw_name == group.gr_name and set(group.gr_mem) <= {owner.pw_name}


# --- the files in it ------------------------------------------------------------------------------------------------


def _sound_file(folder: Path, stem: str, suffix: str) -> Path | None:
    """Return a file with this stem that may be loaded; those that may not are removed."""
    length = len(f"{stem}-{suffix}") + DIGEST_LENGTH
    names = sorted([name for name in os.listdir(folder) if len(name) == length and name.startswith(f"{stem}-")])
    for name in names:
        path = folder / name
        if name.endswith(suffix) and _is_sound(path, name[len(stem) + 1 :][:DIGEST_LENGTH]):
            return path
        with suppress(OSError):
            path.rmdir() if _is_folder(path) else path.unlink()
    for path in [folder / name for name in names]:
        if _is_folder(path):  # it is not empty, and not of this cache's making
            raise KernelBuildError(
                f"a compiled kernel cannot be kept in {path}, as that is a folder: remove it, or {ANOTHER}"
            )
    return None


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_sound(path: Path, digest: str) -> bool:
    """Whether it is a file of the user's own that nobody else may write, with the content that its name tells."""
    try:
        with open(path, "rb", opener=_open_itself) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                return False
            if os.name == "posix" and (status.st_uid != os.geteuid() or status.st_mode & OTHERS_WRITE):
                return False
            return hashlib.file_digest(file, "sha256").hexdigest()[:DIGEST_LENGTH] == digest
    except OSError:
        return False


def _open_itself(path: str, flags: int) -> int:
    """Open a file, not what a link points to, and without waiting for who writes into a pipe."""
    return os.open(path, flags | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))


def _write(path: Path, content: bytes) -> Path:
    with open(path, "xb", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
        file.write(content)
    return path


def _remove_abandoned_work(folder: Path) -> None:
    """Remove what builds left that were killed."""
    for path in folder.glob(f"{WORK_PREFIX}*"):
        with suppress(OSError):
            if time.time() - path.lstat().st_mtime > WORK_SECONDS:
                shutil.rmtree(path, ignore_errors=True)
