"""`zoo prune`: a cut (`run`), its search for a budget, and the distillation behind it."""
