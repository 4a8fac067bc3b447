"""`zoo eval`: one target, suites of them, comparisons."""
