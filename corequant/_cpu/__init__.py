"""NumPy arrays: the backend that every installation has, over two engines.

``loops`` are compiled by numba, ``codegen`` writes LLVM's intermediate form for rotations.
"""
