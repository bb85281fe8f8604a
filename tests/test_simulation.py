"""The simulated world obeys its laws, and label enhancement in it shows what binary labels cannot tell."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lance.metrics import kl
from lance.objective import ALPHA_MAX, ALPHA_MIN, dirichlet_prior
from lance.simulation import World, WorldConfig, fit_simulated, simulate

SMALL = WorldConfig(k=3, dim=6, latent_dim=2, rows=60, test_rows=20)
SEEDS = (0, 1, 2)
CHANCE = 1 / 8


def cosines(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    return (a * b).sum(1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)


# ------------------------------------------------------------------------------ the world


def test_shapes_and_simplex():
    world = simulate(SMALL, seed=3)
    assert world.x.shape == (80, 6)
    assert world.d.shape == (80, 4)
    assert world.directions.shape == world.anchors.shape == (3, 6)
    assert (world.d >= 0).all()
    np.testing.assert_allclose(world.d.sum(1), 1)
    assert len(world.x[world.test]) == 20


def test_distributions_follow_the_prior_and_labels_follow_the_distributions():
    cfg = WorldConfig(rows=20000, test_rows=1, base_rate=0.3)
    world = simulate(cfg)
    a = dirichlet_prior(cfg.k, cfg.base_rate).numpy()
    np.testing.assert_allclose(world.d.mean(0), a / a.sum(), atol=0.01)
    assert world.d[:, 0].var() == pytest.approx(0.7 * 0.3 / (a.sum() + 1), rel=0.05)
    np.testing.assert_allclose(np.bincount(world.drawn, minlength=cfg.k + 1) / len(world.drawn), a / a.sum(), atol=0.01)
    sure = world.d[:, 0] > 0.9
    assert (world.drawn[sure] == 0).mean() == pytest.approx(world.d[sure, 0].mean(), abs=0.03)


def test_x_is_content_plus_safety():
    world = simulate(WorldConfig(content=0.0, noise=0.0, rows=50, test_rows=10))
    np.testing.assert_allclose(world.x, world.d[:, 1:] @ world.directions, atol=1e-12)
    other = simulate(WorldConfig(content=5.0, noise=0.0, rows=50, test_rows=10))
    content = other.x - other.d[:, 1:] @ other.directions
    assert np.sqrt((content**2).sum(1).mean()) == pytest.approx(5.0)


def test_anchors_lie_at_the_stated_distance():
    world = simulate(WorldConfig(direction=4.0, anchor_error=0.25))
    np.testing.assert_allclose(np.linalg.norm(world.anchors, axis=1), 4.0)
    np.testing.assert_allclose(np.linalg.norm(world.directions - world.anchors, axis=1), 1.0)


def test_the_same_seed_gives_the_same_world():
    a, b, c = simulate(SMALL, seed=1), simulate(SMALL, seed=1), simulate(SMALL, seed=2)
    np.testing.assert_array_equal(a.x, b.x)
    np.testing.assert_array_equal(a.drawn, b.drawn)
    assert not np.array_equal(a.x, c.x)


@given(supervision=st.one_of(st.sampled_from(["binary", "candidates"]), st.floats(0, 1)), seed=st.integers(0, 50))
def test_labels_are_true_and_hide_what_they_should(supervision, seed):
    world = simulate(SMALL, seed=seed)
    labels = world.labels(supervision)
    drawn = world.drawn[: SMALL.rows]
    assert labels.candidates[np.arange(len(drawn)), drawn].all()  # the drawn category is never left out
    np.testing.assert_array_equal(labels.candidates[:, 0], drawn == 0)
    np.testing.assert_array_equal(labels.candidates[drawn == 0].sum(1), 1)
    np.testing.assert_array_equal(labels.known, ~labels.candidates[:, 1:].all(1))
    assert not labels.eta.any()
    if supervision == "binary":
        assert labels.candidates[drawn > 0, 1:].all()


def test_share_of_leaf_labels():
    world = simulate(WorldConfig(rows=4000, test_rows=1))
    unsafe = world.drawn[:4000] > 0
    for share in (0, 0.05, 1):
        assert world.labels(share).known[unsafe].mean() == pytest.approx(share, abs=0.015)


def test_top_one_counts_noncompliant_test_rows():
    world = simulate(SMALL)
    assert world.top_one(world.d[world.test]) == 1.0
    wrong = np.roll(world.d[world.test][:, 1:], 1, axis=1)
    assert world.top_one(np.column_stack([world.d[world.test][:, 0], wrong])) == 0.0


@pytest.mark.parametrize(
    ("change", "names"),
    [({"k": 1}, "k"), ({"rows": 0}, "rows"), ({"noise": float("nan")}, "noise"), ({"base_rate": 1.0}, "base_rate"), ({"distractor": 1.0}, "distractor")],
)
def test_a_world_that_cannot_be_says_why(change, names):
    with pytest.raises(ValueError, match=names):
        WorldConfig(**change)


# ------------------------------------------------------------------------------ the fit


@pytest.fixture(scope="module")
def small() -> World:
    return simulate(SMALL)


def test_a_fit_gives_dirichlets_and_leaves_the_generator_of_the_caller_alone(small):
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    fit = fit_simulated(small, epochs=2)
    assert torch.equal(torch.rand(3), expected)
    assert fit.alpha.shape == (20, 4)
    assert fit.directions.shape == (3, 6)
    assert (fit.alpha >= ALPHA_MIN).all()
    assert (fit.alpha <= ALPHA_MAX).all()
    np.testing.assert_allclose(fit.means.sum(1), 1)


def test_the_same_seed_gives_the_same_fit(small):
    a, b, c = (fit_simulated(small, "candidates", seed=s, epochs=2) for s in (5, 5, 6))
    np.testing.assert_array_equal(a.alpha, b.alpha)
    assert not np.array_equal(a.alpha, c.alpha)


def test_where_directions_start(small):
    """With a vanishing learning rate directions stay where they start."""
    still = {"epochs": 1, "lr": 1e-9}
    np.testing.assert_allclose(fit_simulated(small, **still).directions, small.anchors, atol=1e-5)
    np.testing.assert_allclose(fit_simulated(small, anchors="permuted", **still).directions, small.anchors[[1, 2, 0]], atol=1e-5)
    np.testing.assert_allclose(fit_simulated(small, anchors=-small.anchors, **still).directions, -small.anchors, atol=1e-5)


@pytest.mark.parametrize("seed", SEEDS)
def test_random_directions_do_not_repeat_the_draws_of_the_world(seed):
    world = simulate(WorldConfig(rows=50, test_rows=5), seed=seed)
    start = fit_simulated(world, anchors=False, seed=seed, epochs=1, lr=1e-9).directions
    assert np.abs(cosines(start, world.anchors)).max() < 0.7
    np.testing.assert_allclose(np.linalg.norm(start, axis=1), 4.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"supervision": 1.5}, "share"),
        ({"anchors": np.zeros((2, 2))}, "shape"),
        ({"epochs": 0}, "epochs"),
    ],
)
def test_arguments_that_do_not_fit_say_why(small, arguments, names):
    with pytest.raises(ValueError, match=names):
        fit_simulated(small, **arguments)


# ------------------------------------------------------------------------------ the known facts


@pytest.fixture(scope="module")
def worlds() -> list[World]:
    return [simulate(WorldConfig(rows=1000), seed=s) for s in SEEDS]


@pytest.fixture(scope="module")
def recovered(worlds) -> dict[str, list[np.ndarray]]:
    runs = {
        "no anchors": {"anchors": False},
        "no reconstruction": {"reconstruction": False},
        "permuted anchors": {"anchors": "permuted"},
        "binary": {},
        "leaves": {"supervision": 1.0},
    }
    return {name: [fit_simulated(w, seed=w.seed, epochs=25, lr=1e-2, **given).means for w in worlds] for name, given in runs.items()}


def top_one(worlds, recovered, name):
    return np.array([w.top_one(m) for w, m in zip(worlds, recovered[name], strict=True)])


@pytest.mark.parametrize("name", ["no anchors", "no reconstruction"])
def test_binary_labels_alone_cannot_identify_categories(worlds, recovered, name):
    assert abs(top_one(worlds, recovered, name).mean() - CHANCE) < 0.08


def test_wrong_anchors_mislead(worlds, recovered):
    assert top_one(worlds, recovered, "permuted anchors").max() < CHANCE
    for world, wrong, right in zip(worlds, recovered["permuted anchors"], recovered["binary"], strict=True):
        prior = np.tile(world.d.mean(0), (len(wrong), 1))
        assert kl(world.d[world.test], right) < kl(world.d[world.test], prior) < kl(world.d[world.test], wrong)


def test_anchors_and_reconstruction_identify_categories(worlds, recovered):
    found = top_one(worlds, recovered, "binary")
    nearest = [
        w.top_one(np.column_stack([np.zeros(len(w.x[w.test])), (w.x[w.test] - w.x[: w.config.rows][w.drawn[: w.config.rows] == 0].mean(0)) @ w.anchors.T]))
        for w in worlds
    ]
    assert found.min() > 3 * CHANCE
    assert (found > nearest).all()  # the anchors alone, without learning, do less
    assert (top_one(worlds, recovered, "leaves") > found - 0.05).all()
