"""Token mixers other than attention, such as state spaces."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Mixer"]


@dataclass(frozen=True)
class Mixer:
    """A part of a block that mixes tokens other than by attention, such as a convolution.

    Its linear layers are quantized. Those that read the residual stream take part in what happens
    to it, as do those that write it; what those and the inner ones read is rotated at run time.
    Everything else in it stays as it is. Sizes are expressions, as in ``Architecture``.

    Attributes
    ----------
    norm : str, optional
        The norm that it reads; None if it reads the stream itself.
    readers : tuple of (str, str)
        Linear layers that read the norm, and their outputs.
    writers : tuple of (str, str)
        Linear layers that write the residual stream, and their inputs.
    steering : tuple of (str, str)
        Readers with few outputs, such as gates of a whole head, which stay in float.
    linears : tuple of (str, str, str)
        Linear layers in between, their outputs and their inputs.
    inner : tuple of str
        Its other modules and parameters.

    Examples
    --------
    >>> import corequant_transformers as cqhf
    >>> convolution = cqhf.Mixer(
    ...     "operator_norm",
    ...     readers=(("conv.in_proj", "3 * hidden_size"),),
    ...     writers=(("conv.out_proj", "hidden_size"),),
    ...     inner=("conv.conv",))
    """

    norm: str | None
    readers: tuple[tuple[str, str], ...]
    writers: tuple[tuple[str, str], ...]
    steering: tuple[tuple[str, str], ...] = ()
    linears: tuple[tuple[str, str, str], ...] = ()
    inner: tuple[str, ...] = ()
