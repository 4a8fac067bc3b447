"""Measures of a map: masks, depth, correspondence."""
