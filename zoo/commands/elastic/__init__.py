"""`zoo elastic`: one model whose first units are smaller ones."""
