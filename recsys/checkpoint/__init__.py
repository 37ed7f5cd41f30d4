"""Checkpoints: how one lies on a disk, when it is whole, and reading it without running code."""
