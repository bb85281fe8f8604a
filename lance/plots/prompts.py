"""Figures of one distribution, and of labelled prompts."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter
from matplotlib.tri import Triangulation
from scipy.special import betaincinv
from scipy.stats import dirichlet

from lance.corpus import SPLITS, Prompt
from lance.distribution import RejectionDistribution
from lance.plots.base import GREY, INK, PALE, axes_of, category_colour, leaf_colour, memberships, name_of, styled
from lance.taxonomy import BENIGN, Taxonomy

# ------------------------------------------------------------------------ one prompt


@styled
def distribution_bars(distribution: RejectionDistribution, level: str = "leaf", *, minimum: float = 0.0, ax: Axes | None = None) -> Axes:
    """Expected weight of each leaf or category, with the central 90 % interval of its Beta marginal as a line.

    Coordinates whose mean is below `minimum` are left out.
    """
    shown = distribution.by(level)
    kept = [i for i, m in enumerate(shown.mean.values()) if m >= minimum]
    keys, alpha = [shown.keys[i] for i in kept], shown.alpha[kept]
    rest = shown.concentration - alpha
    ax = axes_of(ax, 6.0, 0.9 + 0.24 * len(keys))
    y = np.arange(len(keys))
    ax.barh(y, alpha / shown.concentration, color=[category_colour(shown.taxonomy, k) for k in keys], height=0.72)
    ax.hlines(y, betaincinv(alpha, rest, 0.05), betaincinv(alpha, rest, 0.95), color=INK, linewidth=1.2)
    ax.set(yticks=y, yticklabels=[name_of(shown.taxonomy, k) for k in keys], xlim=(0, 1), xlabel="expected weight, with its central 90 % interval")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    low, high = distribution.risk_interval
    ax.set_title(f"risk {distribution.risk:.2f}, 90 % interval {low:.2f} to {high:.2f}")
    return ax


@styled
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

    ax = axes_of(ax, 3.9, 3.5)
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
        name = name_of(taxonomy, key) if taxonomy else key
        ax.annotate(name, corner, (0, 6 * way), textcoords="offset points", ha="center" if way > 0 else ha, va=va, fontsize=8)
    ax.set(xlim=(-0.3, 1.3), ylim=(-0.12, 0.98), aspect="equal")
    ax.set_axis_off()
    ax.set_title(f"alpha = ({', '.join(f'{a:.3g}' for a in alpha)})")
    return ax


# -------------------------------------------------------------------- labelled prompts


@styled
def leaf_counts(prompts: Sequence[Prompt], taxonomy: Taxonomy, level: str = "leaf", *, ax: Axes | None = None) -> Axes:
    """Number of prompts of each leaf or category, stacked by split; a prompt with several labels counts in each of them."""
    keys = list(taxonomy.keys if level == "leaf" else taxonomy.category_keys)
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    for prompt in prompts:
        counts.setdefault(prompt.split or "no split", Counter()).update(memberships(prompt, taxonomy, level))
    counts = {split: c for split, c in counts.items() if c}
    ax = axes_of(ax, 6.0, 1.1 + 0.24 * len(keys))
    y, left = np.arange(len(keys)), np.zeros(len(keys))
    opacities = np.linspace(1.0, 0.3, max(len(counts), 2))
    for (split, counter), opacity in zip(counts.items(), opacities, strict=False):
        values = np.array([counter[k] for k in keys])
        ax.barh(y, values, left=left, color=[category_colour(taxonomy, k) for k in keys], alpha=opacity, height=0.75, label=split)
        left += values
    ax.set(yticks=y, yticklabels=[name_of(taxonomy, k) for k in keys], xlabel="prompts")
    ax.invert_yaxis()
    ax.grid(visible=False, axis="y")
    handles = [Patch(color=GREY, alpha=a, label=s) for s, a in zip(counts, opacities, strict=False)]
    ax.legend(handles=handles, loc="lower right")
    return ax


@styled
def prompt_lengths(prompts: Sequence[Prompt], taxonomy: Taxonomy, *, ax: Axes | None = None) -> Axes:
    """Words in a prompt by category, as boxes over the quartiles with whiskers from the 5th to the 95th percentile; logarithmic."""
    words: dict[str, list[int]] = {key: [] for key in taxonomy.category_keys}
    for prompt in prompts:
        for key in memberships(prompt, taxonomy, "category"):
            words[key].append(len(prompt.text.split()))
    words = {key: values for key, values in words.items() if values}
    ax = axes_of(ax, 6.0, 0.9 + 0.32 * len(words))
    frame = pd.DataFrame([(name_of(taxonomy, key), n, key) for key, values in words.items() for n in values], columns=["category", "words", "key"])
    palette = {name_of(taxonomy, key): category_colour(taxonomy, key) for key in words}
    sns.boxplot(
        frame, x="words", y="category", hue="category", palette=palette, legend=False, log_scale=True, whis=(5, 95), showfliers=False, saturation=1, ax=ax
    )
    ax.set(xlabel="words in a prompt", ylabel="")
    ax.xaxis.set_major_locator(FixedLocator([1, 2, 5, 10, 20, 50, 100, 200, 500, 1000]))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    return ax


@styled
def cooccurrence(prompts: Sequence[Prompt], taxonomy: Taxonomy, level: str = "leaf", *, ax: Axes | None = None) -> Axes:
    """How often two leaves or categories are labels of one prompt: the lower triangle, with empty cells where they never meet."""
    keys = [k for k in (taxonomy.keys if level == "leaf" else taxonomy.category_keys) if k != BENIGN]
    applies = np.array([[float(memberships(p, taxonomy, level).get(k, 0.0) == 1.0) for k in keys] for p in prompts if not p.benign]).reshape(-1, len(keys))
    return _triangle(applies.T @ applies, [name_of(taxonomy, k) for k in keys], ".0f", ax)


@styled
def disagreement_map(moved: Float[np.ndarray, "k1 k1"], taxonomy: Taxonomy, *, minimum: float = 0.05, ax: Axes | None = None) -> Axes:
    """Between which leaves annotators move mass (`lance.companions.disagreement`), in percentage points a prompt; smaller shares than `minimum` stay empty."""
    points = 100 * moved
    return _triangle(np.where(points >= minimum, points, 0.0), [name_of(taxonomy, k) for k in taxonomy.keys], ".1f", ax)


def _triangle(values: np.ndarray, names: Sequence[str], fmt: str, ax: Axes | None) -> Axes:
    """The lower triangle of a symmetric table as a heat map with its numbers; zeros are left empty."""
    ax = axes_of(ax, 2.4 + 0.3 * len(names), 1.9 + 0.26 * len(names))
    frame = pd.DataFrame(np.tril(values, -1), index=pd.Index(names), columns=pd.Index(names)).iloc[1:, :-1]
    cmap = sns.light_palette("#0072B2", as_cmap=True)
    sns.heatmap(frame, mask=frame.to_numpy() == 0, annot=True, fmt=fmt, annot_kws={"size": 7}, cmap=cmap, cbar=False, linewidths=0.5, square=False, ax=ax)
    ax.grid(visible=False)
    return ax


@styled
def twin_map(points: Float[np.ndarray, "n 2"], prompts: Sequence[Prompt], taxonomy: Taxonomy, level: str = "category", *, ax: Axes | None = None) -> Axes:
    """Prompts in the plane (say, t-SNE of their embeddings), coloured by their first label at the level; benign ones are rings. Lines join twins."""
    if points.shape != (len(prompts), 2):
        raise ValueError(f"expected points of shape ({len(prompts)}, 2), one a prompt; found {points.shape}")
    keys = [BENIGN if p.benign else next(iter(memberships(p, taxonomy, level))) for p in prompts]
    row = {p.id: i for i, p in enumerate(prompts) if p.id}
    pairs = {tuple(sorted((i, row[p.twin]))) for i, p in enumerate(prompts) if p.twin in row}
    ax = axes_of(ax, 6.4, 5.2)
    ax.add_collection(LineCollection([points[list(pair)] for pair in sorted(pairs)], colors=PALE, linewidths=0.7, zorder=1))
    size = float(np.clip(4000 / max(len(prompts), 1), 3, 12))
    for key in taxonomy.category_keys if level == "category" else taxonomy.keys:
        chosen = np.array([k == key for k in keys])
        if chosen.any():
            ring = key == BENIGN  # a ring stays visible around the dot of a twin
            colour = category_colour(taxonomy, key) if level == "category" or ring else leaf_colour(taxonomy, key)
            shape: dict[str, Any] = {"s": size, "color": [colour], "linewidths": 0}
            if ring:
                shape = {"s": 2.2 * size, "facecolors": "none", "edgecolors": colour, "linewidths": 0.6}
            ax.scatter(points[chosen, 0], points[chosen, 1], label=name_of(taxonomy, key), zorder=3 if ring else 2, **shape)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    ax.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), markerscale=1.5)
    return ax
