"""Kernels of weights that are coded by other means than a grid."""
