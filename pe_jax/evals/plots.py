"""How figures look: one style, colours that colour-blind readers tell apart, and files of them.

Figures are matplotlib's own objects, made without pyplot: nothing is left open, no backend is chosen, and a notebook
shows them as they are. Matplotlib (extra `viz`) is imported when the first one is drawn.
"""

import contextlib
import io
from collections.abc import Iterator
from typing import Any

BLUE, ORANGE, GREEN, PURPLE, SKY, RED = "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b2182b"  # Okabe, Ito
INK, GREY, RULE, FAINT = "#0f172a", "#64748b", "#cbd5e1", "#e2e8f0"
FORMATS = ("png", "pdf", "svg")

_STYLE: dict[Any, Any] = {
    "font.size": 9,
    "axes.titlesize": 9.5,
    "axes.labelsize": 9,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.titlelocation": "left",
    "text.color": INK,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": FAINT,
    "grid.linewidth": 0.7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.6,
    "lines.markersize": 3.5,
    "svg.fonttype": "none",
    "pdf.fonttype": 42,
}


@contextlib.contextmanager
def style() -> Iterator[Any]:
    """Gives `matplotlib.figure.Figure`; what is drawn inside the context has the style.

    Raises:
      ModuleNotFoundError: without matplotlib, saying how to install it.
    """
    require()
    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        yield Figure


def require() -> None:
    """Raises a ModuleNotFoundError where matplotlib is missing; for those who want to know before they compute."""
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("figures need matplotlib: pip install 'pe-jax[viz]'.") from error


def format_of(path: str) -> str:
    """The format that a file's ending asks for.

    Raises:
      ValueError: if it is none of `FORMATS`.
    """
    ending = path.rpartition(".")[2].lower() if "." in path else ""
    if ending not in FORMATS:
        raise ValueError(f"{path} does not say the format of the figure; let it end in .{', .'.join(FORMATS)}.")
    return ending


def encoded(figure: Any, format: str = "png", dpi: int = 200) -> bytes:
    """The figure as a file's content, on white."""
    buffer = io.BytesIO()
    with style():
        figure.savefig(buffer, format=format, dpi=dpi, facecolor="white")
    return buffer.getvalue()
