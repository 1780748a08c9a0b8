"""Names for the arrays that images are: the shape stands in the variable's name or in the docstring."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

__all__ = ["BoolArray", "FloatArray", "UInt8Array"]

UInt8Array = NDArray[np.uint8]
FloatArray = NDArray[np.float32]
BoolArray = NDArray[np.bool_]
