"""RejectionDistribution: closed forms against Monte Carlo and hand values; simplex and aggregation as laws."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance.distribution import RejectionDistribution
from lance.taxonomy import Taxonomy

TAXONOMY = Taxonomy.builtin()
K1 = len(TAXONOMY.keys)
FLAT = Taxonomy.from_dict({"name": "flat", "categories": [{"key": k, "anchor": f"about {k}"} for k in ("a", "b", "c")]})

alphas = st.lists(st.floats(1e-3, 1e4), min_size=K1, max_size=K1).map(np.array)


def of(*alpha: float) -> RejectionDistribution:
    """A distribution over benign and the three leaves of the flat taxonomy."""
    return RejectionDistribution(FLAT.keys, np.array(alpha), FLAT)


@given(alphas)
def test_mean_and_shares_lie_on_the_simplex(alpha):
    d = RejectionDistribution(TAXONOMY.keys, alpha, TAXONOMY)
    for weights in (d.mean, d.shares, d.by("category").mean, d.by("category").shares):
        assert math.isclose(sum(weights.values()), 1, rel_tol=1e-9)
        assert min(weights.values()) >= 0
    assert list(d.mean) == list(TAXONOMY.keys)
    assert list(d.shares) == list(TAXONOMY.keys[1:])
    assert 0 <= d.risk <= 1
    assert 0 < d.vacuity <= 1


@given(alphas)
def test_categories_are_an_exact_dirichlet_with_the_same_risk(alpha):
    d = RejectionDistribution(TAXONOMY.keys, alpha, TAXONOMY)
    c = d.by("category")
    assert c.keys == TAXONOMY.category_keys
    for category in TAXONOMY.categories:
        below = sum(d.mean[leaf] for leaf in TAXONOMY.leaves_of(category.key))
        assert math.isclose(c.mean[category.key], below, rel_tol=1e-9)
    assert math.isclose(c.concentration, d.concentration, rel_tol=1e-9)
    assert math.isclose(c.risk, d.risk, rel_tol=1e-9, abs_tol=1e-12)
    assert math.isclose(c.risk_upper, d.risk_upper, rel_tol=1e-6, abs_tol=1e-9)
    assert c.by("category") == c


@given(alphas, st.integers(1, K1 - 1), st.floats(1.01, 50))
def test_more_evidence_for_a_leaf_raises_the_risk(alpha, k, factor):
    more = alpha.copy()
    more[k] *= factor
    before, after = (RejectionDistribution(TAXONOMY.keys, a, TAXONOMY) for a in (alpha, more))
    assert after.risk >= before.risk
    assert after.risk_upper >= before.risk_upper - 1e-9
    assert after.vacuity <= before.vacuity


def test_hand_values():
    d = of(6, 2, 1, 1)
    assert d.concentration == 10
    assert d.mean == pytest.approx({"benign": 0.6, "a": 0.2, "b": 0.1, "c": 0.1})
    assert d.shares == pytest.approx({"a": 0.5, "b": 0.25, "c": 0.25})
    assert d.risk == pytest.approx(0.4)
    assert d.vacuity == pytest.approx(4 / 10)
    assert d.top == "benign"
    assert d.share_entropy == pytest.approx(1.5 * math.log(2) / math.log(3))
    assert d.entropy == pytest.approx(-(0.6 * math.log(0.6) + 0.2 * math.log(0.2) + 0.2 * math.log(0.1)))
    assert of(1, 0.5, 0.25, 0.25).vacuity == 1.0  # 4 / 2, capped


def test_beta_of_the_risk_by_hand():
    uniform = of(1, 0.5, 0.25, 0.25)  # rho ~ Beta(1, 1)
    assert uniform.risk_upper == pytest.approx(0.95)
    assert uniform.risk_interval == pytest.approx((0.05, 0.95))
    assert uniform.risk_exceeds(0.3) == pytest.approx(0.7)
    square = of(1, 1, 0.5, 0.5)  # rho ~ Beta(2, 1), whose distribution function is t^2
    assert square.risk_quantile(0.25) == pytest.approx(0.5)
    assert square.risk_exceeds(0.5) == pytest.approx(0.75)


def test_closed_forms_agree_with_monte_carlo():
    d = of(2.5, 0.7, 3.0, 0.4)
    draws = np.random.default_rng(0).dirichlet(d.alpha, size=200_000)
    rho = 1 - draws[:, 0]
    assert d.risk == pytest.approx(rho.mean(), abs=3e-3)
    assert d.risk_upper == pytest.approx(np.quantile(rho, 0.95), abs=3e-3)
    assert d.risk_interval[0] == pytest.approx(np.quantile(rho, 0.05), abs=3e-3)
    assert d.risk_exceeds(0.6) == pytest.approx((rho > 0.6).mean(), abs=4e-3)
    entropies = -(draws * np.log(np.maximum(draws, 1e-300))).sum(1)
    assert d.epistemic == pytest.approx(d.entropy - entropies.mean(), abs=4e-3)


def test_aggregation_agrees_with_monte_carlo():
    alpha = np.random.default_rng(1).gamma(1.0, 2.0, K1) + 0.05
    d = RejectionDistribution(TAXONOMY.keys, alpha, TAXONOMY)
    draws = np.random.default_rng(2).dirichlet(alpha, size=100_000)
    groups = np.array(TAXONOMY.groups())
    key = TAXONOMY.category_keys[2]
    mass = draws[:, groups == 2].sum(1)
    a = d.by("category").alpha
    assert d.by("category").mean[key] == pytest.approx(mass.mean(), abs=4e-3)
    assert mass.var() == pytest.approx(a[2] * (a.sum() - a[2]) / (a.sum() ** 2 * (a.sum() + 1)), rel=0.05)


def test_quantile_inverts_the_tail_and_evidence_narrows_the_interval():
    d = of(3, 1, 2, 0.5)
    for q in (0.01, 0.3, 0.95):
        assert d.risk_exceeds(d.risk_quantile(q)) == pytest.approx(1 - q, abs=1e-9)
    wide, narrow = of(2, 1, 0.5, 0.5), of(200, 100, 50, 50)
    assert wide.risk == pytest.approx(narrow.risk)
    assert narrow.risk_interval[1] - narrow.risk_interval[0] < 0.2 * (wide.risk_interval[1] - wide.risk_interval[0])
    assert narrow.epistemic < wide.epistemic
    assert narrow.vacuity < wide.vacuity


@given(st.sampled_from([0.05, 1e-3, 200.0, 1e4]), st.sampled_from([0.05, 1e-3, 200.0, 1e4]))
def test_extreme_concentrations_stay_finite(benign, rest):
    d = of(benign, rest, rest, rest)
    plain = json.loads(json.dumps(d.to_dict()))
    for key in ("risk", "risk_lower", "risk_upper", "vacuity", "epistemic", "entropy"):
        assert math.isfinite(plain[key]), key
    assert 0 <= d.risk_interval[0] <= d.risk_interval[1] <= 1


@pytest.mark.parametrize("alpha", [(1, 1, 1), (1, 1, 1, 0), (1, 1, 1, -1), (1, 1, 1, math.nan), (1, 1, 1, math.inf)])
def test_bad_concentrations_are_refused(alpha):
    with pytest.raises(ValueError, match="alpha"):
        of(*alpha)


@pytest.mark.parametrize("q", [-0.1, 1.1, math.nan])
def test_a_quantile_outside_the_unit_interval_is_refused(q):
    with pytest.raises(ValueError, match="quantile"):
        of(1, 1, 1, 1).risk_quantile(q)


@pytest.mark.parametrize("taxonomy", [TAXONOMY, FLAT], ids=["two levels", "flat"])
def test_an_unknown_level_is_refused(taxonomy):
    d = RejectionDistribution(taxonomy.keys, np.ones(len(taxonomy.keys)), taxonomy)
    assert d.by("leaf") == d
    with pytest.raises(ValueError, match="level"):
        d.by("branch")


def test_equality_and_hash_go_by_value():
    assert of(1, 2, 3, 4) == of(1, 2, 3, 4)
    assert len({of(1, 2, 3, 4), of(1, 2, 3, 4), of(4, 3, 2, 1)}) == 2
    assert of(1, 2, 3, 4) != "something else"


def test_representations_name_the_strongest_coordinates():
    d = of(1, 9, 2, 0.01)
    assert repr(d).startswith("RejectionDistribution(a 0.75, b 0.17")
    page = d._repr_html_()
    assert f"{d.risk:.2f}" in page
    assert page.count("<tr>") == 3  # c, below one per cent, is left out


def test_names_are_escaped_in_html():
    taxonomy = Taxonomy.from_dict({"name": "x", "categories": [{"key": "a", "name": "<b>bold</b>", "anchor": "x"}]})
    page = RejectionDistribution(taxonomy.keys, np.ones(2), taxonomy)._repr_html_()
    assert "<b>" not in page
    assert "&lt;b&gt;" in page


def test_to_dict_holds_the_whole_distribution():
    d = of(1, 9, 2, 0.5)
    plain = json.loads(json.dumps(d.to_dict()))
    rebuilt = RejectionDistribution(tuple(plain["alpha"]), np.array(list(plain["alpha"].values())), FLAT)
    assert rebuilt == d
    assert plain["top"] == "a"
    assert plain["risk_lower"] < plain["risk"] < plain["risk_upper"]
