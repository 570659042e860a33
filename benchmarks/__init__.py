"""Measurements of what an adapter costs, beside its peers. `benchmark.py` is their command line."""
