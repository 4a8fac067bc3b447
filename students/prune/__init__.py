"""A parent cut along its axes, or thinned to N of each M weights."""
