"""A small hybrid is cut by width, by heads, by channels and to 2:4, each beside its controls."""
