"""Pages about runs: one run (`page`), or many runs and results joined (`joined`)."""
