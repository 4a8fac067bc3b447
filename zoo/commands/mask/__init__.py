"""`zoo mask`: N of each M weights stay, chosen or learnt."""
