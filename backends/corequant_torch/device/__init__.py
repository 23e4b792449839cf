"""Torch operations that run on any device, and what is kept there."""
