"""What HiloRec costs and how good it is: `python -m benchmarks.<name>`, from the root of the checkout."""
