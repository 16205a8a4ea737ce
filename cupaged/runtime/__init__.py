"""From a .cu file to something callable: NVRTC and CuPy on the GPU, the C++ compiler on the host."""

from cupaged.runtime.select import available_backends, choose_backend, load_kernel
from cupaged.runtime.source import kernels_defining, kernels_folder, kernels_from

__all__ = ["available_backends", "choose_backend", "kernels_defining", "kernels_folder", "kernels_from", "load_kernel"]
