"""Compare models: `python -m benchmarks.quality GRID.yaml` trains a grid of cases over seeds."""
