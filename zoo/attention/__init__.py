"""Attention patterns and windows: which keys each query attends to, and at what distance."""
