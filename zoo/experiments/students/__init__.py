"""One student of each family, compared with its teachers and with itself trained on labels."""
