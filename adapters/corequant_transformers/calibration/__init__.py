"""Statistics of the float model's activations, and what is chosen from them."""
