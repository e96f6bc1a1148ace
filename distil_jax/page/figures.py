"""Plots, once as inline SVG in the page's own colours, which follow light and dark, and once as PNG."""

import io
import itertools
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from distil_jax.page.elements import plain, text
from distil_jax.page.style import COLORS

NAMED = {"teacher": "teacher", "student_before": "untouched"} | {n: n for n in ("control", "smoothing", "distilled")}
# Of the others, in their order; when the colours are used up, the next kind of line begins with the first again.
OTHERS = [name for name in COLORS if name.startswith("other")]
LINES = ("-", "--", ":", "-.")
LONGEST = 48  # characters of a label
SIZE = (4.6, 3.0)  # inches: as wide as a phone's page, where a point is a pixel

INK, MUTED, LINE = (COLORS[name][0] for name in ("ink", "muted", "line"))
_STYLE = {
    "font.family": ["DejaVu Sans"],
    "font.size": 10,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "text.color": INK,
    "axes.edgecolor": MUTED,
    "axes.labelcolor": INK,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "figure.facecolor": "white",
    "axes.facecolor": "none",
    "figure.constrained_layout.use": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "distil_jax",
}


def label(value: Any) -> str:
    """A user's text in a plot: one short line."""
    return plain(" ".join(str(value).split()), LONGEST)


def looks(runs: Sequence[str]) -> dict[str, dict[str, str]]:
    """Colour and kind of line of each run; no two runs look the same, up to 32 beside the named ones."""
    others = itertools.product(LINES, OTHERS)
    found = {}
    for run in runs:
        line, color = ("-", NAMED[run]) if run in NAMED else next(others)
        found[run] = {"color": COLORS[color][0], "linestyle": line}
    return found


def key(shown: dict[str, dict[str, str]], names: dict[str, str]) -> str:
    """Which line is which, as HTML: one key for many plots. names: what each is called."""
    dashes = {"-": "", "--": "5 3", ":": "1 3", "-.": "6 3 1 3"}
    items = [
        '<span><svg viewBox="0 0 28 8" aria-hidden="true"><line x1="0" y1="4" x2="28" y2="4" stroke-width="2.5" '
        f'stroke="{_variable(look["color"])}" stroke-dasharray="{dashes[look["linestyle"]]}"/></svg>'
        f"{text(names[name])}</span>"
        for name, look in shown.items()
    ]
    return f'<div class="key">{"".join(items)}</div>'


class Plots:
    """Makes figures, writes each as PNG to a folder, and returns it as HTML. folder: None writes none."""

    def __init__(self, folder: Path | None = None):
        self._folder, self.written = folder, []
        self._names: set[str] = set()
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)

    def draw(
        self, name: str, draw: Any, caption: str, size: tuple[float, float] = SIZE, *, titled: bool = False
    ) -> str:
        """`draw(axes)` makes the plot. name: of the file; what a user named in it is made safe. caption: what it shows,
        for those who hear the page too. titled: the plot says it, so that it does not stand below once more."""
        with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
            # The page has the browser's fonts; a sign that ours lacks is a box in the PNG alone.
            warnings.filterwarnings("ignore", message="Glyph .* missing from")
            figure = Figure(figsize=size)
            draw(figure.subplots())
            drawn = _svg(figure)
            if self._folder is not None:
                file = self._folder / f"{self._file(name)}.png"
                figure.savefig(file, dpi=150, metadata={"Software": None})
                self.written.append(file)
        below = "" if titled else f"<figcaption>{text(caption)}</figcaption>"
        return f'<figure role="img" aria-label="{text(caption)}">{drawn}{below}</figure>'

    def _file(self, name: str) -> str:
        """A file's name from ours and a user's words, used once."""
        safe = re.sub(r"[^A-Za-z0-9]+", "_", name).strip("_")[:80] or "plot"
        numbered = itertools.chain([safe], (f"{safe}_{n}" for n in itertools.count(2)))
        found = next(name for name in numbered if name not in self._names)
        self._names.add(found)
        return found


