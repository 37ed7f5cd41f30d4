"""The data's way: which row is read when, decoding and checking it, and the batches that the model sees."""
