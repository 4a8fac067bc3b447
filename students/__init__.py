"""What is trained: a backbone with one pair of heads for each teacher."""
