"""How ops find, check and call their kernels."""
