"""CPU tensors: their memory as NumPy arrays, and float32 products by oneDNN."""
