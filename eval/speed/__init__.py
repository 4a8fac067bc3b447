"""Images a second, and what they cost."""
