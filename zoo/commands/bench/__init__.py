"""`zoo bench`: how fast models, steps, data and links are."""
