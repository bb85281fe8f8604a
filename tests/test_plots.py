"""The data behind each figure, not its pixels."""

import matplotlib

matplotlib.use("Agg")

import inspect

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection, PathCollection, PolyCollection, QuadMesh
from matplotlib.colors import to_hex, to_rgb
from matplotlib.contour import ContourSet
from scipy.stats import dirichlet

from lance import plots
from lance.corpus import Prompt
from lance.distribution import RejectionDistribution
from lance.metrics import expected_calibration_error
from lance.taxonomy import Taxonomy


@pytest.fixture(autouse=True)
def close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def taxonomy() -> Taxonomy:
    return Taxonomy.builtin()


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    return [
        Prompt("a b", id="1", split="train", twin="2", labels=("privacy",)),
        Prompt("a b c", id="2", split="train", twin="1"),
        Prompt("a b c d", id="3", split="test", labels=("privacy", "input_modality")),
        Prompt("e f", id="4", split="test", labels=("privacy", "input_modality", "copyright")),
        Prompt("g h i", id="5", split="validation", labels=("humanizing",)),
        Prompt("j", id="6", split="validation", twin="7"),
    ]


@pytest.fixture(scope="module")
def distribution(taxonomy: Taxonomy) -> RejectionDistribution:
    alpha = np.random.default_rng(0).gamma(0.6, 3.0, len(taxonomy) + 1) + 0.05
    return RejectionDistribution(taxonomy.keys, alpha, taxonomy)


def bar_widths(ax: Axes) -> list[float]:
    return [p.get_width() for p in ax.patches]


def tick_names(ax: Axes) -> list[str]:
    return [t.get_text() for t in ax.get_yticklabels()]


def segments(ax: Axes) -> np.ndarray:
    return np.concatenate([np.array(c.get_segments()) for c in ax.collections if isinstance(c, LineCollection)])


def figures_frame() -> pd.DataFrame:
    rows = [("safety", "model", 0.6, 0.5, 0.7), ("safety", "replies", 0.1, 0.0, 0.2), ("humanizing", "model", 0.3, 0.2, 0.4)]
    return pd.DataFrame(rows, columns=["category", "source", "value", "low", "high"])


def curve_frame() -> pd.DataFrame:
    rows = [("a", 10, 0, 0.5), ("a", 10, 1, 0.7), ("a", 100, 0, 0.8), ("b", 10, 0, 0.4), ("b", 100, 0, 0.6), ("b", 100, 1, 0.9)]
    return pd.DataFrame(rows, columns=["model", "rows", "seed", "auroc"])


# ------------------------------------------------------------------- every figure


def every_figure(taxonomy: Taxonomy, prompts: list[Prompt], distribution: RejectionDistribution):
    rates = pd.DataFrame({"safety": [11.4], "contrast": [97.4]}, index=["a model"])
    history = [{"epoch": 1, "label": -2.0, "kl_d": 1.0, "kl_z": 0.5}, {"epoch": 2, "label": -1.0, "kl_d": 2.0, "kl_z": 0.4}]
    conf = np.linspace(0.1, 0.9, 30)
    return {
        "distribution_bars": lambda **k: plots.distribution_bars(distribution, **k),
        "dirichlet_simplex": lambda **k: plots.dirichlet_simplex((3.0, 2.0, 4.0), **k),
        "leaf_counts": lambda **k: plots.leaf_counts(prompts, taxonomy, **k),
        "prompt_lengths": lambda **k: plots.prompt_lengths(prompts, taxonomy, **k),
        "cooccurrence": lambda **k: plots.cooccurrence(prompts, taxonomy, **k),
        "disagreement_map": lambda **k: plots.disagreement_map(np.full((len(taxonomy) + 1,) * 2, 0.01), taxonomy, **k),
        "twin_map": lambda **k: plots.twin_map(np.eye(6)[:, :2], prompts, taxonomy, **k),
        "measure_by_category": lambda **k: plots.measure_by_category(figures_frame(), taxonomy, label="a measure", **k),
        "opening_shares": lambda **k: plots.opening_shares(figures_frame(), taxonomy, **k),
        "compliance_rates": lambda **k: plots.compliance_rates(rates, taxonomy, **k),
        "training_curves": lambda **k: plots.training_curves(history, **k),
        "learning_curve": lambda **k: plots.learning_curve(curve_frame(), measure="auroc", label="AUROC", **k),
        "reliability_diagram": lambda **k: plots.reliability_diagram(conf, conf > 0.5, **k),
        "risk_coverage_curve": lambda **k: plots.risk_coverage_curve(conf, conf > 0.5, **k),
        "mean_distributions": lambda **k: plots.mean_distributions(
            np.full((2, len(taxonomy.keys)), 1 / len(taxonomy.keys)), ["benign", "privacy"], taxonomy, **k
        ),
        "risk_histogram": lambda **k: plots.risk_histogram([0.1, 0.9], ["benign", "privacy"], taxonomy, **k),
    }


