"""The backend's kernels for CPU tensors and for tensors of other devices, and the choice."""
