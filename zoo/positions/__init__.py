"""How a token knows its position."""
