"""The CUDA backend: a .cu file compiled by NVRTC to a cubin, kept on disk, loaded as a CuPy RawModule.

The cubin's name holds a digest of the file, of every header that it includes, of the defines and of NVRTC's version,
so that an edited header is noticed. Compiling needs no GPU.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from cupaged.errors import BackendUnavailableError, KernelBuildError, UnsupportedError
from cupaged.runtime.arguments import argument_converters, check_array, check_extent, typed_values
from cupaged.runtime.cache import cached_file
from cupaged.runtime.driver import DriverLaunch
from cupaged.runtime.launch import PreparedLaunch
from cupaged.runtime.source import KernelSource, Parameter

__all__ = ["CudaKernel", "compile_cubin", "cuda_headers", "nvrtc_version"]

SHARED_BYTES_WITHOUT_OPT_IN = 40 * 1024  # of dynamic shared memory: 48 KiB with the static, which kernels keep small
OPTIONS = ("-std=c++17", "--generate-line-info")
_shared_bytes_lock = threading.Lock()  # one for all: two CudaKernels of the same source have one function on the GPU


def nvrtc_version() -> tuple[int, int]:
    """Return NVRTC's version; raises BackendUnavailableError where CuPy or NVRTC is not installed."""
    try:
        from cupy_backends.cuda.libs import nvrtc

        major, minor = nvrtc.getVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise BackendUnavailableError(
            f"compiling for CUDA needs CuPy and NVRTC: pip install cupy-cuda12x nvidia-cuda-nvrtc-cu12 ({error})"
        ) from error
    return major, minor


@cache
def cuda_headers() -> Path:
    """Return the folder that holds cuda_fp16.h, of the CUDA release that NVRTC comes from where there is a choice.

    Raises
    ------
    BackendUnavailableError
        If no such folder is found; the message says what to install.
    """
    major, _ = nvrtc_version()
    places: list[Path] = []
    for package in ("nvidia.cuda_runtime",) if major == 12 else (f"nvidia.cu{major}",):
        try:
            found = importlib.util.find_spec(package)
        except ModuleNotFoundError:
            found = None
        if found is not None:
            places += [Path(folder) / "include" for folder in found.submodule_search_locations or ()]
    named = {name: os.environ[name] for name in ("CUDA_PATH", "CUDA_HOME") if os.environ.get(name)}
    places += [Path(folder) / "include" for folder in named.values()]
    places += [Path(f"/usr/local/cuda-{major}/include"), Path("/usr/local/cuda/include")]
    for place in places:
        if (place / "cuda_fp16.h").is_file():
            return place
    package = "nvidia-cuda-runtime-cu12" if major == 12 else "nvidia-cuda-runtime"
    looked = "".join(f"; {name} is {folder!r}, whose include folder has none" for name, folder in named.items())
    raise BackendUnavailableError(
        f"found NVRTC {major} but not its headers (cuda_fp16.h): pip install {package}, "
        f"or let CUDA_PATH name the toolkit{looked}"
    )


def compile_cubin(source: KernelSource, architecture: str) -> bytes:
    """Compile for one GPU architecture; no GPU is needed.

    Parameters
    ----------
    source : KernelSource
        The kernel.
    architecture : str
        ``"sm_90"`` for machine code, ``"compute_90"`` for PTX that the driver compiles.

    Raises
    ------
    KernelBuildError
        With NVRTC's log, which names lines of the .cu file.
    """
    nvrtc_version()
    from cupy_backends.cuda.libs import nvrtc

    source.check_unchanged()
    program = nvrtc.createProgram(source.text, str(source.path), (), ())
    options = [f"--gpu-architecture={architecture}", *OPTIONS]
    options += [f"-I{source.include_folder}", f"-I{cuda_headers()}"]
    options += [f"-D{name}={value}" for name, value in source.defines]
    try:
        nvrtc.compileProgram(program, tuple(options))
        return nvrtc.getPTX(program) if architecture.startswith("compute") else nvrtc.getCUBIN(program)
    except nvrtc.NVRTCError as error:
        log = nvrtc.getProgramLog(program).strip()
        raise KernelBuildError(f"NVRTC could not build {source.entry} for {architecture}:\n{log or error}") from None
    finally:
        nvrtc.destroyProgram(program)


def cached_cubin(source: KernelSource, architecture: str) -> Path:
    """Return the file of the compiled kernel, compiling it only if the cache does not hold it."""
    major, minor = nvrtc_version()
    suffix = "ptx" if architecture.startswith("compute") else "cubin"
    identity = repr((source.digest, OPTIONS, str(cuda_headers()))).encode()
    stem = f"{source.entry}-{architecture}-nvrtc{major}.{minor}-{hashlib.sha256(identity).hexdigest()[:32]}"
    return cached_file("cuda", stem, f".{suffix}", lambda work: compile_cubin(source, architecture))


def architecture_of(device_id: int) -> str:
    """Return what to compile for: the device's own machine code, or PTX where it is newer than NVRTC."""
    import cupy
    from cupy_backends.cuda.libs import nvrtc

    capability = int(cupy.cuda.Device(device_id).compute_capability)
    known = [int(arch) for arch in nvrtc.getSupportedArchs()]
    if capability in known:
        return f"sm_{capability}"
    older = [arch for arch in known if arch <= capability]
    if not older:
        raise UnsupportedError(
            f"NVRTC compiles for compute capability {min(known)} and later; the GPU has {capability}"
        )
    return f"compute_{max(older)}"


