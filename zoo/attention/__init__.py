"""Which keys a query sees, and at what distance; partial results merge in zoo.ops.attention."""
