"""Rounding the layers of a model, to nearest or for the inputs that they read."""
