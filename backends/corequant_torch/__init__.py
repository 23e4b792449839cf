"""corequant's kernels for torch tensors."""

from corequant_torch.backend import TorchBackend
from corequant_torch.packed import rotate_quantize_packed

__all__ = ["TorchBackend", "rotate_quantize_packed"]
