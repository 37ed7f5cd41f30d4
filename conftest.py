"""Being here puts the root on sys.path under pytest, for the packages that are not installed."""
