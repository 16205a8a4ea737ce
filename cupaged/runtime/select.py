"""Which backend runs: the argument, then CUPAGED_BACKEND, then the best that works here."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING

from cupaged.errors import BackendUnavailableError, written
from cupaged.runtime.source import KernelSource, added_defines, kernels_folder

if TYPE_CHECKING:
    from cupaged.runtime.cuda import CudaKernel
    from cupaged.runtime.host import HostKernel

__all__ = ["available_backends", "choose_backend", "load_kernel", "why_no_gpu"]

BACKENDS = ("cuda", "host")


@cache
def why_no_gpu() -> str | None:
    """Return None if CuPy works with a GPU here, else one sentence that says why it does not."""
    try:
        import cupy

        count = cupy.cuda.runtime.getDeviceCount()
    except ImportError as error:
        return f"CuPy cannot be imported ({error}); pip install cupy-cuda12x, or cupy-cuda13x for CUDA 13"
    except RuntimeError as error:
        return f"no GPU answers CuPy ({error})"
    return None if count > 0 else "CuPy finds no GPU"


def available_backends() -> tuple[str, ...]:
    """Return the backends that run on this machine, the best first."""
    from cupaged.runtime.host import find_compiler

    found = [] if why_no_gpu() else ["cuda"]
    try:
        find_compiler()
    except BackendUnavailableError:
        return tuple(found)
    return (*found, "host")


def choose_backend(backend: str | None = None) -> str:
    """Return "cuda" or "host".

    Parameters
    ----------
    backend : {"cuda", "host"}, optional
        What the caller wants; None asks CUPAGED_BACKEND, and then takes the GPU if there is one.

    Raises
    ------
    ValueError
        If the name is neither.
    BackendUnavailableError
        If "cuda" is asked for, by name, where no GPU works; the message says why.
    """
    if backend is not None and not isinstance(backend, str):
        raise TypeError(
            f"backend must be one of {', '.join(BACKENDS)}, or None; got {type(backend).__name__} {written(backend)}"
        )
    name, origin = backend, "backend"
    if backend is None:
        name, origin = os.environ.get("CUPAGED_BACKEND") or None, "CUPAGED_BACKEND"
    if name is None:
        return "host" if why_no_gpu() else "cuda"
    if name not in BACKENDS:
        raise ValueError(f"{origin} must be one of {', '.join(BACKENDS)}; got {name!r}")
    if name == "cuda" and why_no_gpu():
        raise BackendUnavailableError(f"{origin} asks for cuda, but {why_no_gpu()}")
    return name


_loaded: dict[tuple[object, ...], CudaKernel | HostKernel] = {}
_load_lock = threading.Lock()


def load_kernel(
    file: str, entry: str, defines: Mapping[str, object] | None = None, backend: str | None = None
) -> CudaKernel | HostKernel:
    """Return the kernel `entry` of a .cu file, specialised by `defines`; the same object until a file is edited.

    Parameters
    ----------
    file : str
        Path under the kernels folder, ``"attention/paged_attention_v1.cu"``.
    entry : str
        Name of the ``extern "C" __global__`` function.
    defines : mapping, optional
        Macro names and their values.
    backend : {"cuda", "host"}, optional
        See `choose_backend`.

    Raises
    ------
    KernelBuildError
        If there is no such file. Compilation errors come with the first launch, or from ``.build()``.
    """
    backend = choose_backend(backend)
    defines = {**(defines or {}), **added_defines()}
    key = (backend, kernels_folder(), file, entry, tuple(defines.items()))
    kernel = _loaded.get(key)
    if kernel is not None and kernel.source.is_unchanged():
        return kernel
    with _load_lock:  # another thread may have loaded it meanwhile
        kernel = _loaded.get(key)
        if kernel is None or not kernel.source.is_unchanged():
            kernel = _loaded[key] = _kernel(KernelSource.read(file, entry, defines), backend)
        return kernel


def _kernel(source: KernelSource, backend: str) -> CudaKernel | HostKernel:
    if backend == "cuda":
        from cupaged.runtime.cuda import CudaKernel

        return CudaKernel(source)
    from cupaged.runtime.host import HostKernel

    return HostKernel(source)
