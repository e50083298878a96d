"""One style for every figure: transparent, in a colour that a light or dark page can replace."""

from __future__ import annotations

import io
import re
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

INK = "#22252a"  # of text and axes; in SVG it becomes the text colour of the page
FAINT = "#8a8f98"  # legible on white and on black
WIDTH = 4.2  # inches: on a phone the text is then about as large as the page's

STYLE: Any = {
    "text.color": INK,
    "text.parse_math": False,  # names of classes and runs are text, dollar signs too
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.titlesize": "medium",
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": FAINT,
    "grid.alpha": 0.25,
    "xtick.color": INK,
    "ytick.color": INK,
    "font.size": 10,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": "small",
    "svg.fonttype": "path",
}


def styled() -> Any:
    """Return the context for drawing figures."""
    return matplotlib.rc_context(STYLE)


def as_png(figure: Figure) -> bytes:
    """Return the figure as PNG on white."""
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=150, facecolor="white")
    return file.getvalue()


def as_svg(figure: Figure, name: str) -> str:
    """Return the figure as an SVG element for a page; it takes the page's text colour.

    Args:
        figure: drawn in the house style.
        name: unique among the figures of the page; the ids inside begin with it.
    """
    file = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": name, **STYLE}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    element = file.getvalue()
    element = element[element.index("<svg") :].replace(INK, "currentColor")
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    # The page sets the width; ids must not collide with those of the page's other figures.
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1, flags=re.DOTALL)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1, flags=re.DOTALL)
    return re.sub(r'((?: id="|href="#|url\(#))', rf"\g<1>{name}-", element)


def image_png(pixels: np.ndarray) -> bytes:
    """Return an image [H, W, 3] of values from 0 to 1, exactly."""
    return _image(pixels, "PNG")


def image_jpeg(pixels: np.ndarray) -> bytes:
    """Return an image [H, W, 3] of values from 0 to 1, small enough for a page of many."""
    return _image(pixels, "JPEG", quality=85)


def _image(pixels: np.ndarray, kind: str, **options: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray((np.clip(pixels, 0, 1) * 255).round().astype(np.uint8)).save(file, kind, **options)
    return file.getvalue()
