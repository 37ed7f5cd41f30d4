"""The model: towers, the experts that are attached to them, and the ranker around both."""
