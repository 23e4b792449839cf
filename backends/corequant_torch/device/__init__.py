"""Tensors of any device: the kernels as torch operations."""
