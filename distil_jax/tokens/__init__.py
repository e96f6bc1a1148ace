"""Exact byte tables of two tokenizers, the boundary walker between them, and packing."""
