"""The host backend: a .cu file built by the C++ compiler, run on NumPy arrays by the scheduler in ``host/``.

Every CUDA thread is a fiber with real barriers; `schedule` shuffles their order, `record_traffic` counts the memory
sectors that each warp-wide load touches. Times say nothing about a GPU. A thread runs until it meets a barrier or a
warp operation: one that waits for another by reading memory over and over waits for ever.

`schedule` and `record_traffic` hold for the thread that enters them; threads started inside do not inherit them.
"""

from __future__ import annotations

import ctypes
import errno
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import cache, cached_property, lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np

from cupaged.errors import BackendUnavailableError, KernelBuildError, KernelLaunchError, UnsupportedError, written
from cupaged.kinds import is_integer
from cupaged.runtime.arguments import argument_converters, check_array, check_extent, typed_values
from cupaged.runtime.cache import ANOTHER, cached_file
from cupaged.runtime.environment import environment_flag
from cupaged.runtime.launch import PreparedLaunch
from cupaged.runtime.source import KernelSource, Parameter

__all__ = ["ArrayTraffic", "HostKernel", "LaunchTraffic", "LineTraffic", "find_compiler", "record_traffic", "schedule"]

HEADERS = Path(__file__).resolve().parent / "host"
SCHEDULER = HEADERS / "scheduler.cpp"
MAX_SHARED_BYTES = 227 * 1024  # what a block can have on an H100; 163 KiB on an A100, 99 KiB on consumer cards
MAX_WORKERS = 1024
FLAGS = (
    "-std=c++20",
    "-O2",
    "-g1",
    "-fPIC",
    "-shared",
    "-pthread",
    "-Wall",
    "-Wno-unknown-pragmas",
    "-Wno-attributes",
    "-fno-strict-aliasing",
)  # nvcc does not assume that types keep apart either
NEEDS_COMPILER = "the host backend needs a C++20 compiler"
INSTALL = (
    "install one (Debian, Ubuntu: apt-get install g++; Fedora: dnf install gcc-c++; macOS: xcode-select --install) "
    "or let CXX name it"
)
SANITIZER_FLAGS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer")

_seed: ContextVar[int] = ContextVar("cupaged_host_seed", default=0)
_traffic_log: ContextVar[list[LaunchTraffic] | None] = ContextVar("cupaged_host_traffic", default=None)


# --- what a run can be asked for ----------------------------------------------------------------------------------


@contextmanager
def schedule(seed: int) -> Iterator[None]:
    """Within the block, run threads, warps and blocks in an order shuffled by `seed`; 0 is index order.

    A kernel without races gives the same result in every order. Reading shared memory that another thread writes,
    with no barrier between, gives a different one. Copies that run on their own (cp.async) may be made at any time
    between their start and the wait for them: when they are waited for if `seed` modulo 3 is 0, at their start if it is
    1, and either, by chance, if it is 2. What they will fill is NaN meanwhile. So three seeds in a row show whoever
    reads it too early, and whoever still writes it.
    """
    if not is_integer(seed):
        raise TypeError(f"seed must be an integer; got {type(seed).__name__} {written(seed)}")
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must lie in [0, 2**63); got {written(int(seed))}")
    token = _seed.set(int(seed))
    try:
        yield
    finally:
        _seed.reset(token)


@dataclass(frozen=True)
class LineTraffic:
    """Global loads that one source line makes from one array over a launch.

    Attributes
    ----------
    file, line : str, int
        Where the load stands.
    array : str
        The kernel's parameter whose memory is read; "" if it is none of them, joined by "+" if it is several.
    requests : int
        Warp-wide load instructions.
    sectors : int
        32-byte sectors that the requests touch, counted per request.
    bytes : int
        Distinct bytes that the requests ask for, counted per request.
    """

    file: str
    line: int
    array: str
    requests: int
    sectors: int
    bytes: int


