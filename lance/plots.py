"""Figures, one function each: it takes `ax=None`, draws on that Axes or on a new one, and returns it.

Colours come from the taxonomy: a mark that stands for a category, or for a leaf below it, has the colour of that category in every figure. The style file is
applied inside each function and leaves the user's settings alone; for a figure with several axes, make them under `with plots.style():`.
"""

import contextlib
import functools
import importlib.resources
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ParamSpec

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from matplotlib.tri import Triangulation
from scipy.special import betaincinv
from scipy.stats import dirichlet

from lance.corpus import SPLITS, Prompt
from lance.distribution import RejectionDistribution
from lance.metrics import expected_calibration_error
from lance.taxonomy import BENIGN, Taxonomy

INK, GREY, PALE = "#222222", "#7F7F7F", "#BBBBBB"
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "*")
TERM_NAMES = {
    "objective": "objective",
    "label": "label term",
    "reconstruction": "reconstruction",
    "kl_d": "KL of d",
    "kl_z": "KL of z",
    "concentration": "concentration A",
    "active_units": "active units of z",
    "anchor_distance": "distance of b from the anchors",
    "mean_spread": "spread of the posterior means",
}
P = ParamSpec("P")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The style of the book as a context manager."""
    with plt.style.context(str(importlib.resources.files("lance") / "lance.mplstyle")):
        yield
        interactive = matplotlib.is_interactive()
    # A notebook's backend switches interactive mode on when the first figure loads it, perhaps just now; undoing that would hide every later figure.
    matplotlib.interactive(interactive)


def _styled(draw: Callable[P, Axes]) -> Callable[P, Axes]:
    @functools.wraps(draw)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Axes:
        with style():
            return draw(*args, **kwargs)

    return wrapper


def _axes(ax: Axes | None, width: float, height: float) -> Axes:
    return plt.subplots(figsize=(width, height))[1] if ax is None else ax


def category_colour(taxonomy: Taxonomy, key: str) -> str:
    """Colour of a category, or of the category that a leaf stands below; grey for what is in no category."""
    if key not in taxonomy:
        return GREY
    node = taxonomy[key]
    return taxonomy[node.parent].colour if node.parent else node.colour


def _name(taxonomy: Taxonomy, key: str) -> str:
    return taxonomy[key].name if key in taxonomy else key


def _category_legend(ax: Axes, taxonomy: Taxonomy, keys: Sequence[str], **where: Any) -> None:
    handles = [Patch(color=category_colour(taxonomy, k), label=_name(taxonomy, k)) for k in keys]
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


# ------------------------------------------------------------------------ one prompt


@_styled
def distribution_bars(distribution: RejectionDistribution, level: str = "leaf", *, minimum: float = 0.0, ax: Axes | None = None) -> Axes:
    """Expected weight of each leaf or category, with the central 90 % interval of its Beta marginal as a line.

    Coordinates whose mean is below `minimum` are left out.
    """
    shown = distribution.by(level)
    kept = [i for i, m in enumerate(shown.mean.values()) if m >= minimum]
    keys, alpha = [shown.keys[i] for i in kept], shown.alpha[kept]
    rest = shown.concentration - alpha
    ax = _axes(ax, 6.0, 0.9 + 0.24 * len(keys))
    y = np.arange(len(keys))
    ax.barh(y, alpha / shown.concentration, color=[category_colour(shown.taxonomy, k) for k in keys], height=0.72)
    ax.hlines(y, betaincinv(alpha, rest, 0.05), betaincinv(alpha, rest, 0.95), color=INK, linewidth=1.2)
    ax.set(yticks=y, yticklabels=[_name(shown.taxonomy, k) for k in keys], xlim=(0, 1), xlabel="expected weight, with its central 90 % interval")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    low, high = distribution.risk_interval
    ax.set_title(f"risk {distribution.risk:.2f}, 90 % interval {low:.2f} to {high:.2f}")
    return ax


@_styled
def dirichlet_simplex(
    alpha: Float[np.ndarray, "3"] | Sequence[float],
    keys: Sequence[str] = ("0", "1", "2"),
    taxonomy: Taxonomy | None = None,
    *,
    masses: Sequence[float] = (0.5, 0.8, 0.95),
    resolution: int = 160,
    ax: Axes | None = None,
) -> Axes:
    """Density of Dir(alpha) over three coordinates, as contours that enclose the given masses, with its mean as a point.

    Three coordinates of a longer Dirichlet, rescaled to sum to 1, are again Dirichlet with the same concentrations: pass `distribution.alpha[[i, j, k]]`. The
    masses are summed on a grid; where a concentration is below 1 the density grows without bound at the edge, and the contours follow that edge.
    """
    alpha = np.asarray(alpha, dtype=np.float64)
    if alpha.shape != (3,) or (alpha <= 0).any() or len(keys) != 3:
        raise ValueError(f"expected three concentrations > 0 and three keys, found {alpha!r} and {tuple(keys)!r}")
    corners = np.array([[0.0, 0.0], [1.0, 0.0], [0.5, np.sqrt(3) / 2]])
    i, j = np.meshgrid(np.arange(resolution + 1), np.arange(resolution + 1), indexing="ij")
    inside = i + j <= resolution
    weights = np.stack([resolution - i[inside] - j[inside], i[inside], j[inside]], axis=1) / resolution
    weights = (weights + 0.5 / resolution) / (1 + 1.5 / resolution)  # away from the edge, where the density may be infinite
    log_density = dirichlet.logpdf(weights.T, alpha)
    density = np.exp(log_density - log_density.max())
    ranked = np.sort(density)[::-1]
    enclosed = np.cumsum(ranked) / ranked.sum()
    levels = np.unique(ranked[np.searchsorted(enclosed, np.asarray(masses)).clip(max=len(ranked) - 1)])
    levels = levels[levels < density.max()]

    ax = _axes(ax, 3.9, 3.5)
    # Nothing to tell apart in a uniform density: the whole triangle is its region.
    ax.fill(*corners.T, facecolor="#F6F6F6" if len(levels) else "#7FB8D8", edgecolor=INK, linewidth=1)
    xy = weights @ corners
    if len(levels):
        ax.tricontourf(Triangulation(*xy.T), density, levels=[*levels, density.max() * 1.001], cmap=sns.light_palette("#0072B2", as_cmap=True))
        ax.tricontour(Triangulation(*xy.T), density, levels=levels, colors="#0072B2", linewidths=0.8)
    ax.plot(*(alpha / alpha.sum() @ corners), marker="o", color=INK, markeredgecolor="white", linestyle="none", label="mean")
    sides = (("right", "top", -1), ("left", "top", -1), ("center", "bottom", 1))
    for corner, key, (ha, va, way) in zip(corners, keys, sides, strict=True):
        colour = category_colour(taxonomy, key) if taxonomy else INK
        ax.plot(*corner, marker="o", color=colour, linestyle="none", clip_on=False)
        name = _name(taxonomy, key) if taxonomy else key
        ax.annotate(name, corner, (0, 6 * way), textcoords="offset points", ha="center" if way > 0 else ha, va=va, fontsize=8)
    ax.set(xlim=(-0.3, 1.3), ylim=(-0.12, 0.98), aspect="equal")
    ax.set_axis_off()
    ax.set_title(f"alpha = ({', '.join(f'{a:.3g}' for a in alpha)})")
    return ax


# -------------------------------------------------------------------- labelled prompts


@_styled
def leaf_counts(prompts: Sequence[Prompt], taxonomy: Taxonomy, level: str = "leaf", *, ax: Axes | None = None) -> Axes:
    """Number of prompts of each leaf or category, stacked by split; a prompt with several labels counts in each of them."""
    keys = list(taxonomy.keys if level == "leaf" else taxonomy.category_keys)
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for prompt in prompts:
        counts.setdefault(prompt.split or "no split", Counter()).update(memberships(prompt, taxonomy, level))
    counts = {split: c for split, c in counts.items() if c}
    ax = _axes(ax, 6.0, 1.1 + 0.24 * len(keys))
    y, left = np.arange(len(keys)), np.zeros(len(keys))
    opacities = np.linspace(1.0, 0.3, max(len(counts), 2))
    for (split, counter), opacity in zip(counts.items(), opacities, strict=False):
        values = np.array([counter[k] for k in keys])
        ax.barh(y, values, left=left, color=[category_colour(taxonomy, k) for k in keys], alpha=opacity, height=0.75, label=split)
        left += values
    ax.set(yticks=y, yticklabels=[_name(taxonomy, k) for k in keys], xlabel="prompts")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    handles = [Patch(color=GREY, alpha=a, label=s) for s, a in zip(counts, opacities, strict=False)]
    ax.legend(handles=handles, loc="lower right")
    return ax


@_styled
def prompt_lengths(prompts: Sequence[Prompt], taxonomy: Taxonomy, *, ax: Axes | None = None) -> Axes:
    """Words in a prompt by category, as boxes over the quartiles with whiskers from the 5th to the 95th percentile; logarithmic."""
    words: dict[str, list[int]] = {key: [] for key in taxonomy.category_keys}
    for prompt in prompts:
        for key in memberships(prompt, taxonomy, "category"):
            words[key].append(len(prompt.text.split()))
    words = {key: values for key, values in words.items() if values}
    ax = _axes(ax, 6.0, 0.9 + 0.32 * len(words))
    frame = pd.DataFrame([(_name(taxonomy, key), n, key) for key, values in words.items() for n in values], columns=["category", "words", "key"])
    palette = {_name(taxonomy, key): category_colour(taxonomy, key) for key in words}
    sns.boxplot(
        frame, x="words", y="category", hue="category", palette=palette, legend=False, log_scale=True, whis=(5, 95), showfliers=False, saturation=1, ax=ax
    )
    ax.set(xlabel="words in a prompt", ylabel="")
    ax.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    return ax


@_styled
def cooccurrence(prompts: Sequence[Prompt], taxonomy: Taxonomy, level: str = "leaf", *, ax: Axes | None = None) -> Axes:
    """How often two leaves or categories are labels of one prompt: the lower triangle, with empty cells where they never meet."""
    keys = [k for k in (taxonomy.keys if level == "leaf" else taxonomy.category_keys) if k != BENIGN]
    applies = np.array([[float(memberships(p, taxonomy, level).get(k, 0.0) == 1.0) for k in keys] for p in prompts if not p.benign]).reshape(-1, len(keys))
    both = np.tril(applies.T @ applies, -1)
    names = [_name(taxonomy, k) for k in keys]
    ax = _axes(ax, 2.4 + 0.3 * len(keys), 1.9 + 0.26 * len(keys))
    frame = pd.DataFrame(both, index=pd.Index(names), columns=pd.Index(names)).iloc[1:, :-1]
    cmap = sns.light_palette("#0072B2", as_cmap=True)
    sns.heatmap(frame, mask=frame.to_numpy() == 0, annot=True, fmt=".0f", annot_kws={"size": 7}, cmap=cmap, cbar=False, linewidths=0.5, square=False, ax=ax)
    ax.grid(visible=False)
    return ax


@_styled
def twin_map(points: Float[np.ndarray, "n 2"], prompts: Sequence[Prompt], taxonomy: Taxonomy, *, ax: Axes | None = None) -> Axes:
    """Prompts in the plane (say, t-SNE of their embeddings), coloured by the category of their first label; benign ones are rings. Lines join twins."""
    if points.shape != (len(prompts), 2):
        raise ValueError(f"expected points of shape ({len(prompts)}, 2), one a prompt; found {points.shape}")
    keys = [BENIGN if p.benign else next(iter(memberships(p, taxonomy, "category"))) for p in prompts]
    row = {p.id: i for i, p in enumerate(prompts) if p.id}
    pairs = {tuple(sorted((i, row[p.twin]))) for i, p in enumerate(prompts) if p.twin in row}
    ax = _axes(ax, 6.4, 5.2)
    ax.add_collection(LineCollection([points[list(pair)] for pair in sorted(pairs)], colors=PALE, linewidths=0.7, zorder=1))
    for key in taxonomy.category_keys:
        chosen = np.array([k == key for k in keys])
        if chosen.any():
            colour, ring = category_colour(taxonomy, key), key == BENIGN  # a ring stays visible around the dot of a twin
            shape: dict[str, Any] = {"s": 26, "facecolors": "none", "edgecolors": colour} if ring else {"s": 12, "color": colour, "linewidths": 0}
            ax.scatter(points[chosen, 0], points[chosen, 1], label=_name(taxonomy, key), zorder=3 if ring else 2, **shape)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return ax


# ---------------------------------------------------------------------------- measures


@_styled
def measure_by_category(figures: pd.DataFrame, taxonomy: Taxonomy, *, label: str, ax: Axes | None = None) -> Axes:
    """A measure by category and source as points with intervals: colour is the category, the marker is the source.

    `figures` has one row a point with the columns category (key), source, value, low, high.
    """
    present = set(figures["category"])
    keys = [k for k in taxonomy.category_keys if k in present] + sorted(present - set(taxonomy.category_keys))
    sources = list(dict.fromkeys(figures["source"]))
    ax = _axes(ax, 6.4, 0.9 + 0.2 * len(keys) * max(2, len(sources)))
    offsets = (np.arange(len(sources)) - (len(sources) - 1) / 2) * 0.24
    for source, offset, marker in zip(sources, offsets, MARKERS * len(sources), strict=False):
        part = figures[figures["source"] == source].set_index("category")
        for y, key in enumerate(keys):
            if key in part.index:
                value, low, high = (float(part[c][key]) for c in ("value", "low", "high"))
                colour = category_colour(taxonomy, key)
                ax.hlines(y + offset, low, high, color=colour, linewidth=1.4)
                ax.plot([value], [y + offset], marker=marker, color=colour, linestyle="none", label=f"{source}: {key}")
    ax.set(yticks=range(len(keys)), yticklabels=[_name(taxonomy, k) for k in keys], xlabel=label, ylim=(len(keys) - 0.5, -0.5))
    ax.set_xlim(left=min(0.0, float(figures["low"].min())))
    ax.grid(visible=False, axis="y")
    handles = [Line2D([], [], marker=m, color=GREY, linestyle="none", label=s) for s, m in zip(sources, MARKERS * len(sources), strict=False)]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(sources)))
    return ax


@_styled
def opening_shares(figures: pd.DataFrame, taxonomy: Taxonomy, *, ax: Axes | None = None) -> Axes:
    """Share of answers that open with a phrase of refusal, by category and source; columns as in `measure_by_category`."""
    ax = measure_by_category(figures, taxonomy, label="share of answers that open with a phrase of refusal", ax=ax)
    ax.set_xlim(-0.02, 1.02)
    return ax


@_styled
def compliance_rates(rates: pd.DataFrame, taxonomy: Taxonomy, *, ax: Axes | None = None) -> Axes:
    """Published compliance rates in percent: one row a model; columns are category keys and, for prompts that should be answered, `contrast`."""
    ax = _axes(ax, 6.4, 1.3 + 0.34 * len(rates))
    y = np.arange(len(rates))
    ax.hlines(y, rates.min(axis=1), rates.max(axis=1), color="#DDDDDD", linewidth=1)
    for column, marker in zip(rates.columns, MARKERS * len(rates.columns), strict=False):
        name = "Contrast prompts (to be answered)" if column == "contrast" else _name(taxonomy, column)
        ax.plot(rates[column], y, marker=marker, markersize=6, color=category_colour(taxonomy, column), linestyle="none", label=name)
    ax.set(yticks=y, yticklabels=list(rates.index), xlim=(-3, 103), xlabel="prompts complied with, %", ylim=(len(rates) - 0.5, -0.5))
    ax.grid(visible=False, axis="y")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
    return ax


@_styled
def training_curves(
    history: Sequence[Mapping[str, Any]],
    terms: Sequence[str] = ("label", "kl_d", "kl_z"),
    *,
    label: str = "nats a row",
    ax: Axes | None = None,
) -> Axes:
    """Terms of the objective, or signs of collapse, over the epochs: the records of `VariationalEnhancer.history`."""
    frame = pd.DataFrame(list(history))
    missing = [t for t in terms if t not in frame]
    if missing:
        raise ValueError(f"the history has no {missing[0]!r}; it holds {', '.join(map(str, frame.columns)) or 'no epochs'}")
    ax = _axes(ax, 5.6, 3.2)
    for term in terms:
        ax.plot(frame["epoch"], frame[term], marker="o", markersize=2.5, label=TERM_NAMES.get(term, term))
    ax.set(xlabel="epoch", ylabel=label)
    ax.legend()
    return ax


@_styled
def reliability_diagram(
    confidence: Float[np.ndarray, " n"],
    hit: Bool[np.ndarray, " n"] | Int[np.ndarray, " n"] | Float[np.ndarray, " n"],
    *,
    bins: int = 15,
    label: str = "",
    ax: Axes | None = None,
) -> Axes:
    """Accuracy against confidence over bins of equal mass; the legend gives the expected calibration error. Call it again on the same Axes to compare."""
    hit = np.asarray(hit, dtype=np.float64)
    parts = [b for b in np.array_split(np.argsort(confidence, kind="stable"), bins) if len(b)]
    if ax is None:
        ax = _axes(None, 3.9, 3.7)
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color=PALE, linestyle="--", linewidth=1)
    error = expected_calibration_error(confidence, hit, bins)
    text = f"{label}, ECE {error:.3f}" if label else f"ECE {error:.3f}"
    ax.plot([confidence[b].mean() for b in parts], [hit[b].mean() for b in parts], marker="o", label=text)
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", aspect="equal")
    ax.legend(loc="upper left")
    return ax


@_styled
def risk_histogram(
    risks: Float[np.ndarray, " n"] | Sequence[float],
    keys: Sequence[str],
    taxonomy: Taxonomy,
    *,
    threshold: float | None = None,
    bins: int = 25,
    ax: Axes | None = None,
) -> Axes:
    """Risks of prompts, stacked by the category (or leaf) of each; the threshold as a line."""
    if len(risks) != len(keys):
        raise ValueError(f"expected one key a risk, found {len(keys)} keys for {len(risks)} risks")
    groups: dict[str, list[float]] = {key: [] for key in taxonomy.category_keys}
    for risk, key in zip(risks, keys, strict=True):
        groups[taxonomy[key].parent or key].append(float(risk))
    groups = {key: values for key, values in groups.items() if values}
    ax = _axes(ax, 6.0, 3.2)
    colours = [category_colour(taxonomy, k) for k in groups]
    ax.hist(list(groups.values()), bins=np.linspace(0, 1, bins + 1).tolist(), stacked=True, color=colours, label=[_name(taxonomy, k) for k in groups])
    if threshold is not None:
        ax.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.2f}")
    ax.set(xlim=(0, 1), xlabel="risk", ylabel="prompts")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=3)
    return ax
