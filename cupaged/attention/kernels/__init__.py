"""One file a kernel or family; each knows a call and what a kernel is, and no other kernel."""
