"""Draw the picture of the method, book/_static/method.svg. Run it again after changing it: python book/draw_method.py"""

from pathlib import Path

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

TARGET = Path(__file__).parent / "_static" / "method.svg"

# Text stands in boxes of its own ground, and lines are a grey that reads on white and on the theme's dark ground: one file serves both.
LINE, INK = "#7A828C", "#1B2026"
DATA, MODEL, CHECK = "#EEF1F5", "#CFE3F5", "#D9EEDC"
WIDTH, HEIGHT = 1.78, 0.86

# name, x, y of the centre, what it does, ground
BOXES = [
    ("Prompt", 1.0, 3.0, "as the user wrote it", DATA),
    ("Enhancer", 3.25, 3.0, "variational label\nenhancement", MODEL),
    ("Distribution", 5.5, 3.0, "benign and K reasons,\nwith its uncertainty", DATA),
    ("Gradients", 7.75, 3.0, "one per active category:\nwhich words, which way", DATA),
    ("Refiner", 7.75, 1.0, "rewrites while the\nrisk bound falls", MODEL),
    ("Verifier", 5.5, 1.0, "independent second\nopinion", CHECK),
    ("Answer", 1.0, 1.0, "of the model, or a\nconstructive reply", DATA),
]


def draw(path: Path) -> None:
    """Write the picture as SVG; the same matplotlib gives the same bytes."""
    with mpl.rc_context({"svg.hashsalt": "method", "svg.fonttype": "path", "font.family": "DejaVu Sans"}):
        figure = Figure(figsize=(8.8, 3.0))
        FigureCanvasSVG(figure)
        axes = figure.add_axes((0, 0, 1, 1))
        axes.set(xlim=(0, 8.8), ylim=(0.5, 3.5))
        axes.axis("off")
        centre = {name: (x, y) for name, x, y, _, _ in BOXES}
        for name, x, y, note, ground in BOXES:
            corner = (x - WIDTH / 2, y - HEIGHT / 2)
            axes.add_patch(FancyBboxPatch(corner, WIDTH, HEIGHT, boxstyle="round,pad=0,rounding_size=0.09", facecolor=ground, edgecolor=LINE, linewidth=0.9))
            axes.text(x, y + 0.23, name, ha="center", va="center", fontsize=10.5, fontweight="bold", color=INK)
            axes.text(x, y - 0.12, note, ha="center", va="center", fontsize=7.6, color=INK, linespacing=1.25)

        def arrow(start: tuple[float, float], end: tuple[float, float], bend: float = 0.0, dashed: bool = False) -> None:
            style = f"arc3,rad={bend}"
            line = "--" if dashed else "-"
            axes.add_patch(
                FancyArrowPatch(
                    start, end, connectionstyle=style, arrowstyle="-|>", mutation_scale=12, color=LINE, linewidth=1.3, linestyle=line, shrinkA=2, shrinkB=2
                )
            )

        def label(x: float, y: float, text: str) -> None:
            axes.text(
                x, y, text, ha="center", va="center", fontsize=7.6, color=INK, bbox={"boxstyle": "round,pad=0.25", "facecolor": "white", "edgecolor": "none"}
            )

        half = WIDTH / 2
        for left, right in (("Prompt", "Enhancer"), ("Enhancer", "Distribution"), ("Distribution", "Gradients")):
            arrow((centre[left][0] + half, 3.0), (centre[right][0] - half, 3.0))
        arrow((centre["Gradients"][0], 3.0 - HEIGHT / 2), (centre["Refiner"][0], 1.0 + HEIGHT / 2))
        arrow((centre["Refiner"][0] - half, 1.0), (centre["Verifier"][0] + half, 1.0))
        arrow((centre["Verifier"][0] - half, 1.0), (centre["Answer"][0] + half, 1.0))
        arrow((centre["Prompt"][0], 3.0 - HEIGHT / 2), (centre["Answer"][0], 1.0 + HEIGHT / 2))
        arrow((centre["Refiner"][0] - half * 0.75, 1.0 + HEIGHT / 2), (centre["Enhancer"][0] + half * 0.3, 3.0 - HEIGHT / 2), bend=-0.08, dashed=True)
        label(1.0, 2.0, "risk bound below t:\npasses unchanged")
        label(5.4, 1.98, "each rewrite is scored again")
        label(3.25, 1.0, "agrees: the rewrite goes on\ndisagrees: declined, with a reason")
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


if __name__ == "__main__":
    draw(TARGET)
