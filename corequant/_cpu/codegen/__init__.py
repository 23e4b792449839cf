"""Code generation for rotations, whose definition no compiler turns into good vector code.

See ``docs/kernels.md``.
"""
