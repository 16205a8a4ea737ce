"""The thin door to each kernel: check, choose, launch, return."""
