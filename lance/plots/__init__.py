"""Figures, one function each: it takes `ax=None`, draws on that Axes or on a new one, and returns it.

Colours come from the taxonomy: a mark that stands for a category, or for a leaf below it, has the colour of that category in every figure. The style file is
applied inside each function and leaves the user's settings alone; for a figure with several axes, make them under `with plots.style():`.
"""

from lance.plots.base import GREY, INK, PALE, category_colour, leaf_colour, memberships, style
from lance.plots.measures import (
    compliance_rates,
    learning_curve,
    mean_distributions,
    measure_by_category,
    opening_shares,
    reliability_diagram,
    risk_coverage_curve,
    risk_histogram,
    training_curves,
)
from lance.plots.prompts import cooccurrence, dirichlet_simplex, disagreement_map, distribution_bars, leaf_counts, prompt_lengths, twin_map

__all__ = [
    "GREY",
    "INK",
    "PALE",
    "category_colour",
    "compliance_rates",
    "cooccurrence",
    "dirichlet_simplex",
    "disagreement_map",
    "distribution_bars",
    "leaf_colour",
    "leaf_counts",
    "learning_curve",
    "mean_distributions",
    "measure_by_category",
    "memberships",
    "opening_shares",
    "prompt_lengths",
    "reliability_diagram",
    "risk_coverage_curve",
    "risk_histogram",
    "style",
    "training_curves",
    "twin_map",
]
