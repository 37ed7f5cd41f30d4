"""Train FuxiCTR's models on a config's rows and features: `python -m benchmarks.fuxictr`."""
