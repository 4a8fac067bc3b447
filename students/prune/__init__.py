"""A parent cut along named axes (`zoo.axes`), or thinned to N of each M weights."""
