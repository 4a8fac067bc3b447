"""How a student is trained: recipes, the loop, losses, PHI-S, the data plan."""
