"""Benchmarks: what is compared is measured in one run, in turn, and told as ratios."""
