"""Measurements of FastDistill against a simulated teacher: `python -m benchmarks.NAME`. Not part of the package."""
