"""Checkpoints: how one lies on a disk, when it is whole, and reading it, whoever wrote it.

Nothing in a checkpoint can run code, hang or outgrow its files.
"""
