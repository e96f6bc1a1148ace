"""Measurement: held-out text, benchmarks, and intervals over documents and items."""