def test_every_figure_draws_on_the_axes_it_is_given_and_leaves_settings_alone(taxonomy, prompts, distribution):
    before = dict(plt.rcParams)
    figures = every_figure(taxonomy, prompts, distribution)
    for name, draw in figures.items():
        own = plt.figure().add_subplot()
        assert draw(ax=own) is own, name
        assert own.has_data(), name
        made = draw()
        assert isinstance(made, Axes) and made is not own, name
        plt.close("all")
    assert dict(plt.rcParams) == before


def test_every_drawing_function_is_covered_and_takes_ax(taxonomy, prompts, distribution):
    drawing = {
        n for n, f in inspect.getmembers(plots, inspect.isfunction) if f.__module__.startswith(plots.__name__) and "ax" in inspect.signature(f).parameters
    }
    public = {n for n in drawing if not n.startswith("_")}
    assert public == set(every_figure(taxonomy, prompts, distribution))
    assert all(inspect.signature(getattr(plots, n)).parameters["ax"].default is None for n in public)


def test_style_applies_inside_the_context_only():
    outside = plt.rcParams["axes.spines.top"]
    with plots.style():
        assert plt.rcParams["axes.spines.top"] is False
    assert plt.rcParams["axes.spines.top"] == outside


def test_style_keeps_interactive_mode_when_a_backend_switches_it_on():
    with matplotlib.rc_context():
        plt.interactive(False)
        with plots.style():
            plt.interactive(True)
        assert plt.isinteractive()


# ------------------------------------------------------------------------ colours


def test_a_leaf_has_the_colour_of_its_category(taxonomy):
    for leaf in taxonomy.leaves:
        assert plots.category_colour(taxonomy, leaf.key) == taxonomy[leaf.parent].colour
    flat = Taxonomy.builtin("beavertails")
    assert [plots.category_colour(flat, leaf.key) for leaf in flat.leaves] == [c.colour for c in flat.categories]
    assert plots.category_colour(taxonomy, "contrast") == taxonomy.benign.colour


# -------------------------------------------------------------------- memberships


def test_memberships(taxonomy, prompts):
    assert plots.memberships(prompts[1], taxonomy) == {"benign": 1.0}
    assert plots.memberships(prompts[2], taxonomy) == {"privacy": 1.0, "input_modality": 1.0}
    assert plots.memberships(prompts[3], taxonomy, "category") == {"safety": 1.0, "unsupported": 1.0}
    assert plots.memberships(prompts[4], taxonomy) == {"personal_inquiry": 0.5, "advice_or_opinion": 0.5}
    assert plots.memberships(prompts[4], taxonomy, "category") == {"humanizing": pytest.approx(1.0)}
    unsafe = plots.memberships(Prompt("x", labels=("unsafe",)), taxonomy)
    assert sum(unsafe.values()) == pytest.approx(1.0) and len(unsafe) == len(taxonomy)
    with pytest.raises(ValueError, match="'leaf' or 'category'"):
        plots.memberships(prompts[0], taxonomy, "top")


# --------------------------------------------------------------------- one prompt


@pytest.mark.parametrize("level", ["leaf", "category"])
def test_distribution_bars_show_means_and_intervals(distribution, taxonomy, level):
    ax = plots.distribution_bars(distribution, level)
    shown = distribution.by(level)
    assert bar_widths(ax) == pytest.approx(list(shown.mean.values()))
    assert tick_names(ax) == [taxonomy[k].name for k in shown.keys]
    assert [to_hex(p.get_facecolor()).upper() for p in ax.patches] == [plots.category_colour(taxonomy, k) for k in shown.keys]
    draws = np.random.default_rng(1).dirichlet(shown.alpha, 40_000)
    for k, segment in enumerate(segments(ax)):
        assert segment[:, 0] == pytest.approx(np.quantile(draws[:, k], [0.05, 0.95]), abs=0.01)
    assert f"risk {distribution.risk:.2f}" in ax.get_title(loc="left")


def test_distribution_bars_leave_out_small_coordinates(distribution):
    ax = plots.distribution_bars(distribution, minimum=0.05)
    assert bar_widths(ax) == pytest.approx([m for m in distribution.mean.values() if m >= 0.05])


