"""Experiments, one file each: `python -m experiments.mnist`."""
