"""Experiments: claims of papers, repeated over seeds."""

EXPERIMENTS = ("phi_s", "students", "compression", "mixers", "planning", "real")
"""Packages: `config`, read without torch, has `full` and `tiny` (which return configs); `run` has
`plan` (prints what would run) and `main` (runs, and returns whether the claim held)."""
