"""corequant's kernels for torch tensors."""

from corequant._validation import need_packages

need_packages("corequant_torch", "torch", "torch", "ml_dtypes")

from corequant_torch.backend import TorchBackend  # noqa: E402
from corequant_torch.device.graphs import nonfinite_replays  # noqa: E402
from corequant_torch.kernels.packed import rotate_quantize_packed  # noqa: E402

__all__ = ["TorchBackend", "nonfinite_replays", "rotate_quantize_packed"]
