"""Triton kernels and their launches; importing a module of them needs Triton."""