@settings(max_examples=15, deadline=None)
@given(st.tuples(*[st.floats(1.5, 40)] * 3))
def test_simplex_contours_enclose_their_masses(alpha):
    ax = plots.dirichlet_simplex(alpha, masses=(0.5, 0.9))
    filled = next(c for c in ax.collections if isinstance(c, ContourSet) and c.filled)
    draws = np.clip(np.random.default_rng(0).dirichlet(alpha, 4000), 1e-9, None)
    density = dirichlet.pdf((draws / draws.sum(1, keepdims=True)).T, alpha)
    weights = np.array([[i, j, 160 - i - j] for i in range(161) for j in range(161 - i)]) + 0.5
    top = dirichlet.pdf((weights / weights.sum(1, keepdims=True)).T, alpha).max()
    found = [(density / top >= level).mean() for level in filled.levels[:-1]]
    assert sorted(found, reverse=True) == pytest.approx([0.9, 0.5], abs=0.06)
    plt.close("all")


def test_simplex_mean_and_corners(taxonomy):
    ax = plots.dirichlet_simplex((6.0, 3.0, 1.0), ("benign", "privacy", "subjective"), taxonomy)
    mean = next(line for line in ax.lines if line.get_label() == "mean")
    expected = 0.6 * np.array([0, 0]) + 0.3 * np.array([1, 0]) + 0.1 * np.array([0.5, np.sqrt(3) / 2])
    assert np.ravel(mean.get_xydata()) == pytest.approx(expected)
    assert [t.get_text() for t in ax.texts] == ["Benign", "Privacy", "Subjective"]
    assert [line.get_color() for line in ax.lines[1:]] == [plots.category_colour(taxonomy, k) for k in ("benign", "privacy", "subjective")]


@pytest.mark.parametrize("alpha", [(1.0, 1.0, 1.0), (0.05, 0.05, 0.05), (200.0, 200.0, 200.0), (0.05, 200.0, 1.0)])
def test_simplex_draws_extreme_concentrations(alpha):
    plots.dirichlet_simplex(alpha).figure.canvas.draw()


@pytest.mark.parametrize("alpha", [(1.0, 2.0), (1.0, 0.0, 2.0), (1.0, -1.0, 2.0)])
def test_simplex_refuses_other_than_three_positive_concentrations(alpha):
    with pytest.raises(ValueError, match="three concentrations"):
        plots.dirichlet_simplex(alpha)


# ---------------------------------------------------------------- labelled prompts


def test_leaf_counts_stack_the_splits(taxonomy, prompts):
    ax = plots.leaf_counts(prompts, taxonomy)
    widths = np.array(bar_widths(ax)).reshape(3, -1)
    by_key = dict(zip(taxonomy.keys, widths.T.tolist(), strict=True))
    assert by_key["privacy"] == [1, 0, 2]
    assert by_key["benign"] == [1, 1, 0]
    assert by_key["personal_inquiry"] == [0, 0.5, 0]
    assert widths.sum() == pytest.approx(1 + 1 + 2 + 3 + 1 + 1)
    ends = [p.get_x() + p.get_width() for p in ax.patches][-len(taxonomy.keys) :]
    assert ends == pytest.approx(widths.sum(0).tolist())
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["train", "validation", "test"]


def test_leaf_counts_by_category_count_a_prompt_once(taxonomy, prompts):
    widths = np.array(bar_widths(plots.leaf_counts(prompts, taxonomy, "category"))).reshape(3, -1).sum(0)
    assert dict(zip(taxonomy.category_keys, widths.tolist(), strict=True)) == pytest.approx(
        {"benign": 2, "incomplete": 0, "unsupported": 2, "indeterminate": 0, "humanizing": 1, "safety": 3}
    )


def test_leaf_counts_name_rows_without_split(taxonomy):
    ax = plots.leaf_counts([Prompt("a", labels=("privacy",))], taxonomy)
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["no split"]


def test_prompt_lengths_have_one_box_for_each_category_present(taxonomy, prompts):
    ax = plots.prompt_lengths(prompts, taxonomy)
    assert tick_names(ax) == [taxonomy[k].name for k in ("benign", "unsupported", "humanizing", "safety")]
    assert ax.get_xscale() == "log"


LEAF_PAIRS = {("Input modality", "Privacy"): 2, ("Privacy", "Copyright"): 1, ("Input modality", "Copyright"): 1}
CATEGORY_PAIRS = {("Unsupported requests", "Requests with safety concerns"): 2}


