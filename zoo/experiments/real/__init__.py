"""Published networks as teachers, one pool of photographs, and students held against controls."""
