"""The network of the variational label enhancer, for any feature matrix: posterior, decoder, and the label-free terms of the objective."""

import math
import warnings
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lance.objective import ALPHA_MAX, concentrations, kl_dirichlet, kl_normal, reconstruction_term, sample_simplex


class EnhancerNetwork(nn.Module):
    """Posterior and decoder: q(d | x), q(z | x, d), f(z) and the directions b.

    q(d | x) reads the embedding through `layers` hidden layers (0: linearly, as suits an encoder that is trained along).
    Embeddings of length 1 are multiplied by sqrt(D), so that x has about unit variance a coordinate.
    """

    centre: Tensor
    spread: Tensor
    anchors: Tensor
    prior: Tensor

    def __init__(
        self, dim: int, k: int, *, layers: int = 2, hidden: int = 128, latent_dim: int = 10, dropout: float = 0.1, alpha_max: float = ALPHA_MAX
    ) -> None:
        super().__init__()
        self.dim, self.k, self.latent_dim, self.alpha_max = dim, k, latent_dim, alpha_max
        trunk: list[nn.Module] = [nn.Dropout(dropout)]
        for i in range(layers):
            trunk += [nn.Linear(hidden if i else dim, hidden), nn.GELU(), nn.Dropout(dropout)]
        self.trunk = nn.Sequential(*trunk)
        self.alpha_head = nn.Linear(hidden if layers else dim, k + 1)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # latent_dim 0 is meant so
            self.z_head = nn.Sequential(nn.Linear(dim + k + 1, hidden), nn.GELU(), nn.Linear(hidden, 2 * latent_dim))
            self.content = nn.Sequential(nn.Linear(latent_dim, hidden), nn.GELU(), nn.Linear(hidden, dim))
        self.directions = nn.Parameter(torch.zeros(k, dim))
        self.log_sigma = nn.Parameter(torch.zeros(()))
        self.register_buffer("centre", torch.zeros(dim))
        self.register_buffer("spread", torch.ones(dim))
        self.register_buffer("anchors", torch.zeros(k, dim))
        self.register_buffer("prior", torch.ones(k + 1, dtype=torch.float64))

    def scaled(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return embedding * math.sqrt(self.dim)

    def alpha(self, embedding: Float[Tensor, "n d"]) -> Float[Tensor, "n k1"]:
        """Concentrations of q(d | x), float64."""
        return concentrations(self.alpha_head(self.trunk((self.scaled(embedding) - self.centre) / self.spread)), self.alpha_max)

    def posterior_z(self, x: Float[Tensor, "n d"], d: Float[Tensor, "n k1"]) -> tuple[Float[Tensor, "n z"], Float[Tensor, "n z"]]:
        """Mean and log standard deviation of q(z | x, d); x is the scaled embedding."""
        mu, log_s = self.z_head(torch.cat([(x - self.centre) / self.spread, d.to(x.dtype)], dim=-1)).chunk(2, dim=-1)
        return mu, log_s.clamp(-6, 3)

    def terms(self, alpha: Float[Tensor, "n k1"], x: Float[Tensor, "n d"]) -> dict[str, Float[Tensor, " n"]]:
        """The label-free terms of the objective for one batch; x is the scaled frozen embedding."""
        d = sample_simplex(alpha)
        mu, log_s = self.posterior_z(x, d)
        z = mu + torch.exp(log_s) * torch.randn_like(mu)
        return {
            "reconstruction": reconstruction_term(x, self.centre + self.content(z), d, self.directions, self.log_sigma),
            "kl_d": kl_dirichlet(alpha, self.prior),
            "kl_z": kl_normal(mu, log_s),
        }


class Ascent:
    """AdamW with a warm-up, a linear decay and clipped gradients, over a known number of steps."""

    def __init__(self, groups: list[dict[str, Any]], steps: int, *, weight_decay: float = 1e-4, clip: float = 5.0) -> None:
        self.groups, self.clip = groups, clip
        self.optimiser = torch.optim.AdamW(groups, weight_decay=weight_decay, fused=True)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimiser, lambda s: min(1.0, (s + 1) / (0.06 * steps + 1)) * max(0.02, 1 - s / steps))

    def step(self, objective: Tensor) -> None:
        self.optimiser.zero_grad()
        (-objective).backward()  # type: ignore[no-untyped-call]
        for group in self.groups:
            nn.utils.clip_grad_norm_(group["params"], self.clip)
        self.optimiser.step()
        self.schedule.step()