@pytest.mark.parametrize(("level", "expected"), [("leaf", LEAF_PAIRS), ("category", CATEGORY_PAIRS)])
def test_cooccurrence_counts_pairs_once(taxonomy, prompts, level, expected):
    ax = plots.cooccurrence(prompts, taxonomy, level)
    values = next(c for c in ax.collections if isinstance(c, QuadMesh)).get_array()
    n = len(taxonomy) if level == "leaf" else len(taxonomy.categories)
    assert values.shape == (n - 1, n - 1)
    columns, rows = [t.get_text() for t in ax.get_xticklabels()], tick_names(ax)
    found = {(columns[j], rows[i]): float(values[i, j]) for i, j in zip(*np.nonzero(~np.ma.getmaskarray(values)), strict=True)}
    assert found == expected


def test_the_disagreement_map_shows_percentage_points_and_leaves_small_shares_out(taxonomy):
    moved = np.zeros((len(taxonomy) + 1,) * 2)
    moved[0, 2] = moved[2, 0] = 0.012
    moved[1, 2] = moved[2, 1] = 0.0002
    ax = plots.disagreement_map(moved, taxonomy)
    values = next(c for c in ax.collections if isinstance(c, QuadMesh)).get_array()
    (found,) = zip(*np.nonzero(~np.ma.getmaskarray(values)), strict=True)
    columns, rows = [t.get_text() for t in ax.get_xticklabels()], tick_names(ax)
    assert (columns[found[1]], rows[found[0]]) == ("Benign", taxonomy[taxonomy.keys[2]].name)
    assert values[found] == pytest.approx(1.2)


def test_twin_map_by_leaf_shades_the_colour_of_the_category(taxonomy, prompts):
    ax = plots.twin_map(np.arange(12.0).reshape(6, 2), prompts, taxonomy, "leaf")
    named = {c.get_label() for c in ax.collections if isinstance(c, PathCollection)}
    leaves = {p.labels[0] for p in prompts if p.labels} & set(taxonomy.keys)
    assert {taxonomy[k].name for k in leaves} <= named
    for category in taxonomy.categories:
        own = [tuple(np.round(to_rgb(plots.leaf_colour(taxonomy, k)), 3)) for k in taxonomy.leaves_of(category.key)]
        assert len(set(own)) == len(own)
        assert [sum(c) for c in own] == sorted(sum(c) for c in own), "from dark to pale"
    flat = Taxonomy.builtin("beavertails")
    assert {plots.leaf_colour(flat, k.key) for k in flat.leaves} == {k.colour for k in flat.leaves}


def test_the_learning_curve_draws_means_and_the_range_over_seeds():
    ax = plots.learning_curve(curve_frame(), measure="auroc", label="AUROC")
    lines = {line.get_label(): line.get_xydata().tolist() for line in ax.lines}
    assert lines["a"] == [[10, pytest.approx(0.6)], [100, 0.8]]
    assert lines["b"] == [[10, 0.4], [100, pytest.approx(0.75)]]
    band = next(c for c in ax.collections if isinstance(c, PolyCollection)).get_paths()[0].vertices
    assert {tuple(v) for v in band if v[0] == 10} == {(10, 0.5), (10, 0.7)}
    assert ax.get_xscale() == "log"


def test_twin_map_joins_each_pair_once(taxonomy, prompts):
    points = np.arange(12.0).reshape(6, 2)
    ax = plots.twin_map(points, prompts, taxonomy)
    assert segments(ax).tolist() == [points[:2].tolist()]  # the twin of prompt 6 is not among them
    clouds = {c.get_label(): c for c in ax.collections if isinstance(c, PathCollection)}
    assert clouds["Benign"].get_offsets().tolist() == points[[1, 5]].tolist()
    assert to_hex(clouds["Benign"].get_edgecolor()[0]).upper() == taxonomy.benign.colour
    assert len(clouds["Requests with safety concerns"].get_offsets()) == 3  # by the first label
    with pytest.raises(ValueError, match=r"shape \(6, 2\)"):
        plots.twin_map(points[:5], prompts, taxonomy)


# ------------------------------------------------------------------------ measures


def test_measures_are_points_with_intervals(taxonomy):
    ax = plots.opening_shares(figures_frame(), taxonomy)
    points = {line.get_label(): (line.get_xdata()[0], line.get_color()) for line in ax.lines}
    assert points["model: safety"] == (0.6, taxonomy["safety"].colour)
    assert points["replies: safety"][0] == 0.1 and points["model: humanizing"][0] == 0.3
    assert tick_names(ax) == ["Humanizing requests", "Requests with safety concerns"]  # in the order of the taxonomy
    spans = {(round(s[0, 0], 6), round(s[1, 0], 6)) for s in segments(ax)}
    assert spans == {(0.5, 0.7), (0.0, 0.2), (0.2, 0.4)}
    assert len({round(s[0, 1], 3) for s in segments(ax)}) == 3  # no two on one line
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["model", "replies"]


