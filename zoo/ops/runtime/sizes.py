"""Integer arithmetic of shapes."""


def ceil_div(a: int, b: int) -> int:
    """Return a / b rounded up."""
    return -(-a // b)


def next_power_of_two(least: int) -> int:
    """Return the smallest power of two that is at least `least` >= 1."""
    return 1 << (least - 1).bit_length()
