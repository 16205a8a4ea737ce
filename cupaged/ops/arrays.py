"""Arrays of other libraries: taken without a copy, and results handed back in the caller's own kind."""

from __future__ import annotations

import sys
from typing import Any

import ml_dtypes
import numpy as np

from cupaged.runtime.arguments import address_of

__all__ = ["array_module", "as_backend_array", "backend_of", "check_alignment", "like_caller"]

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


def like_caller(result: Any, example: Any) -> Any:
    """Return a NumPy or CuPy `result` as the kind of array that `example` is, over the same memory."""
    if type(result) is type(example):
        return result
    library = sys.modules.get(type(example).__module__.split(".")[0])
    if library is None or not hasattr(library, "from_dlpack"):
        return result
    if _is_torch(example) and result.dtype == ml_dtypes.bfloat16:
        return library.from_dlpack(result.view(np.int16)).view(library.bfloat16)
    return library.from_dlpack(result)


def check_alignment(array: Any, name: str) -> None:
    """Raise ValueError unless the array's first element lies on a 16-byte boundary."""
    address = address_of(array)
    if address % VECTOR_BYTES:
        raise ValueError(
            f"{name} must start on a {VECTOR_BYTES}-byte boundary, as kernels move {VECTOR_BYTES} bytes at once; "
            f"it starts {address % VECTOR_BYTES} bytes past one. Pass a copy"
        )


def _as_numpy(array: Any, name: str) -> np.ndarray:
    if isinstance(array, np.ndarray):
        return array
    if _is_torch(array) and array.device.type == "cpu":
        return _torch_bits(array, lambda tensor: tensor.numpy())
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == DLPACK_CPU:
        return np.from_dlpack(array)
    raise TypeError(f"{name} must be a NumPy array, as the cache is on the host; got {_kind(array)}")


def _as_cupy(array: Any, name: str) -> Any:
    import cupy

    if isinstance(array, cupy.ndarray):
        return array
    if _is_torch(array) and array.device.type == "cuda":
        return _torch_bits(array, cupy.from_dlpack)
    if hasattr(array, "__cuda_array_interface__"):
        return cupy.asarray(array)
    if hasattr(array, "__dlpack_device__") and array.__dlpack_device__()[0] == DLPACK_CUDA:
        return cupy.from_dlpack(array)
    raise TypeError(
        f"{name} must be a CuPy array, as the cache is on the GPU; got {_kind(array)} "
        f"(cupy.asarray copies a NumPy array there)"
    )


def _torch_bits(tensor: Any, convert: Any) -> Any:
    """Convert a tensor; bfloat16 goes as its bits, which every converter understands."""
    tensor = tensor.detach()
    if str(tensor.dtype) == "torch.bfloat16":
        return convert(tensor.view(sys.modules["torch"].int16)).view(ml_dtypes.bfloat16)
    return convert(tensor)


def _is_torch(array: Any) -> bool:
    return type(array).__module__.split(".")[0] == "torch" and hasattr(array, "detach")


def _kind(array: Any) -> str:
    return f"{type(array).__module__}.{type(array).__name__}"
