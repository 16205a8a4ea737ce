"""What drives a model through the memory manager and the kernels."""
