"""From numbers to figures: pure functions without any knowledge of runs, and conversion to PNG or SVG."""

from deit_kd.figures.attention import look, side_by_side
from deit_kd.figures.charts import class_bars, line_charts, matrix, reliability_diagram, token_chart
from deit_kd.figures.series import Chart, Key, Mark, Series, colour_of
from deit_kd.figures.style import as_png, as_svg, image_jpeg, image_png

__all__ = [
    "Chart",
    "Key",
    "Mark",
    "Series",
    "as_png",
    "as_svg",
    "class_bars",
    "colour_of",
    "image_jpeg",
    "image_png",
    "line_charts",
    "look",
    "matrix",
    "reliability_diagram",
    "side_by_side",
    "token_chart",
]
