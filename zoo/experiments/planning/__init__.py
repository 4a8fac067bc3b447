"""Choosing a trajectory: what rule-based teachers add to imitation."""
