"""Writing, converting and examining data sets; `python -m recsys.prepare` is its command."""
