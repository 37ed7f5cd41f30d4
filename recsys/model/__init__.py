"""The model: HiLoMoE linears, the towers built of them, and the ranker around both."""
