"""What all figures share: the style of the book, colours by category, and which leaves a prompt belongs to."""

import contextlib
import functools
import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec

import matplotlib
import matplotlib.pyplot as plt
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.patches import Patch

from lance.corpus import Prompt
from lance.taxonomy import BENIGN, Taxonomy

INK, GREY, PALE = "#222222", "#7F7F7F", "#BBBBBB"
CONTRAST = ("#0072B2", "#D55E00", "#009E73", "#882255", "#56B4E9", "#E69F00")  # for models and other things that are no category
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
P = ParamSpec("P")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The style of the book as a context manager."""
    with plt.style.context(str(importlib.resources.files("lance") / "lance.mplstyle")):
        yield
        interactive = matplotlib.is_interactive()
    # A notebook's backend switches interactive mode on when the first figure loads it, perhaps just now; undoing that would hide every later figure.
    matplotlib.interactive(interactive)


def styled(draw: Callable[P, Axes]) -> Callable[P, Axes]:
    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Axes:
        with style():
            return draw(*args, **kwargs)

    return wrapper


def axes_of(ax: Axes | None, width: float, height: float) -> Axes:
    return plt.subplots(figsize=(width, height))[1] if ax is None else ax


def category_colour(taxonomy: Taxonomy, key: str) -> str:
    """Colour of a category, or of the category that a leaf stands below; grey for what is in no category."""
    if key not in taxonomy:
        return GREY
    node = taxonomy[key]
    return taxonomy[node.parent].colour if node.parent else node.colour


def leaf_colour(taxonomy: Taxonomy, key: str) -> Any:
    """Colour of a leaf where leaves have to be told apart: its category's, darker for the first leaves of the category and paler for the last."""
    siblings = [k for k in taxonomy.keys if k != BENIGN and category_colour(taxonomy, k) == category_colour(taxonomy, key)]
    if key not in siblings or len(siblings) == 1:
        return category_colour(taxonomy, key)
    place = siblings.index(key) / (len(siblings) - 1) - 0.5
    return sns.blend_palette([INK if place < 0 else "white", category_colour(taxonomy, key)], n_colors=101)[round(100 * (1 - abs(place)))]


def name_of(taxonomy: Taxonomy, key: str) -> str:
    return taxonomy[key].name if key in taxonomy else key


def category_legend(ax: Axes, taxonomy: Taxonomy, keys: Sequence[str], **where: Any) -> None:
    handles = [Patch(color=category_colour(taxonomy, k), label=name_of(taxonomy, k)) for k in keys]
    ax.legend(handles=handles, **where)


def memberships(prompt: Prompt, taxonomy: Taxonomy, level: str = "leaf") -> dict[str, float]:
    """How a prompt counts in a table: 1 for each leaf (or category) that applies, 1 / |S| for each leaf of a candidate set, benign 1 for a benign prompt."""
    if level not in ("leaf", "category"):
        raise ValueError(f"level must be 'leaf' or 'category', found {level!r}")
    if prompt.benign:
        return {BENIGN: 1.0}
    weights: dict[str, float] = {}
    for label in prompt.labels:
        leaves = taxonomy.leaves_of(label)
        for leaf in leaves:
            weights[leaf] = max(weights.get(leaf, 0.0), 1 / len(leaves))
    if level == "leaf":
        return weights
    totals: dict[str, float] = {}
    for leaf, weight in weights.items():
        category = taxonomy[leaf].parent or leaf
        totals[category] = min(1.0, totals.get(category, 0.0) + weight)
    return totals
