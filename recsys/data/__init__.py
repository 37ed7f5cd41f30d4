"""From files to batches: converters, the Parquet reader and the order in which rows are read."""
