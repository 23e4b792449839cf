"""The rounding methods on tensors of any device."""
