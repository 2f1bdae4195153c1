"""Benchmarks: ratios to the bare forward pass or to a rival, measured side by side in one run. Not timed tests.

``python -m tests.bench NAME`` (or ``rise bench NAME``) prints the figures and stores them with hardware and date.
"""
