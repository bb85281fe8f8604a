"""Figures of measures: by category, by size of the training set, over epochs, calibration and risks."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import seaborn as sns
from jaxtyping import Bool, Float, Int
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

from lance.metrics import expected_calibration_error, risk_coverage
from lance.plots.base import CONTRAST, GREY, INK, MARKERS, PALE, axes_of, category_colour, name_of, styled
from lance.taxonomy import Taxonomy

TERM_NAMES = {
    "objective": "objective",
    "label": "label term",
    "pair": "pair term",
    "reconstruction": "reconstruction",
    "kl_d": "KL of d",
    "kl_z": "KL of z",
    "concentration": "concentration A",
    "active_units": "active units of z",
    "anchor_distance": "distance of b from the anchors",
    "mean_spread": "spread of the posterior means",
}


# ---------------------------------------------------------------------------- measures


@styled
def measure_by_category(figures: pd.DataFrame, taxonomy: Taxonomy, *, label: str, ax: Axes | None = None) -> Axes:
    """A measure by category and source as points with intervals: colour is the category, the marker is the source.

    `figures` has one row a point with the columns category (key), source, value, low, high.
    """
    present = set(figures["category"])
    keys = [k for k in taxonomy.category_keys if k in present] + sorted(present - set(taxonomy.category_keys))
    sources = list(dict.fromkeys(figures["source"]))
    ax = axes_of(ax, 6.4, 0.9 + 0.2 * len(keys) * max(2, len(sources)))
    offsets = (np.arange(len(sources)) - (len(sources) - 1) / 2) * 0.24
    for source, offset, marker in zip(sources, offsets, MARKERS * len(sources), strict=False):
        part = figures[figures["source"] == source].set_index("category")
        for y, key in enumerate(keys):
            if key in part.index:
                value, low, high = (float(part[c][key]) for c in ("value", "low", "high"))
                colour = category_colour(taxonomy, key)
                ax.hlines(y + offset, low, high, color=colour, linewidth=1.4)
                ax.plot([value], [y + offset], marker=marker, color=colour, linestyle="none", label=f"{source}: {key}")
    ax.set(yticks=range(len(keys)), yticklabels=[name_of(taxonomy, k) for k in keys], xlabel=label, ylim=(len(keys) - 0.5, -0.5))
    ax.set_xlim(left=min(0.0, float(figures["low"].min())))
    ax.grid(visible=False, axis="y")
    handles = [Line2D([], [], marker=m, color=GREY, linestyle="none", label=s) for s, m in zip(sources, MARKERS * len(sources), strict=False)]
    ax.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(3, len(sources)))
    return ax


@styled
def opening_shares(figures: pd.DataFrame, taxonomy: Taxonomy, *, ax: Axes | None = None) -> Axes:
    """Share of answers that open with a phrase of refusal, by category and source; columns as in `measure_by_category`."""
    ax = measure_by_category(figures, taxonomy, label="share of answers that open with a phrase of refusal", ax=ax)
    ax.set_xlim(-0.02, 1.02)
    return ax


@styled
def compliance_rates(rates: pd.DataFrame, taxonomy: Taxonomy, *, ax: Axes | None = None) -> Axes:
    """Published compliance rates in percent: one row a model; columns are category keys and, for prompts that should be answered, `contrast`."""
    ax = axes_of(ax, 6.4, 1.3 + 0.34 * len(rates))
    y = np.arange(len(rates))
    ax.hlines(y, rates.min(axis=1), rates.max(axis=1), color="#DDDDDD", linewidth=1)
    for column, marker in zip(rates.columns, MARKERS * len(rates.columns), strict=False):
        name = "Contrast prompts (to be answered)" if column == "contrast" else name_of(taxonomy, column)
        ax.plot(rates[column], y, marker=marker, markersize=6, color=category_colour(taxonomy, column), linestyle="none", label=name)
    ax.set(yticks=y, yticklabels=list(rates.index), xlim=(-3, 103), xlabel="prompts complied with, %", ylim=(len(rates) - 0.5, -0.5))
    ax.grid(visible=False, axis="y")
    ax.legend(loc="lower center", bbox_to_anchor=(0.4, 1.0), ncols=2)
    return ax


@styled
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
    ax = axes_of(ax, 5.6, 3.2)
    for term in terms:
        ax.plot(frame["epoch"], frame[term], marker="o", markersize=2.5, label=TERM_NAMES.get(term, term))
    ax.set(xlabel="epoch", ylabel=label)
    ax.legend()
    return ax


@styled
def learning_curve(figures: pd.DataFrame, *, measure: str, label: str, ax: Axes | None = None) -> Axes:
    """A measure against the size of the training set: one line a model, points for seeds, a band from the lowest to the highest.

    `figures` has the columns `model`, `rows`, `seed` and the measure.
    """
    ax = axes_of(ax, 5.4, 3.4)
    for (model, frame), colour, marker in zip(figures.groupby("model", sort=False), CONTRAST, MARKERS, strict=False):
        by_size = frame.groupby("rows")[measure].agg(["mean", "min", "max"])
        ax.plot(by_size.index, by_size["mean"], marker=marker, markersize=4, color=colour, label=str(model))
        ax.fill_between(by_size.index, by_size["min"], by_size["max"], color=colour, alpha=0.18, linewidth=0)
    sizes = sorted(figures["rows"].unique())
    ax.set(xscale="log", xlabel="training prompts", ylabel=label)
    ax.xaxis.set_major_locator(FixedLocator(sizes))
    ax.xaxis.set_major_formatter(ScalarFormatter())
    ax.xaxis.set_minor_locator(NullLocator())
    ax.legend(loc="lower right")
    return ax


@styled
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
        ax = axes_of(None, 3.9, 3.7)
    if not ax.lines:
        ax.plot([0, 1], [0, 1], color=PALE, linestyle="--", linewidth=1)
    error = expected_calibration_error(confidence, hit, bins)
    text = f"{label}, ECE {error:.3f}" if label else f"ECE {error:.3f}"
    ax.plot([confidence[b].mean() for b in parts], [hit[b].mean() for b in parts], marker="o", label=text)
    ax.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="confidence", ylabel="accuracy", aspect="equal")
    ax.legend(loc="upper left")
    return ax


@styled
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
    ax = axes_of(ax, 6.0, 3.2)
    colours = [category_colour(taxonomy, k) for k in groups]
    ax.hist(list(groups.values()), bins=np.linspace(0, 1, bins + 1).tolist(), stacked=True, color=colours, label=[name_of(taxonomy, k) for k in groups])
    if threshold is not None:
        ax.axvline(threshold, color=INK, linestyle="--", linewidth=1.2, label=f"threshold {threshold:.2f}")
    ax.set(xlim=(0, 1), xlabel="risk", ylabel="prompts")
    ax.legend(loc="upper center", bbox_to_anchor=(0.5, 1.3), ncols=3)
    return ax


@styled
def risk_coverage_curve(confidence: Float[np.ndarray, " n"], hit: Bool[np.ndarray, " n"], *, label: str = "", ax: Axes | None = None) -> Axes:
    """Error rate among the most confident predictions against their share; the legend gives the mean (AURC). Call it again on the same Axes to compare."""
    coverage, error = risk_coverage(confidence, hit)
    ax = axes_of(ax, 4.6, 3.2)
    ax.plot(coverage, error, label=f"{label}, AURC {error.mean():.3f}" if label else f"AURC {error.mean():.3f}")
    drawn = [np.asarray(line.get_ydata(), dtype=np.float64) for line in ax.lines]
    top = max(float(y[len(y) // 20 :].max()) for y in drawn)  # the first few predictions are noise
    ax.set(xlim=(0, 1), ylim=(0, 1.08 * top + 1e-3), xlabel="coverage: share of prompts that get a prediction", ylabel="error rate among them")
    ax.legend(loc="lower right")
    return ax


@styled
def mean_distributions(means: Float[np.ndarray, "n k1"], keys: Sequence[str], taxonomy: Taxonomy, *, ax: Axes | None = None) -> Axes:
    """Heat map of mean distributions: a row for each true leaf (or benign), a column for each coordinate; numbers are percentages from 5 up.

    `keys` has the true leaf of each prompt, or `benign`.
    """
    if len(means) != len(keys):
        raise ValueError(f"expected one key a row, found {len(keys)} keys for {len(means)} rows")
    present = [k for k in taxonomy.keys if k in set(keys)]
    given = np.array(keys)
    table = np.stack([means[given == k].mean(0) for k in present])
    rows = [f"{name_of(taxonomy, k)} ({int((given == k).sum())})" for k in present]
    frame = pd.DataFrame(100 * table, index=pd.Index(rows), columns=pd.Index([name_of(taxonomy, k) for k in taxonomy.keys]))
    ax = axes_of(ax, 3.2 + 0.36 * len(taxonomy.keys), 2.0 + 0.27 * len(present))
    text = frame.map(lambda v: f"{v:.0f}" if v >= 5 else "")
    cmap = sns.light_palette("#0072B2", as_cmap=True)
    sns.heatmap(frame, annot=text, fmt="", annot_kws={"size": 7}, cmap=cmap, vmin=0, vmax=100, cbar=False, linewidths=0.5, ax=ax)
    ax.grid(visible=False)
    return ax
