"""PHI-S beside eight other normalisations."""
