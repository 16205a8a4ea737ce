"""Which block: the memory manager. Pure NumPy; knows no kernel and imports no CuPy."""
