"""A zoo of sequence architectures, compared on length extrapolation: train short, test long."""
