"""The objective of the variational label enhancer, one function a term.

Notation as in the book: x (n, D) prompt embeddings; d (n, K + 1) rejection distributions, index 0 benign; z (n, dz) semantic content; alpha (n, K + 1)
concentrations of q(d | x) = Dir(alpha), A their sum; b (K, D) the direction that each category adds, e (K, D) its anchor. Lineage: LEVI (Xu, Shu, Liu,
Geng, ICML 2020), VALEN (Xu, Qiao, Geng, Zhang, NeurIPS 2021); the candidate-set likelihood and the additive decoder are ours.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.distributions import Dirichlet, kl_divergence

ALPHA_MIN, ALPHA_MAX = 0.05, 200.0


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weights of the terms. All 1 is a composite ELBO; any other weights are a tempered one.

    `label` weighs rows with a known candidate set (lambda_S), `binary` those known only as benign or unsafe (lambda_y), `reconstruction` is lambda_x,
    `kl_d` and `kl_z` are beta_d and beta_z, `anchor` is tau, the precision of b around its anchors. `pair` weighs what twins say of each other.
    """

    label: float = 1.0
    binary: float = 1.0
    reconstruction: float = 0.003
    kl_d: float = 0.003
    kl_z: float = 0.003
    anchor: float = 0.02
    pair: float = 1.0

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"weight {name!r} must be a finite number >= 0, found {value!r}")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def concentrations(g: Float[Tensor, "n k1"], limit: float = ALPHA_MAX) -> Float[Tensor, "n k1"]:
    """alpha_k = 0.05 + c(sum_j exp(g_j)) softmax(g)_k, in float64, where c approaches limit - 0.05 smoothly and is the identity far below it.

    The mean is a softmax with an even floor, so its gradient does not vanish where evidence is plenty; a limit on each alpha_k would slow down the
    unlearning of what is confidently wrong. Ours.
    """
    g = g.double()
    total, top = torch.logsumexp(g, dim=-1, keepdim=True), math.log(limit - ALPHA_MIN)
    return (ALPHA_MIN + torch.exp(g - total + top - torch.nn.functional.softplus(top - total))).clamp(ALPHA_MIN, limit)


def dirichlet_prior(k: int, base_rate: float) -> Float[Tensor, " k1"]:
    """a: 0.3 for each category, 0.3 K (1 - r) / r for benign, where r is the base rate of noncompliance."""
    if not 0 < base_rate < 1:
        raise ValueError(f"the base rate of noncompliance must lie in (0, 1), found {base_rate!r}; training needs benign and noncompliant prompts")
    a = torch.full((k + 1,), 0.3, dtype=torch.float64)
    a[0] = 0.3 * k * (1 - base_rate) / base_rate
    return a


def label_term(alpha: Float[Tensor, "n k1"], candidates: Bool[Tensor, "n k1"], eta: Float[Tensor, " n"]) -> Float[Tensor, " n"]:
    """E_q log p(S | d), in closed form by Dirichlet aggregation.

    (1 - eta) (psi(alpha_S) - psi(A)) + (eta / |S|) sum_S (psi(alpha_k) - psi(A)); a benign row has S = {0}, a row that is only known to be unsafe S = {1..K}.
    """
    inside = candidates.to(alpha.dtype)
    total = torch.digamma(alpha.sum(-1))
    any_of = torch.digamma((alpha * inside).sum(-1)) - total
    all_of = ((torch.digamma(alpha) - total.unsqueeze(-1)) * inside).sum(-1) / inside.sum(-1)
    return (1 - eta) * any_of + eta * all_of


def conditioned_on_label(
    alpha: Float[np.ndarray, "n k1"], candidates: Bool[np.ndarray, "n k1"], eta: Float[np.ndarray, " n"], weight: Float[np.ndarray, " n"]
) -> Float[np.ndarray, "n k1"]:
    """Mean of d ~ Dir(alpha) once its label is known, with the likelihood p(S | d) of `label_term` raised to `weight`; rows sum to 1.

    In closed form: d_S ~ Beta(alpha_S + weight, A - alpha_S), and within S the shares are Dirichlet of alpha_k + weight eta / |S|. With eta = 1 that is the
    mean of Dir(alpha + weight 1_S / |S|); with eta = 0 the shares within S stay as they are.
    """
    inside = candidates * alpha
    total, in_set = alpha.sum(1, keepdims=True), inside.sum(1, keepdims=True)
    w, e = weight[:, None], eta[:, None]
    within = (inside + w * e * candidates / candidates.sum(1, keepdims=True)) / (in_set + w * e)
    return np.asarray(((in_set + w) * within + alpha * ~candidates) / (total + w))


