"""`zoo distill` and `zoo train-lm`: images (`run`), text, and images with text."""