@dataclass
class CudaKernel:
    """A kernel that runs on CuPy arrays, on CuPy's current device and stream.

    Parameters
    ----------
    source : KernelSource
        What to build. It is built for each device when first launched there, or by `build`.
    """

    source: KernelSource
    _built: dict[int, Any] = field(default_factory=dict, repr=False)
    _shared_bytes: dict[int, int] = field(default_factory=dict, repr=False)
    _build_lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    backend = "cuda"

    def build(self) -> CudaKernel:
        """Compile for the current device now, or load what the cache holds."""
        self.raw_kernel()
        return self

    def raw_kernel(self) -> Any:
        """Return the ``cupy.RawKernel`` for the current device."""
        import cupy

        device = cupy.cuda.runtime.getDevice()
        if device not in self._built:
            with self._build_lock:
                if device not in self._built:
                    self._built[device] = self._load_on(device)
        return self._built[device]

    def _load_on(self, device: int) -> Any:
        import cupy

        module = cupy.RawModule(path=str(cached_cubin(self.source, architecture_of(device))))
        kernel = module.get_function(self.source.entry)
        int(kernel.num_regs)  # loads it now: its first launch may be one that a graph captures
        return kernel

    def __call__(self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int = 0, **arguments: Any) -> None:
        """Launch the kernel on CuPy's current stream; returns without waiting for it.

        The doors in `cupaged.ops` make that stream torch's where they are given torch tensors.

        Parameters
        ----------
        grid, block : tuple of int
            Blocks in the grid and threads in a block, 1 to 3 axes.
        shared_bytes : int
            Dynamic shared memory of a block; the opt-in above 48 KiB is made here.
        **arguments
            By the names in the kernel's signature: CuPy arrays (None for a null pointer), and numbers.
        """
        grid, block, kernel, values = self._checked(grid, block, shared_bytes, arguments)
        if self.source.waits_for_kernel_before:
            DriverLaunch(kernel, grid, block, shared_bytes, values, overlaps=True)()
        else:
            kernel(grid, block, values, shared_mem=shared_bytes)  # for once, quicker than to lay arguments ready

    def prepare(
        self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int = 0, **arguments: Any
    ) -> PreparedLaunch:
        """Check a launch, and return it to be launched, on the current device, as often as need be."""
        import cupy

        grid, block, kernel, values = self._checked(grid, block, shared_bytes, arguments)
        launcher = DriverLaunch(kernel, grid, block, shared_bytes, values, self.source.waits_for_kernel_before)
        current_device = cupy.cuda.runtime.getDevice
        return PreparedLaunch(self.source, launcher, tuple(self._converters), values, current_device(), current_device)

    def _checked(
        self, grid: tuple[int, ...], block: tuple[int, ...], shared_bytes: int, arguments: dict[str, Any]
    ) -> tuple[tuple[int, ...], tuple[int, ...], Any, tuple[Any, ...]]:
        """Return grid, block, the kernel with the shared memory that it needs, and the values of its parameters."""
        import cupy

        grid, block = check_extent(self.source.entry, grid, block)
        values = typed_values(self.source.entry, self._converters, arguments)
        kernel, device = self.raw_kernel(), cupy.cuda.runtime.getDevice()
        if shared_bytes > self._shared_bytes.get(device, SHARED_BYTES_WITHOUT_OPT_IN):
            self._allow_shared_bytes(kernel, device, shared_bytes)
        return grid, block, kernel, values

    def _allow_shared_bytes(self, kernel: Any, device: int, shared_bytes: int) -> None:
        """Let the kernel have so much dynamic shared memory; never less than before, which other launches need."""
        import cupy

        limit = cupy.cuda.Device(device).attributes["MaxSharedMemoryPerBlockOptin"] - kernel.shared_size_bytes
        if shared_bytes > limit:
            raise UnsupportedError(
                f"{self.source.entry}: shared_bytes must be at most {limit} on this device; got {shared_bytes}"
            )
        with _shared_bytes_lock:
            if kernel.max_dynamic_shared_size_bytes < shared_bytes:
                kernel.max_dynamic_shared_size_bytes = shared_bytes
            self._shared_bytes[device] = max(shared_bytes, self._shared_bytes.get(device, 0))

    @cached_property
    def _converters(self) -> dict[str, Callable[[Any], Any]]:
        import cupy

        entry = self.source.entry

        def check(parameter: Parameter, array: Any, contiguous: bool) -> None:
            if not isinstance(array, cupy.ndarray):
                raise TypeError(
                    f"{entry}: argument {parameter.name} must be a CuPy array on the cuda backend; "
                    f"got {type(array).__module__}.{type(array).__name__}"
                )
            device = cupy.cuda.runtime.getDevice()
            if array.data.device_id != device:
                raise ValueError(
                    f"{entry}: argument {parameter.name} lies on device {array.data.device_id}; "
                    f"the current device is {device}"
                )
            check_array(entry, parameter, array, array.data.ptr, contiguous=contiguous)

        return argument_converters(entry, self.source.parameters, check)
