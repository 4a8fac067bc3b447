"""Language towers: their batches, tokenizers, and how a model's features are read."""
