"""Training and evaluation data: sources of images, their order, and how they become batches."""
