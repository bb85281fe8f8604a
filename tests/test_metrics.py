"""Measures against hand values, with their directions."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.special import rel_entr
from scipy.stats import entropy

from lance import metrics
from lance.corpus import Prompt
from lance.metrics import DISTRIBUTION_MEASURES, classification_figures, compare_distributions, expected_calibration_error, risk_coverage
from lance.taxonomy import Taxonomy

TRUE = np.array([[0.5, 0.3, 0.2]])
FOUND = np.array([[0.4, 0.4, 0.2]])

simplices = arrays(float, (4, 5), elements=st.floats(0.01, 1)).map(lambda a: a / a.sum(1, keepdims=True))


# -------------------------------------------------------------- distributions


def test_the_six_measures_by_hand():
    found = compare_distributions(TRUE, FOUND)
    assert found["Chebyshev"] == pytest.approx(0.1)
    assert found["Clark"] == pytest.approx(math.sqrt((0.1 / 0.9) ** 2 + (0.1 / 0.7) ** 2))
    assert found["Canberra"] == pytest.approx(0.1 / 0.9 + 0.1 / 0.7)
    assert found["KL"] == pytest.approx(0.5 * math.log(0.5 / 0.4) + 0.3 * math.log(0.3 / 0.4))
    assert found["cosine"] == pytest.approx((0.2 + 0.12 + 0.04) / (math.sqrt(0.38) * math.sqrt(0.36)))
    assert found["intersection"] == pytest.approx(0.4 + 0.3 + 0.2)


def test_kl_is_that_of_scipy_and_points_from_the_truth():
    assert metrics.kl(TRUE, FOUND) == pytest.approx(rel_entr(TRUE, FOUND).sum())
    assert metrics.kl(TRUE, FOUND) == pytest.approx(entropy(TRUE[0], FOUND[0]))
    assert metrics.kl(TRUE, FOUND) != pytest.approx(metrics.kl(FOUND, TRUE))


@given(simplices, simplices, st.floats(0.05, 0.95))
def test_every_measure_improves_in_its_direction_towards_the_truth(true, other, mix):
    nearer = mix * true + (1 - mix) * other
    for m in DISTRIBUTION_MEASURES:
        far, near, same = m.compute(true, other), m.compute(true, nearer), m.compute(true, true)
        sign = {"lower": 1, "higher": -1}[m.better]
        assert sign * same <= sign * near + 1e-9
        assert sign * near <= sign * far + 1e-9
        assert same == pytest.approx(0 if m.better == "lower" else 1, abs=1e-9)


def test_measures_are_means_over_rows():
    true, found = np.vstack([TRUE, TRUE]), np.vstack([FOUND, TRUE])
    both = compare_distributions(true, found)
    for m in DISTRIBUTION_MEASURES:
        assert both[m.name] == pytest.approx((m.compute(TRUE, FOUND) + m.compute(TRUE, TRUE)) / 2)


def test_zeros_do_not_break_a_measure():
    true, found = np.array([[1.0, 0.0, 0.0]]), np.array([[0.0, 1.0, 0.0]])
    values = compare_distributions(true, found)
    assert all(math.isfinite(v) for v in values.values())
    assert values["Chebyshev"] == 1
    assert values["intersection"] == values["cosine"] == 0
    assert values["Canberra"] == pytest.approx(2)


def test_shapes_must_agree():
    with pytest.raises((ValueError, TypeError), match="one shape|Type-check"):  # here the import hook may be first to notice
        compare_distributions(TRUE, np.ones((1, 4)) / 4)


# ---------------------------------------------------------------- calibration


def test_calibration_error_by_hand():
    confidence = np.array([0.9, 0.9, 0.6, 0.6])
    hit = np.array([1.0, 0.0, 1.0, 1.0])
    assert expected_calibration_error(confidence, hit, bins=2) == pytest.approx(0.5 * abs(0.5 - 0.9) + 0.5 * abs(1 - 0.6))
    assert expected_calibration_error(confidence, hit, bins=1) == pytest.approx(abs(0.75 - 0.75))
    assert expected_calibration_error(confidence, hit, bins=15) == pytest.approx((0.1 + 0.9 + 0.4 + 0.4) / 4)  # more bins than rows


def test_bins_have_equal_mass():
    """With bins of equal width the nine confident rows would share one bin and cancel out."""
    confidence = np.array([0.1, *np.linspace(0.91, 0.99, 9)])
    hit = np.array([0.0, *[1.0] * 5, *[0.0] * 4])
    parts = [(confidence[:5], hit[:5]), (confidence[5:], hit[5:])]
    expected = sum(0.5 * abs(h.mean() - c.mean()) for c, h in parts)
    assert expected_calibration_error(confidence, hit, bins=2) == pytest.approx(expected)


def test_a_calibrated_world_has_a_small_error_and_an_overconfident_one_a_large_one():
    rng = np.random.default_rng(0)
    p = rng.uniform(0.2, 1.0, 20_000)
    hit = (rng.random(20_000) < p).astype(float)
    assert expected_calibration_error(p, hit) < 0.02
    assert expected_calibration_error(np.sqrt(p), hit) > 0.1


def test_brier_by_hand():
    p = np.array([[0.7, 0.2, 0.1], [0.0, 0.0, 1.0]])
    assert metrics.brier(p, np.array([0, 2])) == pytest.approx((0.3**2 + 0.2**2 + 0.1**2) / 2)
    assert metrics.brier(np.eye(3), np.array([1, 2, 0])) == pytest.approx(2.0)


# -------------------------------------------------------------- classification


@pytest.fixture(scope="module")
def labelled() -> list[Prompt]:
    return [Prompt("a"), Prompt("b"), Prompt("c", ("privacy",)), Prompt("d", ("temporal",)), Prompt("e", ("humanizing",)), Prompt("f", ("privacy", "temporal"))]


def one_hot(taxonomy: Taxonomy, *keys: str) -> np.ndarray:
    return np.stack([np.eye(len(taxonomy) + 1)[taxonomy.index(k)] for k in keys])


def test_truth_is_the_top_level_category_of_the_first_label(labelled: list[Prompt], taxonomy: Taxonomy):
    truth = metrics.category_truth(labelled, taxonomy)
    assert [taxonomy.category_keys[i] for i in truth] == ["benign", "benign", "safety", "unsupported", "humanizing", "safety"]


def test_a_perfect_prediction(labelled: list[Prompt], taxonomy: Taxonomy):
    p = one_hot(taxonomy, "benign", "benign", "privacy", "temporal", "personal_inquiry", "copyright")
    found = classification_figures(p, labelled, taxonomy)
    assert found == pytest.approx({"accuracy": 1, "macro_f1": 1, "auroc": 1, "ece": 0, "brier": 0, "nll": 0, "leaf_f1": 1})


def test_mistakes_by_hand(labelled: list[Prompt], taxonomy: Taxonomy):
    p = one_hot(taxonomy, "benign", "privacy", "privacy", "temporal", "personal_inquiry", "benign")
    found = classification_figures(p, labelled, taxonomy)
    assert found["accuracy"] == pytest.approx(4 / 6)
    # benign: one of two found, one of two right; safety the same; unsupported and humanizing whole
    assert found["macro_f1"] == pytest.approx((0.5 + 0.5 + 1 + 1) / 4)
    assert found["auroc"] == pytest.approx(5 / 8)
    assert found["brier"] == pytest.approx(2 * 2 / 6)
    assert found["leaf_f1"] == 1


def test_mass_on_a_sister_leaf_is_mass_on_the_category(taxonomy: Taxonomy):
    rows = [Prompt("a", ("privacy",)), Prompt("b")]
    found = classification_figures(one_hot(taxonomy, "copyright", "benign"), rows, taxonomy)
    assert found["accuracy"] == 1
    assert found["leaf_f1"] == 0


def test_auroc_needs_both_kinds(taxonomy: Taxonomy):
    found = classification_figures(one_hot(taxonomy, "privacy"), [Prompt("a", ("privacy",))], taxonomy)
    assert math.isnan(found["auroc"])


# ---------------------------------------------------------------- template-ness


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help.",
        "I’m afraid not.",
        "As an AI language model, I",
        "I cannot do that",
        "Sorry, I can't",
        "  Unfortunately, no.",
        "I apologize",
        "I won't",
    ],
)
def test_the_usual_openings_of_a_refusal_are_found(answer: str):
    assert metrics.is_refusal_opening(answer)


@pytest.mark.parametrize("answer", ["Here is a recipe.", "The sorry state of the roads", "Use kill -9", "", "I can help with that", "Canada is north"])
def test_other_openings_are_not(answer: str):
    assert not metrics.is_refusal_opening(answer)


def test_openings_by_hand():
    assert metrics.opening("I’m  SORRY, but — I can't do this") == "i'm sorry but i can't"
    texts = ["One two three four five six", "one two three four five, seven", "Something else altogether, my friend"]
    assert metrics.top_opening_share(texts) == pytest.approx(2 / 3)
    assert metrics.top_opening_share(texts, n=6) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="at least one"):
        metrics.top_opening_share([])


def test_distinct_n_by_hand():
    assert metrics.distinct_n(["a b a b"], 2) == pytest.approx(2 / 3)
    assert metrics.distinct_n(["a b c", "d e f"], 2) == 1
    assert metrics.distinct_n(["word"], 2) == 0


def test_self_bleu_rises_with_repetition():
    same = ["the cat sat on the mat today"] * 4
    similar = [f"the cat sat on the {w} today" for w in ("mat", "chair", "roof", "lawn")]
    other = ["one of these things", "rain fell over night", "she plays chess well", "nobody knows why it"]
    assert metrics.self_bleu(same) == pytest.approx(1)
    assert metrics.self_bleu(other) < metrics.self_bleu(similar) < 1
    assert metrics.self_bleu(same[:1]) == 0


def test_self_bleu_by_hand():
    """Unigrams 1 of 2, smoothed 2 / 3; bigrams 0 of 1, smoothed 1 / 2."""
    assert metrics.self_bleu(["red car", "red bus"], n=2) == pytest.approx(math.sqrt(2 / 3 * 1 / 2))


def test_self_bleu_draws_with_the_seed():
    texts = [f"{a} {b} {c}" for a in "abcd" for b in "efgh" for c in "ijkl"]
    assert metrics.self_bleu(texts, most=10, seed=1) == metrics.self_bleu(texts, most=10, seed=1)
    assert len({metrics.self_bleu(texts, most=10, seed=s) for s in range(5)}) > 1


def test_risk_coverage_starts_with_the_most_confident():
    coverage, error = risk_coverage(np.array([0.2, 0.9, 0.5]), np.array([0.0, 1.0, 0.0]))
    assert coverage.tolist() == pytest.approx([1 / 3, 2 / 3, 1])
    assert error.tolist() == pytest.approx([0, 1 / 2, 2 / 3])
    with pytest.raises(ValueError, match="one confidence a prediction"):
        risk_coverage(np.array([]), np.array([]))
