"""Models: where they come from, their parts, and how to run them."""
