"""Quantizers: number format, granularity, and how scales are chosen and stored.

Examples
--------
>>> from corequant.specs import QuantSpec, presets
>>> str(presets["mxfp4"].replace(scale_rounding="even"))
'mxfp4:even'
>>> QuantSpec.parse("mxfp4").scale_format
<ScaleFormat.E8M0: 'e8m0'>
"""

from corequant.specs.enumerations import (
    GROUPED,
    POWERS_OF_TWO,
    Granularity,
    ScaleFormat,
    ScaleRounding,
    ScaleSearch,
)
from corequant.specs.spec import QuantSpec, presets, qparams_shape

__all__ = [
    "GROUPED",
    "POWERS_OF_TWO",
    "Granularity",
    "QuantSpec",
    "ScaleFormat",
    "ScaleRounding",
    "ScaleSearch",
    "presets",
    "qparams_shape",
]
