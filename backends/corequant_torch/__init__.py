"""corequant's kernels for torch tensors."""

from corequant_torch.backend import TorchBackend
from corequant_torch.device.graphs import nonfinite_replays
from corequant_torch.kernels.packed import rotate_quantize_packed

__all__ = ["TorchBackend", "nonfinite_replays", "rotate_quantize_packed"]