@dataclass(frozen=True)
class ArrayTraffic:
    """What thread blocks touch of one array at least once, summed over the blocks of a launch.

    Attributes
    ----------
    array : str
        The kernel's parameter; "" for memory that is in none of them.
    block_sectors, block_bytes : int
        Distinct 32-byte sectors, and distinct bytes.
    """

    array: str
    block_sectors: int
    block_bytes: int


@dataclass(frozen=True)
class LaunchTraffic:
    """Global loads of one launch, by source line, and what its thread blocks touched, by array."""

    kernel: str
    lines: tuple[LineTraffic, ...]
    arrays: tuple[ArrayTraffic, ...]

    @property
    def requests(self) -> int:
        """Warp-wide load instructions."""
        return sum(line.requests for line in self.lines)

    @property
    def sectors(self) -> int:
        """32-byte sectors touched, counted per request."""
        return sum(line.sectors for line in self.lines)

    @property
    def bytes(self) -> int:
        """Distinct bytes asked for, counted per request."""
        return sum(line.bytes for line in self.lines)

    @property
    def sectors_per_request(self) -> float:
        """What Nsight Compute shows as l1tex sectors over requests; NaN for a launch without loads."""
        return self.sectors / self.requests if self.requests else float("nan")

    @property
    def used_fraction(self) -> float:
        """Bytes asked for over bytes of the sectors that carry them; NaN for a launch without loads."""
        return self.bytes / (32 * self.sectors) if self.sectors else float("nan")

    @property
    def block_sectors(self) -> int:
        """32-byte sectors touched, counted once per thread block: what an L1 cache that loses nothing would fetch."""
        return sum(array.block_sectors for array in self.arrays)

    @property
    def used_fraction_per_block(self) -> float:
        """Bytes that a block asks for over bytes of the sectors that it touches; NaN for a launch without loads."""
        asked = sum(array.block_bytes for array in self.arrays)
        return asked / (32 * self.block_sectors) if self.block_sectors else float("nan")

    def of(self, *arrays: str) -> LaunchTraffic:
        """Return the part that reads these parameters' arrays."""

        def wanted(part: LineTraffic | ArrayTraffic) -> bool:
            return set(part.array.split("+")) <= set(arrays)

        return LaunchTraffic(self.kernel, tuple(filter(wanted, self.lines)), tuple(filter(wanted, self.arrays)))


@contextmanager
def record_traffic() -> Iterator[list[LaunchTraffic]]:
    """Within the block, record the global loads of every launch; yields the list that they are appended to.

    Lanes of a warp are put together by the n-th execution of a source line since they last met at a barrier or a
    warp operation; loads count if they go through ``load_global`` or ``__ldg``.
    """
    log: list[LaunchTraffic] = []
    token = _traffic_log.set(log)
    try:
        yield log
    finally:
        _traffic_log.reset(token)


# --- the compiler -------------------------------------------------------------------------------------------------


def find_compiler() -> tuple[tuple[str, ...], str]:
    """Return the C++ compiler's command line and version: ``$CXX``, else g++, else clang++.

    Raises
    ------
    BackendUnavailableError
        If there is none; the message says what to install.
    """
    if sys.platform == "win32":
        raise BackendUnavailableError("the host backend runs on Linux and macOS; on Windows, use WSL or a GPU")
    named = os.environ.get("CXX")
    if named:
        return _answering(f"{named} (from CXX)", _words_of_cxx(named))
    for candidate in ("g++", "clang++"):
        with suppress(BackendUnavailableError):
            return _answering(candidate, (candidate,))
    raise BackendUnavailableError(f"{NEEDS_COMPILER} and found neither g++ nor clang++ on PATH: {INSTALL}")


def _words_of_cxx(named: str) -> tuple[str, ...]:
    try:
        words = tuple(shlex.split(named))
    except ValueError as error:
        raise BackendUnavailableError(
            f"CXX must be a C++20 compiler and its options, as a shell reads them; got {named!r} ({error})"
        ) from None
    if not words:
        raise BackendUnavailableError(f"CXX must name a C++20 compiler; got {named!r}")
    return words


