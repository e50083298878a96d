"""The sections of `gpu.py`, one file each."""
