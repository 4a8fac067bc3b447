"""Speed, memory and arithmetic of models."""
