"""Measures how fast the scripts are: `python -m tools.bench`, or `make bench`."""
