"""`zoo plan` and `zoo launch`: a recipe on many GPUs."""
