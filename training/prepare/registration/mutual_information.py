"""The affine of maximal mutual information (SimpleITK)."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import SimpleITK as sitk  # noqa: N813  # its own documentation's name

from staindiffuser.imaging.arrays import BoolArray, FloatArray

__all__ = ["maximise"]


def maximise(
    fixed: FloatArray, moving: FloatArray, fixed_mask: BoolArray, moving_mask: BoolArray
) -> npt.NDArray[np.float64] | None:
    """Improve an affine from the identity by Mattes mutual information (Mattes et al., IEEE TMI 2003).

    Args:
        fixed, moving: [H, W], on one grid by the current guess.
        fixed_mask, moving_mask: [H, W], the pixels that count.

    Returns:
        [2, 3], fixed pixels to moving pixels; None where too little overlaps.
    """
    height, width = fixed.shape
    step = sitk.AffineTransform(2)
    step.SetCenter(((width - 1) / 2, (height - 1) / 2))
    # One thread, for reproducible numbers: the order in which threads add up changes the last digits, which 150 steps
    # amplify to tenths of a pixel. The method's own setting does not reach all of its parts.
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(32)
    method.SetMetricSamplingStrategy(method.NONE)  # all pixels: sampling moves the result by 0.1 % of the diagonal
    method.SetMetricFixedMask(sitk.GetImageFromArray(fixed_mask.astype(np.uint8)))
    method.SetMetricMovingMask(sitk.GetImageFromArray(moving_mask.astype(np.uint8)))
    method.SetInterpolator(sitk.sitkLinear)
    method.SetOptimizerAsRegularStepGradientDescent(1.0, 1e-3, 150, gradientMagnitudeTolerance=1e-8)
    method.SetOptimizerScalesFromPhysicalShift()
    method.SetShrinkFactorsPerLevel([4, 2])
    method.SetSmoothingSigmasPerLevel([2, 1])
    method.SetInitialTransform(step, True)
    try:
        method.Execute(sitk.GetImageFromArray(fixed), sitk.GetImageFromArray(moving))
    except RuntimeError:  # no sample lies in both masks
        return None
    linear = np.asarray(step.GetMatrix(), np.float64).reshape(2, 2)
    centre = np.asarray(step.GetCenter(), np.float64)
    return np.column_stack([linear, np.asarray(step.GetTranslation()) + centre - linear @ centre])
