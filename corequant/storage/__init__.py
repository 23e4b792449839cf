"""Quantized tensors in files: the layouts that others define, and files of named tensors."""
