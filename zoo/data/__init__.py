"""Where samples come from, in which order, and how they are read."""
