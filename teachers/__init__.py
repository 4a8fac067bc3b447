"""Frozen things that name targets: a batch of images in, `Features` out."""
