"""Pretrained checkpoints, in the formats of `transformers` and llama.cpp, as runs of the zoo."""
