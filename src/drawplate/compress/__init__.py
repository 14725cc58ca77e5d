"""Compress: fewer stored bytes, by low rank or by sparsity, to a byte budget."""
