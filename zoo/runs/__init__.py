"""The run folder: the record of a training run."""