def top_set_term(d: Float[Tensor, "s n k1"], chosen: Bool[Tensor, "n k1"], mass: float | None = 0.5, softness: float = 0.01) -> Float[Tensor, "s n"]:
    """ln p(L | d) of logical labels L that name the largest coordinates of d, for s draws of d.

    A sum of ln sigmoid(margin / softness), over the margins by which d could have been labelled so: its smallest chosen coordinate above its largest other
    one and, where `mass` says when the labelling stopped, the chosen mass above `mass` and the same without its smallest member below. Ours.
    """
    least = d.masked_fill(~chosen, math.inf).amin(-1)
    margins = [least - d.masked_fill(chosen, -math.inf).amax(-1)]
    if mass is not None:
        total = (d * chosen).sum(-1)
        margins += [total - mass, mass - (total - least)]
    return torch.nn.functional.logsigmoid(torch.stack(margins) / softness).sum(0)


def pair_term(noncompliant: Float[Tensor, "p k1"], benign: Float[Tensor, "p k1"]) -> Float[Tensor, " p"]:
    """ln sigmoid(logit rho - logit rho'), from the concentrations of the two halves of each pair of twins, with rho = 1 - alpha_0 / A.

    The exact log-likelihood that it is the first of the two that is noncompliant, given that one of them is: independent odds, renormalised. It says what
    the rows one by one do not: the border runs between these two. Ours; the form is that of Bradley and Terry (Biometrika, 1952).
    """
    odds = [torch.logsumexp(torch.log(a[:, 1:]), dim=-1) - torch.log(a[:, 0]) for a in (noncompliant, benign)]
    return torch.nn.functional.logsigmoid(odds[0] - odds[1])


def sample_simplex(alpha: Float[Tensor, "*n k1"]) -> Float[Tensor, "*n k1"]:
    """One reparameterised draw of d ~ Dir(alpha), in float64 and away from the edge, where the gradient of ln d explodes."""
    d = Dirichlet(alpha.double()).rsample().clamp_min(1e-6)
    return d / d.sum(-1, keepdim=True)


def reconstruction_term(
    x: Float[Tensor, "n d"], content: Float[Tensor, "n d"], d: Float[Tensor, "n k1"], b: Float[Tensor, "k d"], log_sigma: Float[Tensor, ""]
) -> Float[Tensor, " n"]:
    """log N(x; f(z) + sum_k d_k b_k, sigma^2 I): content and safety are separate addends, and that is the decoupling."""
    mean = content + d[:, 1:].to(b.dtype) @ b
    dim = x.shape[-1]
    return -0.5 * dim * (math.log(2 * math.pi) + 2 * log_sigma) - ((x - mean) ** 2).sum(-1) / (2 * torch.exp(2 * log_sigma))


def kl_dirichlet(alpha: Float[Tensor, "n k1"], prior: Float[Tensor, " k1"]) -> Float[Tensor, " n"]:
    """KL(Dir(alpha) || Dir(a)) in nats."""
    return kl_divergence(Dirichlet(alpha), Dirichlet(prior.expand_as(alpha)))


def kl_normal(mu: Float[Tensor, "n z"], log_s: Float[Tensor, "n z"]) -> Float[Tensor, " n"]:
    """KL(N(mu, diag s^2) || N(0, I)) in nats."""
    return 0.5 * (mu**2 + torch.exp(2 * log_s) - 2 * log_s - 1).sum(-1)


def anchor_term(b: Float[Tensor, "k d"], anchors: Float[Tensor, "k d"]) -> Float[Tensor, ""]:
    """Sum over categories of |b_k - e_k|^2 / 2. The objective is averaged over rows, so that its weight tau is a precision per row."""
    return 0.5 * ((b - anchors) ** 2).sum()


def evidence_bound(label: Float[Tensor, " n"], terms: dict[str, Tensor], weights: ObjectiveWeights, ramp: float = 1.0) -> Float[Tensor, ""]:
    """Mean over rows of label + lambda_x reconstruction - ramp (beta_d KL_d + beta_z KL_z): what a fit on prompts, on simulated rows and on features ascend.

    `label` is the weighed label term, `terms` the label-free ones of `EnhancerNetwork.terms`; `ramp` in [0, 1] warms up the KL weights.
    """
    divergence = weights.kl_d * terms["kl_d"] + weights.kl_z * terms["kl_z"]
    return (label + weights.reconstruction * terms["reconstruction"] - ramp * divergence).mean()
