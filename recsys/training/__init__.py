"""Training: stages, the loop, metrics, checkpoints and what a person watches."""
