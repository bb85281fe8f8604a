"""The objective, term by term: closed forms against Monte Carlo and hand values; gradients that stay finite."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import digamma
from torch.distributions import Dirichlet

from lance.objective import (
    ALPHA_MAX,
    ALPHA_MIN,
    ObjectiveWeights,
    anchor_term,
    concentrations,
    conditioned_on_label,
    dirichlet_prior,
    kl_dirichlet,
    kl_normal,
    label_term,
    pair_term,
    reconstruction_term,
    sample_simplex,
)

extremes = st.sampled_from([ALPHA_MIN, 0.051, 0.3, 1.0, 5.0, 50.0, 199.0, ALPHA_MAX])


def row(*values: float) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64)


def members(*inside: int, n: int = 4) -> torch.Tensor:
    return torch.tensor([[i in inside for i in range(n)]])


def eta(value: float) -> torch.Tensor:
    return torch.tensor([value], dtype=torch.float64)


# ----------------------------------------------------------------- label term


def test_candidate_set_likelihood_agrees_with_monte_carlo():
    alpha = row(2.0, 0.6, 1.4, 3.0)
    torch.manual_seed(0)
    d = Dirichlet(alpha[0]).sample((200_000,))
    any_of = torch.log(d[:, 1] + d[:, 3]).mean()
    all_of = 0.5 * (torch.log(d[:, 1]) + torch.log(d[:, 3])).mean()
    assert float(label_term(alpha, members(1, 3), eta(0))) == pytest.approx(float(any_of), abs=0.01)
    assert float(label_term(alpha, members(1, 3), eta(1))) == pytest.approx(float(all_of), abs=0.03)
    assert float(label_term(alpha, members(1, 3), eta(0.25))) == pytest.approx(float(0.75 * any_of + 0.25 * all_of), abs=0.02)


@pytest.mark.parametrize("eta_value", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("weight", [0.0, 1.0, 20.0])
def test_conditioning_on_a_label_agrees_with_importance_sampling(eta_value: float, weight: float):
    alpha, inside = row(2.0, 0.6, 1.4, 3.0), [False, True, False, True]
    torch.manual_seed(0)
    d = Dirichlet(alpha[0]).sample((400_000,))
    likelihood = (1 - eta_value) * torch.log(d[:, 1] + d[:, 3]) + eta_value * 0.5 * (torch.log(d[:, 1]) + torch.log(d[:, 3]))
    expected = (torch.softmax(weight * likelihood, dim=0)[:, None] * d).sum(0).numpy()
    found = conditioned_on_label(alpha.numpy(), np.array([inside]), np.array([eta_value]), np.array([weight]))
    assert found.sum() == pytest.approx(1)
    assert found[0] == pytest.approx(expected, abs=0.006)


def test_binary_labels_are_the_lines_of_the_book():
    alpha = row(2.0, 0.6, 1.4, 3.0)
    total = digamma(7.0)
    assert float(label_term(alpha, members(0), eta(0))) == pytest.approx(digamma(2.0) - total)  # y = 0
    assert float(label_term(alpha, members(1, 2, 3), eta(0))) == pytest.approx(digamma(5.0) - total)  # y = 1


def test_a_single_leaf_reads_the_same_as_a_set_and_as_evidence():
    alpha = row(2.0, 0.6, 1.4, 3.0)
    one, every = (float(label_term(alpha, members(2), eta(e))) for e in (0.0, 1.0))
    assert one == pytest.approx(every)
    assert one == pytest.approx(digamma(1.4) - digamma(7.0))


@given(st.lists(extremes, min_size=4, max_size=4), st.sets(st.integers(0, 3), min_size=1), st.floats(0, 1))
def test_the_label_term_is_a_log_likelihood_and_bounded_by_jensen(alpha, inside, mix):
    a = row(*alpha)
    value = float(label_term(a, members(*inside), eta(mix)))
    assert math.isfinite(value)
    assert value <= 1e-9
    share = sum(alpha[i] for i in inside) / sum(alpha)
    assert float(label_term(a, members(*inside), eta(0))) <= math.log(share) + 1e-9


def test_the_pair_term_is_the_likelihood_of_one_out_of_two():
    """Two independent coins of which exactly one shows noncompliant: by enumeration."""
    a, b = row(1.0, 2.0, 1.0, 0.5), row(4.0, 0.5, 0.3, 0.2)
    p, q = (float(1 - x[0, 0] / x.sum()) for x in (a, b))
    expected = p * (1 - q) / (p * (1 - q) + q * (1 - p))
    assert pair_term(a, b).exp().item() == pytest.approx(expected)
    assert pair_term(a, b).exp().item() + pair_term(b, a).exp().item() == pytest.approx(1)
    assert pair_term(a, a).exp().item() == pytest.approx(0.5)
    assert pair_term(a[:0], b[:0]).sum().item() == 0


@given(st.lists(st.floats(-60, 60), min_size=4, max_size=4), st.sets(st.integers(0, 3), min_size=1), st.sampled_from([0.0, 0.5, 1.0]))
def test_gradients_are_finite_at_extreme_concentrations(g, inside, mix):
    raw = torch.tensor([g], dtype=torch.float32, requires_grad=True)
    alpha = concentrations(raw)
    torch.manual_seed(0)
    d = sample_simplex(alpha)
    objective = label_term(alpha, members(*inside), eta(mix)) - kl_dirichlet(alpha, dirichlet_prior(3, 0.4)) + torch.log(d).sum(-1)
    objective.sum().backward()
    assert torch.isfinite(objective).all()
    assert raw.grad is not None
    assert torch.isfinite(raw.grad).all()


@pytest.mark.parametrize("level", [3.0, 9.0, 15.0])
def test_the_label_gradient_is_that_of_a_softmax_where_evidence_is_plenty_and_at_the_limit(level):
    g = torch.tensor([[0.0, 0.5, -0.5, 0.2]], dtype=torch.float64).add(level).requires_grad_()
    label_term(concentrations(g), members(1), eta(0)).sum().backward()
    assert g.grad is not None
    softmax = torch.eye(4, dtype=torch.float64)[1] - torch.softmax(g.detach(), -1)[0]
    assert float(torch.cosine_similarity(g.grad[0], softmax, dim=0)) > 0.99
    assert 0.9 < float(g.grad[0].norm() / softmax.norm()) < 1.1


# ------------------------------------------------------------- concentrations


def test_concentrations_stay_in_their_range_and_follow_the_exponential_far_below_the_limit():
    g = torch.tensor([[-1e4, -2.0, 0.0, 1.0, 2.0]])
    alpha = concentrations(g)
    assert alpha.dtype == torch.float64
    assert float(alpha[0, 0]) == ALPHA_MIN
    assert torch.allclose(alpha[0, 1:], torch.exp(g[0, 1:].double()) + ALPHA_MIN, rtol=0.07)
    alone = concentrations(torch.tensor([[-1e4, 1e4]]))[0]
    assert float(alone[1]) == pytest.approx(ALPHA_MAX)
    assert float(alone[1]) <= ALPHA_MAX


@given(st.lists(st.floats(-30, 30), min_size=2, max_size=6), st.integers(0, 5), st.floats(0.01, 5))
def test_a_higher_output_gives_its_category_more_and_the_others_no_more(g, k, step):
    k %= len(g)
    higher = [value + step * (i == k) for i, value in enumerate(g)]
    before, after = (concentrations(torch.tensor([row], dtype=torch.float64))[0] for row in (g, higher))
    assert float(before.min()) >= ALPHA_MIN and float(after.max()) <= ALPHA_MAX
    assert float(after.sum() - before.sum()) >= -1e-9
    assert float(after[k] - before[k]) >= -1e-9
    others = [i for i in range(len(g)) if i != k]
    assert (after[others] <= before[others] + 1e-9).all()


# ---------------------------------------------------------------------- prior


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.83])
def test_the_prior_has_the_base_rate_as_its_mean(rate):
    a = dirichlet_prior(17, rate)
    assert a.shape == (18,)
    assert a[1:].tolist() == pytest.approx([0.3] * 17)
    assert float(a[1:].sum() / a.sum()) == pytest.approx(rate)


@pytest.mark.parametrize("rate", [0.0, 1.0, -0.1, math.nan])
def test_a_base_rate_without_both_kinds_is_refused(rate):
    with pytest.raises(ValueError, match="base rate"):
        dirichlet_prior(3, rate)


# ------------------------------------------------------------- KL divergences


def test_kl_of_dirichlets_agrees_with_monte_carlo_and_vanishes_at_the_prior():
    prior = dirichlet_prior(3, 0.6)
    alpha = row(2.0, 0.6, 1.4, 3.0)
    torch.manual_seed(0)
    q, p = Dirichlet(alpha[0]), Dirichlet(prior)
    d = q.sample((200_000,)).clamp_min(1e-12)
    assert float(kl_dirichlet(alpha, prior)) == pytest.approx(float((q.log_prob(d) - p.log_prob(d)).mean()), abs=0.02)
    assert float(kl_dirichlet(prior.unsqueeze(0), prior)) == pytest.approx(0, abs=1e-12)


def test_kl_of_normals_by_hand_and_by_monte_carlo():
    assert float(kl_normal(torch.zeros(1, 3), torch.zeros(1, 3))) == 0
    mu, log_s = torch.tensor([[1.0, -0.5]]), torch.tensor([[0.3, -1.0]])
    assert float(kl_normal(torch.ones(1, 2), torch.zeros(1, 2))) == pytest.approx(1.0)
    torch.manual_seed(0)
    z = mu + torch.exp(log_s) * torch.randn(200_000, 2)
    q = torch.distributions.Normal(mu, torch.exp(log_s)).log_prob(z).sum(-1)
    p = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum(-1)
    assert float(kl_normal(mu, log_s)) == pytest.approx(float((q - p).mean()), abs=0.02)


# ------------------------------------------------------ reconstruction, anchors


def test_reconstruction_is_the_gaussian_log_density():
    rng = np.random.default_rng(0)
    x, content, b = (torch.tensor(rng.normal(size=s), dtype=torch.float64) for s in ((5, 8), (5, 8), (3, 8)))
    d = Dirichlet(torch.ones(4, dtype=torch.float64)).sample((5,))
    log_sigma = torch.tensor(0.4, dtype=torch.float64)
    mean = content + d[:, 1:] @ b
    expected = torch.distributions.Normal(mean, torch.exp(log_sigma)).log_prob(x).sum(-1)
    assert torch.allclose(reconstruction_term(x, content, d, b, log_sigma), expected)


def test_benign_mass_adds_nothing_to_the_reconstruction():
    x, content, b = torch.randn(2, 8), torch.randn(2, 8), torch.randn(3, 8)
    benign = torch.tensor([[1.0, 0, 0, 0]] * 2)
    zero = torch.tensor(0.0)
    assert torch.equal(reconstruction_term(x, content, benign, b, zero), reconstruction_term(x, content, benign, 100 * b, zero))


def test_anchor_term_by_hand():
    b, e = torch.tensor([[1.0, 2.0], [0.0, 0.0]]), torch.tensor([[0.0, 0.0], [0.0, 3.0]])
    assert float(anchor_term(b, e)) == pytest.approx(0.5 * (5 + 9))
    assert float(anchor_term(b, b)) == 0


# --------------------------------------------------------------------- samples


@given(st.lists(extremes, min_size=4, max_size=4), st.integers(0, 1000))
def test_draws_lie_inside_the_simplex(alpha, seed):
    torch.manual_seed(seed)
    d = sample_simplex(row(*alpha).repeat(8, 1))
    assert d.dtype == torch.float64
    assert torch.allclose(d.sum(-1), torch.ones(8, dtype=torch.float64))
    assert float(d.min()) > 9e-7


def test_draws_have_the_mean_of_the_dirichlet_and_carry_its_gradient():
    alpha = row(2.0, 0.6, 1.4, 3.0).requires_grad_()
    torch.manual_seed(0)
    d = sample_simplex(alpha.expand(100_000, 4))
    assert torch.allclose(d.mean(0), alpha[0] / alpha.sum(), atol=5e-3)
    (gradient,) = torch.autograd.grad(d[:, 0].mean(), alpha)
    expected = (torch.tensor([1.0, 0, 0, 0]) - alpha[0, 0] / 7.0) / 7.0  # derivative of alpha_0 / A
    assert torch.allclose(gradient[0], expected.double(), atol=5e-3)


# --------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", ["label", "binary", "reconstruction", "kl_d", "kl_z", "anchor"])
@pytest.mark.parametrize("value", [-1e-9, math.nan, math.inf])
def test_weights_are_finite_and_not_negative(name, value):
    with pytest.raises(ValueError, match=name):
        ObjectiveWeights(**{name: value})


def test_weights_survive_as_plain_data():
    weights = ObjectiveWeights(kl_d=0.5)
    assert ObjectiveWeights(**weights.to_dict()) == weights
