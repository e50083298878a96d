"""An image with the attention of a token laid over it."""

from __future__ import annotations

import matplotlib
import numpy as np
from PIL import Image

SIDE = 192  # pixels


def look(image: np.ndarray, attention: np.ndarray | None = None) -> np.ndarray:
    """Return an image at gallery size, alone or with the attention to it.

    Patches keep their edges, without interpolation. The brightest patch has the most attention.

    Args:
        image: [H, W, 3], 0 to 1.
        attention: [h, w], not negative; None shows the image alone.

    Returns:
        [192, 192, 3], 0 to 1.
    """
    enlarged = _resize(image)
    if attention is None:
        return enlarged
    heat = attention / max(float(attention.max()), 1e-12)
    colours = matplotlib.colormaps["inferno"](heat)[..., :3]
    patches = np.asarray(
        Image.fromarray((colours * 255).astype(np.uint8)).resize((SIDE, SIDE), Image.Resampling.NEAREST)
    )
    grey = enlarged.mean(-1, keepdims=True)
    return 0.4 * grey + 0.6 * patches / 255


def side_by_side(images: list[np.ndarray]) -> np.ndarray:
    """Join images [H, W, 3] of one height into a strip, with 4 white pixels between them."""
    gap = np.ones((images[0].shape[0], 4, 3))
    return np.concatenate([piece for image in images for piece in (gap, image)][1:], axis=1)


def _resize(image: np.ndarray) -> np.ndarray:
    pixels = Image.fromarray((np.clip(image, 0, 1) * 255).round().astype(np.uint8))
    return np.asarray(pixels.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) / 255
