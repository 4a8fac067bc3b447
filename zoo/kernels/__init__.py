"""Operators with kernels of their own, and whether they can run here."""
