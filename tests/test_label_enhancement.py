"""Label enhancement over features: the protocol, the likelihood of logical labels, conditioning on them, and what is recovered in worlds with known truth."""

import os
from pathlib import Path

import numpy as np
import pytest
import scipy.io
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax
from sklearn.base import clone
from torch.distributions import Dirichlet

from lance import DataError, LabelEnhancer, ModelError, ObjectiveWeights
from lance.label_enhancement import conditioned_mean, logical_labels
from lance.metrics import compare_distributions, kl
from lance.objective import top_set_term


def toy(n: int = 240, c: int = 5, p: int = 8, evidence: float = 40.0, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Features, and distributions whose mean the features decide, log-linearly."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, p))
    mean = softmax(0.6 * X @ rng.standard_normal((p, c)) / np.sqrt(p), axis=1)
    return X, np.stack([rng.dirichlet(evidence * m) for m in mean])


@pytest.fixture(scope="module")
def fitted() -> tuple[LabelEnhancer, np.ndarray, np.ndarray]:
    X, D = toy()
    return LabelEnhancer(least_steps=120).fit(X[:200], logical_labels(D[:200])), X, D


# ----------------------------------------------------------------------- protocol


def test_labels_are_added_until_their_mass_passes_one_half():
    d = np.array([[0.6, 0.3, 0.1], [0.4, 0.35, 0.25], [0.2, 0.5, 0.3], [0.25, 0.25, 0.5]])
    expected = [[1, 0, 0], [1, 1, 0], [0, 1, 1], [1, 0, 1]]  # exactly one half does not pass
    np.testing.assert_array_equal(logical_labels(d), np.array(expected, dtype=bool))


@given(st.integers(2, 9), st.integers(0, 10**6), st.sampled_from([0.3, 0.5, 0.8]))
def test_labels_name_the_largest_coordinates_and_no_more_than_needed(c: int, seed: int, mass: float):
    d = np.random.default_rng(seed).dirichlet(np.ones(c), 20)
    chosen = logical_labels(d, mass)
    inside = (d * chosen).sum(1)
    least = np.where(chosen, d, 2).min(1)
    assert (least >= np.where(chosen, -1, d).max(1)).all()
    assert (inside > mass - 1e-9).all() and (inside - least <= mass + 1e-9).all()


# ---------------------------------------------------------------------- likelihood


def test_a_label_is_likely_exactly_where_the_protocol_would_have_given_it():
    torch.manual_seed(0)
    d = Dirichlet(torch.full((6,), 3.0, dtype=torch.float64)).sample((400, 1))
    right = torch.from_numpy(logical_labels(d[:, 0].numpy()))
    wrong = right.roll(1, dims=0)
    differs = (right != wrong).any(1)
    for i in range(400):
        own, other = (float(top_set_term(d[i : i + 1], given[i : i + 1], softness=1e-6)) for given in (right, wrong))
        assert own > -2.2  # ln 1/2 for each margin that may be exactly 0
        assert not differs[i] or other < -100


def test_without_a_mass_only_the_order_counts():
    d = torch.tensor([[[0.9, 0.06, 0.04]]], dtype=torch.float64)
    two = torch.tensor([[True, True, False]])
    assert float(top_set_term(d, two, mass=None, softness=1e-4)) > -0.01
    assert float(top_set_term(d, two, mass=0.5, softness=1e-4)) < -1000


def test_all_labels_chosen_leaves_no_other_to_exceed():
    d = torch.tensor([[[0.5, 0.5]]], dtype=torch.float64)
    value = top_set_term(d, torch.tensor([[True, True]]), softness=0.01)
    assert torch.isfinite(value).all()


def test_conditioning_agrees_with_rejection_sampling():
    alpha = torch.tensor([[4.0, 6.0, 5.0, 3.0]], dtype=torch.float64)
    chosen = torch.tensor([[True, False, False, True]])
    torch.manual_seed(1)
    draws = Dirichlet(alpha[0]).sample((400_000,))
    kept = draws[torch.from_numpy((logical_labels(draws.numpy()) == chosen.numpy()).all(1))]
    assert len(kept) > 2000
    found = conditioned_mean(alpha, chosen, 0.5, 0.001, draws=20_000)
    np.testing.assert_allclose(found[0].numpy(), kept.mean(0).numpy(), atol=0.006)


# ------------------------------------------------------------------------ recovery


def test_recovers_more_than_the_labels_say(fitted: tuple[LabelEnhancer, np.ndarray, np.ndarray]):
    model, X, D = fitted
    L = logical_labels(D)
    found = model.transform(X[:200], L[:200])
    np.testing.assert_allclose(found.sum(1), 1)
    uniform, labels = np.full((200, 5), 0.2), softmax(L[:200].astype(float), axis=1)
    ours = compare_distributions(D[:200], found)
    for other in (uniform, labels):
        theirs = compare_distributions(D[:200], other)
        assert ours["KL"] < 0.7 * theirs["KL"]
        assert ours["Chebyshev"] < 0.9 * theirs["Chebyshev"]
    blind = LabelEnhancer(least_steps=120).fit(np.zeros((200, 1)), L[:200]).transform(np.zeros((200, 1)), L[:200])
    assert ours["KL"] < 0.9 * kl(D[:200], blind)  # the features help


def test_new_rows_need_no_label_and_gain_from_one(fitted: tuple[LabelEnhancer, np.ndarray, np.ndarray]):
    model, X, D = fitted
    alone, labelled = model.transform(X[200:]), model.transform(X[200:], logical_labels(D[200:]))
    uniform = kl(D[200:], np.full((40, 5), 0.2))
    assert kl(D[200:], labelled) < kl(D[200:], alone) < 0.8 * uniform
    alpha = model.concentrations(X[200:])
    np.testing.assert_allclose(alone, alpha / alpha.sum(1, keepdims=True))


def test_two_labels_and_labels_of_any_mass_work():
    X, D = toy(n=80, c=2)
    assert LabelEnhancer(least_steps=20).fit_transform(X, logical_labels(D)).shape == (80, 2)
    X, D = toy(n=80, c=4)
    top = np.eye(4, dtype=bool)[D.argmax(1)]
    found = LabelEnhancer(mass=None, least_steps=60).fit_transform(X, top)
    assert (found.argmax(1) == D.argmax(1)).mean() > 0.95


def test_the_weights_are_those_of_the_shared_objective():
    X, D = toy(n=60)
    L = logical_labels(D)
    spread = [LabelEnhancer(least_steps=60, weights=ObjectiveWeights(kl_d=beta)).fit(X, L).transform(X).std(0).mean() for beta in (0.0, 1.0, 100.0)]
    assert spread[0] > spread[1] > 3 * spread[2]  # a heavy KL collapses the posteriors onto the prior


def test_the_seed_decides_and_the_callers_generator_stays():
    X, D = toy(n=60)
    L = logical_labels(D)
    before = torch.get_rng_state()
    a, b, c = (LabelEnhancer(least_steps=20, random_state=s).fit_transform(X, L) for s in (3, 3, 4))
    np.testing.assert_array_equal(a, b)
    assert np.abs(a - c).max() > 0
    assert torch.equal(before, torch.get_rng_state())


def test_it_is_an_estimator():
    model = LabelEnhancer(scale=0.3, random_state=7)
    copy = clone(model)
    assert copy.get_params() == model.get_params() and copy.scale == 0.3
    assert not hasattr(copy, "network_")


# -------------------------------------------------------------------------- errors


def test_wrong_input_is_named(fitted: tuple[LabelEnhancer, np.ndarray, np.ndarray]):
    X, D = toy(n=30)
    L = logical_labels(D)
    bad = X.copy()
    bad[4, 2] = np.nan
    none = L.copy()
    none[6] = False
    cases = [
        ((bad, L), "row 4, column 2"),
        ((X, D), "zeros and ones"),
        ((X, none), "row 6 of L has no label"),
        ((X[:20], L), "20 rows"),
        ((X[0], L), "matrix"),
        ((X, L[:, :1]), "c >= 2"),
        ((X[:1], L[:1]), "two rows"),
    ]
    for given_, message in cases:
        with pytest.raises(DataError, match=message):
            LabelEnhancer().fit(*given_)
    with pytest.raises(ModelError, match="not fitted"):
        LabelEnhancer().transform(X)
    with pytest.raises(DataError, match="7 features"):
        fitted[0].transform(X[:, :7])
    with pytest.raises(DataError, match="logical labels of shape"):
        fitted[0].transform(X, np.eye(4)[[0] * 30])


# ---------------------------------------------------------------------- benchmark


@pytest.mark.parametrize(("name", "most_kl", "most_chebyshev"), [("SJAFFE", 0.031, 0.074), ("SBU_3DFE", 0.041, 0.093)])
def test_recovers_the_benchmark_better_than_the_best_peer_measured(name: str, most_kl: float, most_chebyshev: float):
    folder = os.environ.get("LANCE_DATA")
    if not folder:
        pytest.skip("LANCE_DATA is not set: it holds the label-distribution benchmarks")
    found = scipy.io.loadmat(Path(folder) / "ldl" / f"{name}.mat")
    X, D = found["features"].astype(float), found["labels"].astype(float)
    figures = compare_distributions(D, LabelEnhancer().fit_transform(X, logical_labels(D)))
    assert figures["KL"] < most_kl
    assert figures["Chebyshev"] < most_chebyshev
