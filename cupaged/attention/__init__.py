"""Who attends to what, and by which kernel."""
