"""corequant's kernels for torch tensors."""

from corequant_torch.backend import TorchBackend

__all__ = ["TorchBackend"]
