"""How a token knows where it stands."""
