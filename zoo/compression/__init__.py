"""Prompt compression: which tokens of a text another model need not read."""
