"""Faults: what a run, an index and a curation come through. The quick part runs with the tests.

``python -m tests.faults NAME`` brings about the many and slow ones and stores in reports/faults/ how many were tried,
survived and lost.
"""
