"""What a training run does: its windows, its steps, and what happens beside them."""
