"""What a small language model gains and loses by what mixes its tokens."""
