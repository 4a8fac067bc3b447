"""Agglomerative distillation: one task of the training loop."""
