"""Exact rewrites: the model's blocks with other leaves, and what does not change computed once."""