def _answering(what: str, command: tuple[str, ...]) -> tuple[tuple[str, ...], str]:
    """Return a command, by its full path as it runs in another folder, and its version line."""
    found = shutil.which(command[0])
    if found is None:
        raise BackendUnavailableError(f"{NEEDS_COMPILER} and found {what} not on PATH: {INSTALL}")
    command = (os.path.abspath(found), *command[1:])
    try:
        return command, _version_line(command)
    except (OSError, subprocess.SubprocessError) as error:
        raise BackendUnavailableError(
            f"{NEEDS_COMPILER}, but {what} does not answer --version ({error}): {INSTALL}"
        ) from None


@cache
def _version_line(command: tuple[str, ...]) -> str:
    question = [*command, "--version"]
    answer = subprocess.run(question, capture_output=True, text=True, errors="replace", timeout=60, check=True)
    return answer.stdout.split("\n", 1)[0]


def _platform_flags(version: str) -> tuple[str, ...]:
    """Return flags that keep the libraries of two kernels apart, so that neither uses what is the other's."""
    flags: tuple[str, ...] = ()
    if sys.platform == "linux":
        flags += ("-Wl,-Bsymbolic",)
    elif sys.platform == "darwin":
        flags += ("-Wl,-undefined,dynamic_lookup",)  # what a kernel calls of the scheduler is found when it is loaded
    if "clang" not in version:
        flags += ("-fno-gnu-unique",)
    elif sanitizing():
        flags += ("-shared-libsan",)
    return flags


def sanitizing() -> bool:
    """Whether builds carry the address and undefined-behaviour sanitizers (``CUPAGED_HOST_SANITIZE=1``).

    Raises
    ------
    BackendUnavailableError
        If they do but their library was not loaded before Python, which would end the process.
    """
    if not environment_flag("CUPAGED_HOST_SANITIZE"):
        return False
    if "asan" not in os.environ.get("LD_PRELOAD", ""):
        raise BackendUnavailableError(
            "CUPAGED_HOST_SANITIZE needs the sanitizer's library in LD_PRELOAD: start Python with the variables that "
            "cupaged.runtime.host.sanitizer_environment() returns"
        )
    return True


