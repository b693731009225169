"""The front of the programs."""
