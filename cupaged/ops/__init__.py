"""The thin Python door to the device: check, choose, launch, return."""
