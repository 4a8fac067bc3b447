"""One student of each family against its teachers and itself alone."""
