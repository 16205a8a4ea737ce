"""Arrays of other libraries: taken without a copy, and results handed back in the caller's own kind."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.kinds import check_unmasked
from cupaged.runtime.arguments import address_of
from cupaged.runtime.captures import refuse_in_capture

__all__ = [
    "array_module",
    "as_backend_array",
    "backend_of",
    "check_alignment",
    "empty_for",
    "is_torch",
    "like_caller",
    "on_device",
]

DLPACK_CPU, DLPACK_CUDA = 1, 2
VECTOR_BYTES = 16  # kernels load and store 16 bytes at once


def as_backend_array(array: Any, name: str, backend: str) -> Any:
    """Return `array` as the backend's own kind (NumPy or CuPy) over the same memory.

    Parameters
    ----------
    array : array
        NumPy, CuPy, a torch tensor, or anything that speaks DLPack or ``__cuda_array_interface__``.
    name : str
        What to call it in an error.
    backend : {"cuda", "host"}
        Where the kernel runs.

    Raises
    ------
    TypeError
        If it is no array, or lies where the kernel cannot read it.
    """
    if backend == "host":
        return _as_numpy(array, name)
    return _as_cupy(array, name)


def backend_of(array: Any, name: str) -> str:
    """Return the backend on whose memory `array` lies, "cuda" or "host"; raises TypeError if it is no array."""
    if isinstance(array, np.ndarray):
        return "host"
    if hasattr(array, "__dlpack_device__"):
        device = array.__dlpack_device__()[0]
        if device in (DLPACK_CPU, DLPACK_CUDA):
            return "host" if device == DLPACK_CPU else "cuda"
    elif hasattr(array, "__cuda_array_interface__"):
        return "cuda"
    raise TypeError(f"{name} must be an array in the memory of the host or of a GPU; got {_kind(array)}")


def array_module(backend: str) -> Any:
    """Return NumPy or CuPy."""
    if backend == "host":
        return np
    import cupy

    return cupy


def empty_for(caller: Any, shape: tuple[int, ...], dtype: Any, backend: str) -> Any:
    """Return an array of the backend that `like_caller` can hand back to `caller`; nothing is written to it.

    For a torch tensor on a GPU the memory is torch's: torch knows when it may be used again, also in its graphs.
    """
    if backend == "cuda" and is_torch(caller):
        torch = sys.modules["torch"]
        made = torch.empty(shape, dtype=getattr(torch, np.dtype(dtype).name), device=caller.device)
        return _over_tensor(made)
    return array_module(backend).empty(shape, dtype)


def like_caller(result: Any, example: Any) -> Any:
    """Return a NumPy or CuPy `result` as the kind of array that `example` is, over the same memory."""
    if type(result) is type(example):
        return result
    if is_torch(example):
        return _as_tensor(result)
    library = sys.modules.get(type(example).__module__.split(".")[0])
    if library is None or not hasattr(library, "from_dlpack"):
        return result
    return library.from_dlpack(result)


def on_device(array: Any, name: str, backend: str) -> Any:
    """Return a NumPy array on the backend; a copy, on a GPU.

    Raises
    ------
    UnsupportedError
        If a CUDA graph is being captured: a replay would read the host's memory again.
    """
    if isinstance(array, np.ndarray):
        refuse_in_capture(backend, f"{name} must lie on the GPU, as a replay would read the host's memory again")
    return array_module(backend).asarray(array)


def check_alignment(array: Any, name: str) -> None:
    """Raise ValueError unless the array's first element lies on a 16-byte boundary."""
    address = address_of(array)
    if address % VECTOR_BYTES:
        raise ValueError(
            f"{name} must start on a {VECTOR_BYTES}-byte boundary, as kernels move {VECTOR_BYTES} bytes at once; "
            f"it starts {address % VECTOR_BYTES} bytes past one. Pass a copy"
        )


def is_torch(array: Any) -> bool:
    """Whether an array is a torch tensor, also of a class derived from it."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(array, torch.Tensor)


def _as_numpy(array: Any, name: str) -> np.ndarray:
    if isinstance(array, np.ndarray):
        check_unmasked(array, name)
        return array
    if is_torch(array) and array.device.type == "cpu":
        return _numpy_of_tensor(array.detach())
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == DLPACK_CPU:
        return np.from_dlpack(array)
    raise TypeError(f"{name} must be a NumPy array, as the cache is on the host; got {_kind(array)}")


def _as_cupy(array: Any, name: str) -> Any:
    """Return CuPy's view of an array; the streams are brought in order by `cupaged.ops.streams`."""
    import cupy

    if isinstance(array, cupy.ndarray):
        return array
    if is_torch(array):
        if array.is_cuda:
            return _over_tensor(array)
    elif hasattr(array, "__cuda_array_interface__"):
        return cupy.asarray(_without_stream(array))
    elif hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == DLPACK_CUDA:
        return cupy.from_dlpack(array)
    raise TypeError(
        f"{name} must be a CuPy array, as the cache is on the GPU; got {_kind(array)} "
        f"(cupy.asarray copies a NumPy array there)"
    )


def _over_tensor(tensor: Any) -> Any:
    """Return a CuPy array over a torch tensor's memory on a GPU, which it keeps."""
    import cupy

    tensor = tensor.detach()
    dtype = np.dtype(str(tensor.dtype).removeprefix("torch."))
    strides = tuple(stride * dtype.itemsize for stride in tensor.stride())
    reach = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)) + dtype.itemsize
    nbytes = reach if tensor.numel() else 0
    memory = cupy.cuda.UnownedMemory(tensor.data_ptr(), nbytes, tensor, tensor.device.index)
    return cupy.ndarray(tuple(tensor.shape), dtype, cupy.cuda.MemoryPointer(memory, 0), strides)


def _as_tensor(result: Any) -> Any:
    """Return a NumPy or CuPy array as a torch tensor over the same memory: the tensor that it lies in, if there is one.

    DLPack carries bfloat16 as its bits, which every library understands.
    """
    torch = sys.modules["torch"]
    if not isinstance(result, np.ndarray):
        owner = getattr(result.data.mem, "_owner", None)
        if (
            owner is not None
            and is_torch(owner)
            and (owner.data_ptr(), owner.numel()) == (result.data.ptr, result.size)
        ):
            return owner.view(result.shape)
    if result.dtype == ml_dtypes.bfloat16:
        return torch.from_dlpack(result.view(np.int16)).view(torch.bfloat16)
    return torch.from_dlpack(result)


def _numpy_of_tensor(tensor: Any) -> np.ndarray:
    """Return a NumPy array over a tensor on the CPU."""
    if str(tensor.dtype) == "torch.bfloat16":
        bits: np.ndarray = tensor.view(sys.modules["torch"].int16).numpy()
        return bits.view(ml_dtypes.bfloat16)
    array: np.ndarray = tensor.numpy()
    return array


def _without_stream(array: Any) -> Any:
    """Return what CuPy takes for an array with ``__cuda_array_interface__`` without making the host wait for it."""
    interface = array.__cuda_array_interface__
    return array if interface.get("stream") is None else _Interface(array, {**interface, "stream": None})


class _Interface:
    """Another array's memory, which it keeps alive."""

    def __init__(self, array: Any, interface: dict[str, Any]) -> None:
        self.array, self.__cuda_array_interface__ = array, interface


def _kind(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__name__}"
