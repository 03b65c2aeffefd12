"""Pictures of features: tokens coloured by their principal components (PE, appendix B.3.2)."""

import numpy as np
from jaxtyping import Float

# sRGB from XYZ at the D65 white point (IEC 61966-2-1), and that white point.
_RGB = np.array([[3.2406, -1.5372, -0.4986], [-0.9689, 1.8758, 0.0415], [0.0557, -0.2040, 1.0570]])
_WHITE = np.array([0.9505, 1.0, 1.089])


def pca_colors(tokens: Float[np.ndarray, "..."]) -> Float[np.ndarray, "B H W 3"]:
    """Colours of tokens, in [0, 1]: similar features get similar colours, across all the images given.

    Each grid is mixed half and half with its 3x3 Gaussian blur, then projected to the three directions of most
    variance over all tokens: the first is lightness, the other two span chroma and hue.

    Raises:
      ValueError: for tokens that are not [B, H, W, D] with D of at least 3.
    """
    if tokens.ndim != 4 or tokens.shape[-1] < 3:
        raise ValueError(f"tokens have shape {tokens.shape}; want [B, H, W, D] with D of at least 3.")
    smooth = 0.5 * tokens + 0.5 * _blur(tokens.astype(np.float64))
    flat = smooth.reshape(-1, tokens.shape[-1])
    flat = flat - flat.mean(0)
    _, _, directions = np.linalg.svd(flat.T @ flat)
    parts = flat @ directions[:3].T
    parts *= np.where(np.abs(parts.min(0)) > parts.max(0), -1, 1)  # a direction's sign is arbitrary: longer tail up
    low, high = np.percentile(parts, [1, 99], axis=0)
    unit = np.clip((parts - low) / np.maximum(high - low, 1e-12), 0, 1).reshape(*tokens.shape[:-1], 3)
    return _from_lab(20 + 70 * unit[..., 0], 110 * (unit[..., 1] - 0.5), 110 * (unit[..., 2] - 0.5))


def _blur(x: np.ndarray) -> np.ndarray:
    """3x3 Gaussian of standard deviation 1 over axes 1 and 2; the border repeats."""
    side = np.exp(-0.5)
    weights = np.array([side, 1.0, side]) / (1 + 2 * side)
    for axis in (1, 2):
        pad = [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)]
        wide = np.pad(x, pad, mode="edge")
        count = x.shape[axis]
        x = np.sum([w * np.take(wide, range(i, i + count), axis) for i, w in enumerate(weights)], axis=0)
    return x


def _from_lab(lightness: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """CIE L*a*b* (L in 0..100) → sRGB in [0, 1], out-of-gamut colours clipped."""
    y = (lightness + 16) / 116
    f = np.stack([y + a / 500, y, y - b / 200], -1)
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * _WHITE
    linear = np.clip(xyz @ _RGB.T, 0, 1)
    return np.clip(np.where(linear > 0.0031308, 1.055 * linear ** (1 / 2.4) - 0.055, 12.92 * linear), 0, 1)
