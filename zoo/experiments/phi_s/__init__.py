"""PHI-S compared with eight other normalisations."""
