"""What this machine has: GPU, driver, CuPy, NVRTC, headers, C++ compiler, caches; what works, and what to install."""

from __future__ import annotations

import platform
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata

import numpy as np
from rich import box
from rich.console import Console
from rich.table import Table

__all__ = ["Finding", "doctor", "examine"]


@dataclass(frozen=True)
class Finding:
    """One line of the report: what was looked for, whether it is well, and what was found or is to be done."""

    what: str
    well: bool
    detail: str


def doctor() -> int:
    """Print the report; returns 0 if at least one backend runs a kernel here."""
    findings = examine()
    table = Table(title="cupaged doctor", title_justify="left", box=box.SIMPLE_HEAD, header_style="bold")
    for head in ("", "what", "found"):
        table.add_column(head, overflow="fold")
    for finding in findings:
        table.add_row("ok" if finding.well else "--", finding.what, finding.detail)
    console = Console(highlight=False, markup=False, emoji=False)
    console.print(table)
    running = [finding.what for finding in findings if finding.well and finding.what.startswith("runs ")]
    console.print("Kernels run here: " + (", ".join(running) or "nowhere; the lines without ok say why."))
    return 0 if running else 1


def examine() -> list[Finding]:
    """Return the findings, in the order in which one depends on the other."""
    return [
        Finding("Python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}"),
        _look("CuPy", _cupy),
        _look("NVIDIA driver", _driver),
        _look("GPU", _gpu),
        _look("NVRTC", _nvrtc),
        _look("CUDA headers", _headers),
        _look("C++ compiler", _compiler),
        _look("kernels folder", _kernels),
        _look("cache folders", _caches),
        _look("runs on the GPU", lambda: _attend("cuda")),
        _look("runs on the CPU", lambda: _attend("host")),
    ]


def _look(what: str, find: Callable[[], str]) -> Finding:
    """Return what `find` found; whatever goes wrong is itself the finding."""
    try:
        return Finding(what, True, find())
    except Exception as error:
        return Finding(what, False, str(error).strip().split("\n")[0] or type(error).__name__)


def _cupy() -> str:
    try:
        import cupy
    except ImportError as error:
        raise RuntimeError(f"not importable ({error}): pip install cupy-cuda12x, or cupy-cuda13x for CUDA 13") from None
    packages = [name for name in ("cupy-cuda12x", "cupy-cuda13x", "cupy") if _version(name)]
    return f"{cupy.__version__} ({', '.join(packages) or 'from source'})"


def _driver() -> str:
    import cupy

    version = cupy.cuda.runtime.driverGetVersion()
    if version == 0:
        raise RuntimeError("none: install NVIDIA's driver to use a GPU")
    return f"for CUDA {version // 1000}.{version % 1000 // 10}"


def _gpu() -> str:
    from cupaged.runtime.select import why_no_gpu

    reason = why_no_gpu()
    if reason:
        raise RuntimeError(reason)
    import cupy

    names = []
    for device in range(cupy.cuda.runtime.getDeviceCount()):
        properties = cupy.cuda.runtime.getDeviceProperties(device)
        gib = properties["totalGlobalMem"] / 2**30
        names.append(
            f"{properties['name'].decode()}, {gib:.0f} GiB, sm_{properties['major']}{properties['minor']}, "
            f"{properties['multiProcessorCount']} SMs, {properties['l2CacheSize'] / 2**20:.0f} MiB of L2"
        )
    return "; ".join(names)


def _nvrtc() -> str:
    from cupaged.runtime.cuda import nvrtc_version

    major, minor = nvrtc_version()
    return f"{major}.{minor}: kernels compile for CUDA, with or without a GPU"


def _headers() -> str:
    from cupaged.runtime.cuda import cuda_headers

    return str(cuda_headers())


def _compiler() -> str:
    from cupaged.runtime.host import find_compiler

    command, version = find_compiler()
    return f"{' '.join(command)}: {version}"


def _kernels() -> str:
    from cupaged.runtime.source import kernels_folder

    folder = kernels_folder()
    count = len(list(folder.rglob("*.cu")))
    if count == 0:
        raise RuntimeError(f"no .cu file under {folder}")
    return f"{folder} ({count} .cu files)"


def _caches() -> str:
    from cupaged.runtime.cache import cache_folder

    parts = []
    for kind in ("cuda", "host"):
        files = [path for path in cache_folder(kind).iterdir() if path.is_file()]
        parts.append(f"{cache_folder(kind)} ({len(files)} files, {sum(f.stat().st_size for f in files) / 1e6:.1f} MB)")
    return "; ".join(parts)


def _attend(backend: str) -> str:
    """Run one small decode call and compare it with the reference."""
    import cupaged as pg
    from cupaged.bench.accuracy import decode_check
    from cupaged.bench.workload import decode_workload
    from cupaged.runtime import choose_backend
    from cupaged.runtime.select import why_no_gpu

    if backend == "cuda" and why_no_gpu():
        raise RuntimeError("no GPU, see above")
    work = decode_workload((20, 7), 4, 2, 64, 16, backend=choose_backend(backend))
    error = decode_check(pg.paged_attention(*work.arguments), *work.arguments)
    if not np.isfinite(error) or error > 1:
        raise RuntimeError(f"{pg.explain(*work.arguments).kernel} is wrong: its error is {error:.3g} times the budget")
    return f"{pg.explain(*work.arguments).kernel} matches the float64 reference"


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
