"""Parts that two or more families share."""