def together(plots: Sequence[str]) -> str:
    """Figures side by side where there is room."""
    return f'<div class="plots">{"".join(plots)}</div>' if any(plots) else ""


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    whole = out.getvalue()
    opening, _, drawn = whole[whole.index("<svg") :].partition(">")
    opening = re.sub(r' (width|height|version|xmlns(:xlink)?)="[^"]*"', "", opening)  # HTML needs none of them
    drawn = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", drawn, flags=re.DOTALL)
    drawn = re.sub(r'<g id="[^"]*">', "<g>", drawn)  # every plot has an axes_1; clip paths are named by hashes
    drawn = drawn.replace("xlink:href=", "href=").replace("'DejaVu Sans'", "system-ui, sans-serif")
    colors = {pair[0]: name for name, pair in COLORS.items()}
    drawn = re.sub(r"#[0-9a-f]{6}(?=[;\"'])", lambda m: f"var(--{colors[m[0]]})" if m[0] in colors else m[0], drawn)
    return f"{opening}>{drawn}"


def _variable(color: str) -> str:
    return next((f"var(--{name})" for name, pair in COLORS.items() if pair[0] == color), color)


# ---- kinds of plots --------------------------------------------------------------------------------------------------


Series = dict[str, tuple[Sequence[float], Sequence[float]]]  # of each run, x and y


def lines(axes: Any, series: Series, shown: dict[str, dict[str, str]], **texts: Any) -> None:
    """A line for each run, in its look. texts: title, xlabel and the like."""
    for run, (x, y) in series.items():
        axes.plot(x, y, linewidth=1.4, **shown[run])
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.set(**texts)


def bars(
    axes: Any,
    names: Sequence[str],
    values: Sequence[float],
    intervals: Sequence[Sequence[float]] | None = None,
    color: Any = COLORS["distilled"][0],
    above: bool = False,
) -> None:
    """Horizontal bars from zero, the first on top, with intervals where there are any. color: of all, or of each.
    above: names stand above their bars, which leaves the width to these."""
    places = np.arange(len(names))[::-1]
    axes.barh(places, values, 0.42 if above else 0.66, color=color, alpha=0.85)
    if intervals is not None:
        for place, (low, high) in zip(places, intervals, strict=True):
            axes.plot([low, high], [place, place], color=INK, linewidth=1.2)
    axes.axvline(0, color=MUTED, linewidth=0.8)
    axes.set_yticks([] if above else places, [] if above else [label(name) for name in names])
    if above:
        axes.spines["left"].set_visible(False)
        for place, name in zip(places, names, strict=True):
            axes.text(0.008, place + 0.26, label(name), transform=axes.get_yaxis_transform(), fontsize=9, va="bottom")
        axes.set(ylim=(-0.5, len(names) - 0.1))
    axes.grid(axis="y", visible=False)


def tall(count: int) -> tuple[float, float]:
    """The size of a plot of so many bars with their names above."""
    return SIZE[0], 0.6 + 0.36 * count


def heat(axes: Any, values_RxC: np.ndarray, names: Sequence[str], color: str) -> None:
    """A map of shares, 0 to 1: the more, the less transparent, so that it stands on either background."""
    rgba = np.zeros((*values_RxC.shape, 4))
    rgba[..., :3] = matplotlib.colors.to_rgb(color)
    rgba[..., 3] = np.clip(values_RxC, 0, 1) ** 0.5
    axes.imshow(rgba, interpolation="none", aspect="equal")
    places, size = np.arange(len(names)), 8 if len(names) <= 26 else 7
    labels = [name if len(name) <= 16 else f"{name[:15]}…" for name in map(label, names)]
    axes.set_xticks(places, labels, rotation=90, fontsize=size)
    axes.set_yticks(places, labels, fontsize=size)
    axes.grid(visible=False)
