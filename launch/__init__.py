"""TorchX components that launch HiloRec. Never imports torch, so that a submitting machine needs none."""
