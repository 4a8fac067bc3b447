"""Smaller students out of a trained parent, cut along the named axes of `zoo.axes`."""
