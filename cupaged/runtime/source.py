"""A kernel's source: the .cu file, the headers that it includes, its signature, and a digest of all that.

The signature is read from the source itself, so that every argument is checked and typed by what the kernel says.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import ml_dtypes
import numpy as np

from cupaged.errors import KernelBuildError, written

__all__ = [
    "KernelSource",
    "Parameter",
    "added_defines",
    "asked_for",
    "kernels_defining",
    "kernels_folder",
    "kernels_from",
]

# How C++ spells the types that a kernel's parameters may have. `long` has no entry: its width differs by platform.
DTYPE_OF_C_TYPE = {
    "bool": np.dtype(np.bool_),
    "char": np.dtype(np.int8),
    "signed char": np.dtype(np.int8),
    "unsigned char": np.dtype(np.uint8),
    "short": np.dtype(np.int16),
    "unsigned short": np.dtype(np.uint16),
    "int": np.dtype(np.int32),
    "unsigned": np.dtype(np.uint32),
    "unsigned int": np.dtype(np.uint32),
    "long long": np.dtype(np.int64),
    "unsigned long long": np.dtype(np.uint64),
    "float": np.dtype(np.float32),
    "double": np.dtype(np.float64),
    "half": np.dtype(np.float16),
    "__half": np.dtype(np.float16),
    "__nv_bfloat16": np.dtype(ml_dtypes.bfloat16),
}
C_TYPE_OF_DTYPE = {
    np.dtype(np.float16): "__half",
    np.dtype(ml_dtypes.bfloat16): "__nv_bfloat16",
    np.dtype(np.float32): "float",
    np.dtype(np.int32): "int",
    np.dtype(np.int64): "long long",
}

_chosen_folder: ContextVar[Path | None] = ContextVar("cupaged_kernels_folder", default=None)
_added_defines: ContextVar[dict[str, str] | None] = ContextVar("cupaged_added_defines", default=None)


def kernels_folder() -> Path:
    """Return the folder that kernels are read from.

    The folder of `kernels_from`, else the one that CUPAGED_KERNELS names, else ``kernels_cu`` beside the package in a
    checkout, else the copy inside an installed package.
    """
    chosen = _chosen_folder.get()
    if chosen is not None:
        return chosen
    named = os.environ.get("CUPAGED_KERNELS")
    return Path(os.path.realpath(os.path.expanduser(named))) if named else _own_folder()


@cache
def _own_folder() -> Path:
    package = Path(__file__).resolve().parents[1]
    beside = package.parent / "kernels_cu"
    return beside if beside.is_dir() else package / "kernels_cu"


@contextmanager
def kernels_from(folder: str | os.PathLike[str]) -> Iterator[Path]:
    """Within the block, read kernels from `folder`: a copy of ``kernels_cu`` to change and compare.

    It holds for the thread that enters the block, not for threads started inside.

    Parameters
    ----------
    folder : path-like
        A folder with the structure of ``kernels_cu``.

    Raises
    ------
    ValueError
        If `folder` has no ``include`` folder.
    """
    if not isinstance(folder, str | os.PathLike):
        raise TypeError(f"folder must be a path; got {type(folder).__name__} {written(folder)}")
    path = Path(folder).resolve()
    if not (path / "include").is_dir():
        raise ValueError(f"folder: expected a copy of kernels_cu, with an include folder; got {path}")
    token = _chosen_folder.set(path)
    try:
        yield path
    finally:
        _chosen_folder.reset(token)


@contextmanager
def kernels_defining(**defines: object) -> Iterator[None]:
    """Within the block, build every kernel with these macros besides its own: an experiment's switch in a kernel.

    It holds for the thread that enters the block, and for kernels that are loaded inside it. A macro that a kernel does
    not read changes nothing in it.

    Parameters
    ----------
    **defines
        Macro names and their values; they win over a kernel's own.
    """
    token = _added_defines.set({**added_defines(), **{name: str(value) for name, value in defines.items()}})
    try:
        yield
    finally:
        _added_defines.reset(token)


def added_defines() -> dict[str, str]:
    """Return the macros of the `kernels_defining` blocks around the caller."""
    return _added_defines.get() or {}


def asked_for() -> tuple[object, object]:
    """Return what the `kernels_from` and `kernels_defining` blocks around the caller ask for."""
    return _chosen_folder.get(), _added_defines.get()


@dataclass(frozen=True)
class Parameter:
    """One parameter of a kernel; `dtype` is that of the value, or of what a pointer points to."""

    name: str
    c_type: str
    dtype: np.dtype
    is_pointer: bool
    is_const: bool


@dataclass(frozen=True)
class KernelSource:
    """A .cu file, an entry point in it, and the defines that specialise it.

    Parameters
    ----------
    folder : Path
        The kernels folder, which holds ``include``.
    file : str
        The .cu file, relative to `folder`.
    entry : str
        Name of the ``extern "C" __global__`` function.
    defines : tuple of (str, str)
        Macros, in order.
    """

    folder: Path
    file: str
    entry: str
    defines: tuple[tuple[str, str], ...] = ()

    @classmethod
    def read(cls, file: str, entry: str, defines: Mapping[str, object] | None = None) -> KernelSource:
        """Return the source of `entry` in `file`, of the current kernels folder."""
        folder = kernels_folder()
        if not (folder / "include").is_dir() and _chosen_folder.get() is None and os.environ.get("CUPAGED_KERNELS"):
            raise KernelBuildError(
                f"CUPAGED_KERNELS must name a copy of kernels_cu, with an include folder; "
                f"got {os.environ['CUPAGED_KERNELS']!r}, which is {folder}"
            )
        source = cls(folder, file, entry, tuple((k, str(v)) for k, v in (defines or {}).items()))
        try:
            for of_one_moment in ("stamp_when_read", "text", "digest"):
                getattr(source, of_one_moment)
        except (OSError, UnicodeDecodeError) as error:
            raise KernelBuildError(_why_unread(error, source)) from None
        return source

    @property
    def path(self) -> Path:
        """The .cu file."""
        return self.folder / self.file

    @property
    def include_folder(self) -> Path:
        """Where the kernels' own headers are."""
        return self.folder / "include"

    @cached_property
    def text(self) -> str:
        """The .cu file's text."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def waits_for_kernel_before(self) -> bool:
        """Whether the kernel, specialised so, waits by itself for the one before it, and may start while that ends.

        Both the define LAUNCH_OVERLAP and the wait of kernels_cu/include/launch_overlap.cuh must be there.
        """
        asked = dict(self.defines).get("LAUNCH_OVERLAP") == "1"
        return asked and re.search(r"^ *wait_for_kernel_before\(\);", self.text, re.MULTILINE) is not None

    @cached_property
    def files(self) -> tuple[Path, ...]:
        """The .cu file and every header of the kernels folder that it reaches, each once."""
        found: dict[Path, None] = {}
        queue = [self.path]
        while queue:
            path = queue.pop()
            if path in found:
                continue
            found[path] = None
            for name in re.findall(
                r'^\s*#\s*include\s*["<]([^">]+)[">]', path.read_text(encoding="utf-8"), re.MULTILINE
            ):
                header = next((f / name for f in (path.parent, self.include_folder) if (f / name).is_file()), None)
                if header is not None:
                    queue.append(header)
        return tuple(found)

    @cached_property
    def digest(self) -> str:
        """SHA-256 over the text of all files and the defines: what a compiled kernel is kept under."""
        state = hashlib.sha256(repr((self.file, self.entry, self.defines)).encode())
        for path in sorted(self.files):
            state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        return state.hexdigest()

    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Return path, time and size of every file: unchanged as long as nothing was edited."""
        return tuple((name, s.st_mtime_ns, s.st_size) for name in self._file_names for s in (os.stat(name),))

    @cached_property
    def _file_names(self) -> tuple[str, ...]:
        return tuple(map(str, self.files))

    @cached_property
    def stamp_when_read(self) -> tuple[tuple[str, int, int], ...]:
        """The stamp of the files when the source was read."""
        return self.stamp()

    def is_unchanged(self) -> bool:
        """Return whether every file is as it was when the source was read."""
        try:
            return self.stamp() == self.stamp_when_read
        except FileNotFoundError:
            return False

    def check_unchanged(self) -> None:
        """Raise KernelBuildError if a file was edited since the source was read: load the kernel again."""
        if not self.is_unchanged():
            raise KernelBuildError(f"{self.path} or a header was edited after it was loaded: load the kernel again")

    @cached_property
    def parameters(self) -> tuple[Parameter, ...]:
        """The entry point's parameters, with macros resolved by the defines.

        Raises
        ------
        KernelBuildError
            If the entry point is missing, or a parameter's type is not one that an argument can have.
        """
        text = _without_comments(self.text)
        opening = r'extern\s+"C"\s+__global__\s+void\s+(?:__launch_bounds__\s*\([^)]*\)\s*)?'
        head = re.search(opening + re.escape(self.entry) + r"\s*\(", text)
        if head is None:
            raise KernelBuildError(f'{self.file} has no entry point: extern "C" __global__ void {self.entry}(...)')
        end = text.index(")", head.end())
        inside = text[head.end() : end].strip()
        return tuple(self._parameter(part) for part in inside.split(",")) if inside else ()

    def _parameter(self, declaration: str) -> Parameter:
        words = re.findall(r"\w+|\*", declaration)
        name, type_words = words[-1], [w for w in words[:-1] if w not in ("const", "__restrict__", "*")]
        macros = dict(self.defines)
        c_type = " ".join(macros.get(word, word) for word in type_words)
        if c_type not in DTYPE_OF_C_TYPE:
            known = ", ".join(DTYPE_OF_C_TYPE)
            raise KernelBuildError(
                f"{self.file}: parameter {name} of {self.entry} has type {c_type!r}; arguments can be pointers to, "
                f"or values of: {known}"
            )
        return Parameter(name, c_type, DTYPE_OF_C_TYPE[c_type], "*" in words, "const" in words)


def _why_unread(error: OSError | UnicodeDecodeError, source: KernelSource) -> str:
    if isinstance(error, FileNotFoundError):
        return f"there is no kernel file {error.filename}"
    return f"the kernel file {source.path} or a header of it cannot be read ({error})"


def _without_comments(text: str) -> str:
    return re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
