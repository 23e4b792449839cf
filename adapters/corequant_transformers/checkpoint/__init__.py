"""Directories that hold a quantized model."""
