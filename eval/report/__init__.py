"""HTML reports about one run (`page`), or about many runs and result files (`joined`)."""