def sanitizer_environment() -> dict[str, str]:
    """Return the environment variables under which a Python process can load sanitized kernels."""
    command, version = find_compiler()
    name = f"libclang_rt.asan-{platform.machine()}.so" if "clang" in version else "libasan.so"
    library = subprocess.run([*command, f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
    return {
        "CUPAGED_HOST_SANITIZE": "1",
        "LD_PRELOAD": library,
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }


def _build(name: str, text: str, key: str, extra: tuple[str, ...] = ()) -> Path:
    """Compile `text` to a shared object in the cache, under a name that holds a digest of everything it depends on."""
    command, version = find_compiler()
    flags = FLAGS + _platform_flags(version) + (SANITIZER_FLAGS if sanitizing() else ())
    identity = (key, text, command, version, platform.machine(), flags, extra, _headers_digest())
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()

    def make(work: Path) -> bytes:
        unit, built = work / f"{name}.cpp", work / f"{name}.so"
        unit.write_text(text, encoding="utf-8")
        same_each_time = f"-ffile-prefix-map={work}=."  # the folder's name would stand in what is built
        _compile((*command, *flags, same_each_time, str(unit), *extra, "-o", str(built)), name, built)
        return built.read_bytes()

    return cached_file("host", f"{name}-{digest[:32]}", ".so", make)


def _compile(command: tuple[str, ...], name: str, built: Path) -> None:
    """Run the compiler in the folder of `built`; raises KernelBuildError, with what it says, if `built` is not made."""
    work, failed = built.parent, f"{command[0]} could not build {name}"
    variables = {**os.environ, "TMPDIR": str(work), "LC_ALL": "C"}
    try:
        answer = subprocess.run(command, capture_output=True, text=True, errors="replace", cwd=work, env=variables)
    except OSError as error:
        raise KernelBuildError(f"{failed}: {error}") from None
    if answer.returncode != 0 or not built.exists():
        said = answer.stderr.strip() or f"it ended with status {answer.returncode}, and made no file"
        if any(os.strerror(code) in said for code in (errno.ENOSPC, errno.EDQUOT)):
            failed += f" (no room in {work.parent}: make some, or {ANOTHER})"
        raise KernelBuildError(f"{failed}:\n{said}")


def _load_library(path: Path, mode: int = ctypes.DEFAULT_MODE) -> ctypes.CDLL:
    """Load a library of the cache."""
    try:
        return ctypes.CDLL(str(path), mode=mode)
    except OSError as error:
        raise KernelBuildError(
            f"a compiled kernel cannot be loaded ({error}): if its folder lies on a file system that is mounted "
            f"noexec, {ANOTHER}"
        ) from error


@lru_cache(maxsize=1)
def _headers_digest() -> str:
    state = hashlib.sha256()
    for path in sorted(HEADERS.iterdir()):
        if path.is_file():
            state.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return state.hexdigest()


class _Launch(ctypes.Structure):
    """The mirror of ``cupaged::Launch`` in host/scheduler.h."""

    _fields_ = (
        ("entry", ctypes.c_void_p),
        ("touch_shared", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        ("grid", ctypes.c_uint32 * 3),
        ("block", ctypes.c_uint32 * 3),
        ("dynamic_shared_bytes", ctypes.c_uint64),
        ("seed", ctypes.c_uint64),
        ("workers", ctypes.c_int32),
        ("record_traffic", ctypes.c_int32),
        ("num_arrays", ctypes.c_int32),
        ("arrays", ctypes.c_void_p),
    )


class _ArrayTraffic(ctypes.Structure):
    """The mirror of ``cupaged::ArrayTraffic`` in host/scheduler.h."""

    _fields_ = (("array", ctypes.c_int32), ("block_sectors", ctypes.c_uint64), ("block_bytes", ctypes.c_uint64))


class _LineTraffic(ctypes.Structure):
    """The mirror of ``cupaged::LineTraffic`` in host/scheduler.h."""

    _fields_ = (
        ("file", ctypes.c_char * 256),
        ("line", ctypes.c_int32),
        ("array", ctypes.c_int32),
        ("requests", ctypes.c_uint64),
        ("sectors", ctypes.c_uint64),
        ("bytes", ctypes.c_uint64),
    )


@lru_cache(maxsize=2)
def _scheduler(sanitized: bool) -> ctypes.CDLL:
    """Return the scheduler, built with or without sanitizers, loaded so that kernels find its symbols."""
    del sanitized  # part of the key only
    path = _build("scheduler", f'#include "{SCHEDULER}"\n', "scheduler", (f"-I{HEADERS}",))
    return _load_library(path, ctypes.RTLD_GLOBAL)


_scheduler_lock = threading.Lock()  # kernels may be built on several threads; one of them builds the scheduler


# --- the kernel ---------------------------------------------------------------------------------------------------

WRAPPER = """\
#include "cuda_host.h"
{twins}
#include "{path}"
#include <utility>

template <typename... Parameters, std::size_t... I>
void call_with(void (*kernel)(Parameters...), void** arguments, std::index_sequence<I...>) {{
  kernel(*static_cast<std::remove_reference_t<Parameters>*>(arguments[I])...);
}}
template <typename... Parameters>
void call(void (*kernel)(Parameters...), void** arguments) {{
  call_with(kernel, arguments, std::index_sequence_for<Parameters...>{{}});
}}
static thread_local volatile char first_shared_byte;
extern "C" void cupaged_touch_shared() {{ first_shared_byte = 0; }}
extern "C" void cupaged_entry(void** arguments) {{ call(&{entry}, arguments); }}
"""


@dataclass(frozen=True)
class HostLaunch:
    """One launch, made over and over: `run` with `values`."""

    run: Callable[[tuple[Any, ...]], None]
    values: tuple[Any, ...]

    def __call__(self) -> None:
        """Run the kernel with the values that it was made with."""
        self.run(self.values)

    def open_for(self, places: Sequence[int]) -> Callable[[Sequence[Any]], None]:
        """Return what runs it with other arrays in these places, in their order."""
        run = self.run
        fixed = [None if place in places else value for place, value in enumerate(self.values)]

        def launch(arrays: Sequence[Any]) -> None:
            values = fixed.copy()
            for place, array in zip(places, arrays, strict=True):
                values[place] = array
            run(tuple(values))

        return launch


@dataclass
class HostKernel:
    """A kernel that runs on NumPy arrays on this machine's CPU.

    Parameters
    ----------
    source : KernelSource
        What to build. It is built when first launched, or by `build`.
    """

    source: KernelSource
    _built: tuple[Any, Any, Any, tuple[ctypes.CDLL, ...]] | None = field(default=None, repr=False)
    _build_lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    backend = "host"

    def build(self) -> HostKernel:
        """Compile now, or load what the cache holds; raises KernelBuildError with the compiler's message."""
        if self._built is None:
            with self._build_lock:
                self._built = self._built or self._load()
        return self

    def _load(self) -> tuple[Any, Any, Any, tuple[ctypes.CDLL, ...]]:
        with _scheduler_lock:
            scheduler = _scheduler(sanitizing())
        source = self.source
        flags = [f"-D{name}={value}" for name, value in source.defines]
        flags += [f"-I{HEADERS}", f"-I{source.include_folder}"]
        twins = "\n".join(f'#include "{path.name}"' for path in sorted(HEADERS.glob("*.cuh")))
        text = WRAPPER.format(twins=twins, path=source.path, entry=source.entry)
        source.check_unchanged()
        built = _load_library(_build(source.entry, text, source.digest, tuple(flags)))
        entry = ctypes.cast(built.cupaged_entry, ctypes.c_void_p).value
        touch = ctypes.cast(built.cupaged_touch_shared, ctypes.c_void_p).value
        return scheduler.cupaged_launch, entry, touch, (built, scheduler)

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int = 0, **arguments: Any) -> None:
        """Run the kernel to its end.

        Parameters
        ----------
        grid, block : tuple of int
            Blocks in the grid and threads in a block, 1 to 3 axes.
        shared_bytes : int
            Dynamic shared memory of a block.
        **arguments
            By the names in the kernel's signature: NumPy arrays (None for a null pointer), and numbers.

        Raises
        ------
        KernelLaunchError
            If the kernel diverged at a barrier, wrote just past its dynamic shared memory, or trapped.
        """
        self.prepare(grid, block, shared_bytes, **arguments)()

    def prepare(
        self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int = 0, **arguments: Any
    ) -> PreparedLaunch:
        """Check a launch, and return it to be run as often as need be."""
        grid, block = check_extent(self.source.entry, grid, block)
        if not 0 <= shared_bytes <= MAX_SHARED_BYTES:
            raise UnsupportedError(
                f"{self.source.entry}: shared_bytes must be at most {MAX_SHARED_BYTES} (an H100's); got {shared_bytes}"
            )
        values = typed_values(self.source.entry, self._converters, arguments)
        launcher = HostLaunch(partial(self._run, grid, block, shared_bytes), values)
        return PreparedLaunch(self.source, launcher, tuple(self._converters), values)

    def _run(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, values: tuple[Any, ...]) -> None:
        self.build()
        assert self._built is not None
        run, entry, touch, libraries = self._built
        held = [np.asarray(v.ctypes.data if isinstance(v, np.ndarray) else v) for v in values]
        pointers = (ctypes.c_void_p * len(held))(*(value.ctypes.data for value in held))
        log = _traffic_log.get()
        names, ranges = _array_ranges(dict(zip(self._converters, values, strict=True)) if log is not None else {})
        launch = _Launch(
            entry, touch, ctypes.addressof(pointers), grid, block, shared_bytes, _seed.get(), workers(),
            log is not None, len(names), ranges.ctypes.data,
        )  # fmt: skip
        error = ctypes.create_string_buffer(1024)
        if run(ctypes.byref(launch), error, len(error)) != 0:
            raise KernelLaunchError(f"{self.source.entry}: {error.value.decode(errors='replace')}")
        if log is not None:
            log.append(_read_traffic(self.source.entry, libraries[1], names))

    @cached_property
    def _converters(self) -> dict[str, Callable[[Any], Any]]:
        entry = self.source.entry

        def check(parameter: Parameter, array: Any, contiguous: bool) -> None:
            if not isinstance(array, np.ndarray):
                raise TypeError(
                    f"{entry}: argument {parameter.name} must be a NumPy array on the host backend; "
                    f"got {type(array).__module__}.{type(array).__name__}"
                )
            check_array(entry, parameter, array, array.ctypes.data, contiguous=contiguous)
            if not parameter.is_const and not array.flags.writeable:
                raise ValueError(f"{entry}: argument {parameter.name} is written, but it is read-only")

        return argument_converters(entry, self.source.parameters, check)


def workers() -> int:
    """Return how many OS threads share the blocks of a launch: CUPAGED_HOST_THREADS, else the processor's."""
    named = os.environ.get("CUPAGED_HOST_THREADS")
    if not named:
        return min(os.cpu_count() or 1, MAX_WORKERS)
    if not (named.isascii() and named.isdigit() and len(named) < 10) or not 1 <= int(named) <= MAX_WORKERS:
        raise ValueError(f"CUPAGED_HOST_THREADS must be an integer from 1 to {MAX_WORKERS}; got {named!r}")
    return int(named)


def _array_ranges(arguments: dict[str, Any]) -> tuple[list[str], np.ndarray]:
    """Return the names of the arrays among the arguments, and the addresses between which each lies, [arrays, 2].

    Arrays that are interleaved, as keys and values are in BS2HD, are one to the recorder: ``key_cache+value_cache``.
    """
    found: list[tuple[str, int, int]] = []
    for name, array in arguments.items():
        if not isinstance(array, np.ndarray) or array.size == 0:
            continue
        low, high = np.lib.array_utils.byte_bounds(array)
        for other, other_low, other_high in [entry for entry in found if entry[1] < high and low < entry[2]]:
            found.remove((other, other_low, other_high))
            name, low, high = f"{other}+{name}", min(low, other_low), max(high, other_high)
        found.append((name, low, high))
    return [name for name, *_ in found], np.array([bounds for _, *bounds in found], dtype=np.uint64).reshape(-1, 2)


def _read_traffic(kernel: str, scheduler: ctypes.CDLL, arrays: list[str]) -> LaunchTraffic:
    names = [*arrays, ""]  # index -1: none of them
    lines = (_LineTraffic * scheduler.cupaged_traffic(None, 0))()
    scheduler.cupaged_traffic(lines, len(lines))
    touched = (_ArrayTraffic * scheduler.cupaged_block_traffic(None, 0))()
    scheduler.cupaged_block_traffic(touched, len(touched))
    return LaunchTraffic(
        kernel,
        tuple(
            LineTraffic(x.file.decode(errors="replace"), x.line, names[x.array], x.requests, x.sectors, x.bytes)
            for x in lines
        ),
        tuple(ArrayTraffic(names[x.array], x.block_sectors, x.block_bytes) for x in touched),
    )
