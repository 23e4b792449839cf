"""Rounding the layers of a model, by themselves or with the inputs that they see."""
