"""One text in several processes."""