def test_measures_keep_rows_that_are_no_category(taxonomy):
    frame = pd.DataFrame([("all", "model", 0.5, 0.4, 0.6), ("safety", "model", 0.6, 0.5, 0.7)], columns=["category", "source", "value", "low", "high"])
    assert tick_names(plots.measure_by_category(frame, taxonomy, label="x")) == ["Requests with safety concerns", "all"]


def test_compliance_rates(taxonomy):
    rates = pd.DataFrame({"safety": [11.4, 12.7], "contrast": [97.4, 98.4]}, index=["GPT-4", "GPT-4o"])
    ax = plots.compliance_rates(rates, taxonomy)
    assert [line.get_xdata().tolist() for line in ax.lines] == [[11.4, 12.7], [97.4, 98.4]]
    assert [line.get_color() for line in ax.lines] == [taxonomy["safety"].colour, taxonomy.benign.colour]
    assert tick_names(ax) == ["GPT-4", "GPT-4o"]


def test_training_curves():
    history = [{"epoch": e, "label": -1.0 / e, "kl_d": float(e)} for e in (1, 2, 3)]
    ax = plots.training_curves(history, ("label", "kl_d"))
    assert [line.get_ydata().tolist() for line in ax.lines] == [[-1.0, -0.5, -1 / 3], [1.0, 2.0, 3.0]]
    with pytest.raises(ValueError, match="no 'kl_z'"):
        plots.training_curves(history)


def test_reliability_diagram_has_bins_of_equal_mass_and_the_error():
    rng = np.random.default_rng(0)
    confidence = rng.random(300)
    hit = rng.random(300) < confidence
    ax = plots.reliability_diagram(confidence, hit, label="before")
    plots.reliability_diagram(confidence**2, hit, label="after", ax=ax)
    diagonal, before, after = ax.lines
    assert np.asarray(diagonal.get_xydata()).tolist() == [[0, 0], [1, 1]]
    x, y = before.get_data()
    assert len(x) == 15 and np.all(np.diff(x) > 0)
    assert np.abs(x - y).mean() == pytest.approx(expected_calibration_error(confidence, hit.astype(float)))  # bins of equal mass weigh the same
    assert after.get_label() == f"after, ECE {expected_calibration_error(confidence**2, hit.astype(float)):.3f}"


def test_risk_histogram_stacks_categories(taxonomy):
    keys = ["benign", "privacy", "safety", "benign"]
    ax = plots.risk_histogram([0.05, 0.95, 0.92, 0.5], keys, taxonomy, threshold=0.6, bins=10)
    counts = {c.patches[0].get_label(): [p.get_height() for p in c.patches] for c in ax.containers}
    assert counts["Benign"] == [1, 0, 0, 0, 0, 1, 0, 0, 0, 0]
    assert counts["Requests with safety concerns"] == [0] * 9 + [2]  # a leaf counts for its category
    assert ax.lines[0].get_xdata()[0] == 0.6
    with pytest.raises(ValueError, match="one key a risk"):
        plots.risk_histogram([0.1], keys, taxonomy)


def test_risk_coverage_curve_shows_the_error_rate_of_the_most_confident():
    ax = plots.risk_coverage_curve(np.array([0.9, 0.8, 0.7, 0.6]), np.array([True, True, False, True]), label="all")
    x, y = ax.lines[0].get_data()
    assert list(x) == [0.25, 0.5, 0.75, 1.0]
    assert list(y) == pytest.approx([0, 0, 1 / 3, 0.25])
    assert "AURC 0.146" in ax.get_legend().get_texts()[0].get_text()


def test_mean_distributions_are_averaged_by_true_leaf(taxonomy):
    n = len(taxonomy.keys)
    means = np.full((3, n), 0.0)
    means[0, 0], means[1, taxonomy.index("privacy")], means[2, 0] = 1.0, 1.0, 1.0
    ax = plots.mean_distributions(means, ["benign", "privacy", "privacy"], taxonomy)
    values = np.asarray(next(c for c in ax.collections if isinstance(c, QuadMesh)).get_array()).reshape(2, n)
    assert values[0, 0] == 100
    assert values[1, [0, taxonomy.index("privacy")]] == pytest.approx([50, 50])
    assert [t.get_text() for t in ax.texts if t.get_text()] == ["100", "50", "50"]
    assert ax.get_yticklabels()[1].get_text().endswith("(2)")
    with pytest.raises(ValueError, match="one key a row"):
        plots.mean_distributions(means, ["benign"], taxonomy)
