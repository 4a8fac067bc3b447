"""Benchmarks, each a generator of (name, value)."""
