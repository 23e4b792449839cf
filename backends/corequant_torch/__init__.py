"""corequant's kernels for torch tensors."""

from corequant_torch.backend import TorchBackend
from corequant_torch.device.packed import rotate_quantize_packed
from corequant_torch.gpu.runtime import nonfinite_replays

__all__ = ["TorchBackend", "nonfinite_replays", "rotate_quantize_packed"]
