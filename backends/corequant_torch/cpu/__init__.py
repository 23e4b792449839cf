"""CPU tensors: NumPy's kernels on their memory, and float32 products by oneDNN."""
