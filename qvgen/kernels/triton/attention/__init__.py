"""Attention with scores of 8-bit codes on a GPU. Importing this package imports no triton."""
