"""A simulated world with known truth, and label enhancement in it: what binary labels, anchors and reconstruction each contribute.

The world follows the generative story of the enhancer: d ~ Dir(a), z ~ N(0, I), x = f(z) + sum_k d_k b_k + noise with a nonlinear content f and directions
b_k around anchors e_k. A category c ~ d is drawn for every row, so that p(y = 1 | d) = 1 - d_0 and p(c in S | d) = sum_{k in S} d_k, the likelihood of the
label term. The network and the terms of the objective are those of the library; only the encoder is missing, since x is given.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int

from lance.corpus import Labels
from lance.network import Ascent, EnhancerNetwork
from lance.objective import ObjectiveWeights, anchor_term, dirichlet_prior, evidence_bound, label_term

Supervision = Literal["binary", "candidates"] | float | int
Anchors = bool | Literal["permuted"] | Float[np.ndarray, "k d"]
ELBO = ObjectiveWeights(label=1.0, binary=1.0, reconstruction=1.0, kl_d=1.0, kl_z=1.0, anchor=0.02)


@dataclass(frozen=True)
class WorldConfig:
    """Sizes and strengths of a simulated world.

    `direction` and `content` are the lengths of a direction b_k and of a typical content vector f(z) - E f(z); `anchor_error` is the length of b_k - e_k
    as a share of `direction`; `noise` is sigma, per coordinate. `distractor` is the chance of a wrong category to stand in a candidate set.
    """

    k: int = 8
    dim: int = 32
    latent_dim: int = 4
    rows: int = 2000
    test_rows: int = 1000
    base_rate: float = 0.5
    direction: float = 4.0
    content: float = 6.0
    anchor_error: float = 0.5
    noise: float = 0.3
    distractor: float = 0.3

    def __post_init__(self) -> None:
        for name, least in {"k": 2, "dim": 2, "latent_dim": 1, "rows": 2, "test_rows": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, found {getattr(self, name)!r}")
        for name in ("direction", "content", "anchor_error", "noise"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise ValueError(f"{name} must be a finite number >= 0, found {value!r}")
        if not 0 < self.base_rate < 1:
            raise ValueError(f"base_rate must lie in (0, 1), found {self.base_rate!r}")
        if not 0 <= self.distractor < 1:
            raise ValueError(f"distractor must lie in [0, 1), found {self.distractor!r}")


@dataclass(frozen=True, eq=False)
class World:
    """Rows of a simulated world and the truth behind them; the last `config.test_rows` rows are for measuring.

    Attributes
    ----------
    x : float (n, D)
        What an encoder would give, in the decoder's scale.
    d : float (n, K + 1)
        True rejection distributions, index 0 benign.
    drawn : int (n,)
        The category c ~ d that a leaf label names; 0 is benign, and y = (c > 0).
    directions, anchors : float (K, D)
        b and e.
    """

    config: WorldConfig
    seed: int
    x: Float[np.ndarray, "n d"]
    d: Float[np.ndarray, "n k1"]
    drawn: Int[np.ndarray, " n"]
    directions: Float[np.ndarray, "k d"]
    anchors: Float[np.ndarray, "k d"]

    @property
    def test(self) -> slice:
        """The rows for measuring."""
        return slice(self.config.rows, None)

    def labels(self, supervision: Supervision) -> Labels:
        """Logical labels of the training rows.

        `"binary"`: benign or unsafe. `"candidates"`: unsafe rows get the drawn category among distractors. A number: that share of the unsafe rows has its
        drawn category as a leaf label, the rest are binary.
        """
        n, k = self.config.rows, self.config.k
        if isinstance(supervision, str):
            if supervision not in ("binary", "candidates"):
                raise ValueError(f"supervision must be 'binary', 'candidates' or a share in [0, 1], found {supervision!r}")
        elif not 0 <= supervision <= 1:
            raise ValueError(f"the share of leaf labels must lie in [0, 1], found {supervision!r}")
        rng = np.random.default_rng([self.seed, 1])
        drawn = self.drawn[:n]
        unsafe = drawn > 0
        own = np.eye(k + 1, dtype=bool)[drawn]
        others, order = rng.random((n, k + 1)), rng.random(n)
        candidates = own.copy()
        candidates[unsafe, 1:] = True
        if supervision == "candidates":
            candidates[unsafe] = own[unsafe] | (others[unsafe] < self.config.distractor)
            candidates[unsafe, 0] = False
        elif not isinstance(supervision, str):
            named = unsafe & (order < supervision)
            candidates[named] = own[named]
        return Labels(candidates, np.zeros(n), ~candidates[:, 1:].all(1))

    def top_one(self, means: Float[np.ndarray, "n k1"]) -> float:
        """Share of the noncompliant test rows whose strongest category is the true one; 1 / K on average for a guess. Benign is left aside."""
        noncompliant = self.drawn[self.test] > 0
        return float((means[noncompliant, 1:].argmax(1) == self.d[self.test][noncompliant, 1:].argmax(1)).mean())


def simulate(config: WorldConfig | None = None, seed: int = 0) -> World:
    """Draw a world: first its laws (anchors, directions, content), then its rows."""
    cfg = config or WorldConfig()
    rng = np.random.default_rng(seed)
    anchors = cfg.direction * _unit(rng.standard_normal((cfg.k, cfg.dim)))
    directions = anchors + cfg.anchor_error * cfg.direction * _unit(rng.standard_normal((cfg.k, cfg.dim)))
    inner, bend, outer = rng.standard_normal((cfg.latent_dim, 32)), rng.standard_normal(32), rng.standard_normal((32, cfg.dim))
    n = cfg.rows + cfg.test_rows
    d = rng.dirichlet(dirichlet_prior(cfg.k, cfg.base_rate).numpy(), n)
    content = np.tanh(rng.standard_normal((n, cfg.latent_dim)) @ inner + bend) @ outer
    content -= content.mean(0)
    content *= cfg.content / np.sqrt((content**2).sum(1).mean())  # so that `content` is comparable with `direction` whatever was drawn
    x = content + d[:, 1:] @ directions + cfg.noise * rng.standard_normal((n, cfg.dim))
    drawn = (rng.random((n, 1)) > d.cumsum(1)[:, :-1]).sum(1)
    return World(cfg, seed, x, d, drawn, directions, anchors)


@dataclass(frozen=True, eq=False)
class SimulatedFit:
    """What label enhancement recovers from the test rows of a world.

    Attributes
    ----------
    alpha : float64 (n, K + 1)
        Concentrations of q(d | x), from x alone.
    directions : float (K, D)
        The decoder's b after training.
    """

    alpha: Float[np.ndarray, "n k1"]
    directions: Float[np.ndarray, "k d"]

    @property
    def means(self) -> Float[np.ndarray, "n k1"]:
        """Recovered distributions d_bar."""
        return np.asarray(self.alpha / self.alpha.sum(1, keepdims=True))


def fit_simulated(
    world: World,
    supervision: Supervision = "binary",
    anchors: Anchors = True,
    reconstruction: bool = True,
    seed: int = 0,
    *,
    weights: ObjectiveWeights = ELBO,
    latent_dim: int = 10,
    epochs: int = 30,
    batch_size: int = 128,
    lr: float = 6e-3,
) -> SimulatedFit:
    """Train the enhancer's network on the training rows of a world and read the test rows.

    Parameters
    ----------
    supervision : "binary", "candidates" or a share in [0, 1]
        What is known of the labels; see `World.labels`.
    anchors : bool, "permuted" or array (K, D)
        True: the world's own. False: none; directions start at random, with the anchors' mean length, and are free. `"permuted"`: each category gets
        the anchor of the next one. An array: other anchors.
    reconstruction : bool
        Whether the decoder has to explain x.
    weights : ObjectiveWeights
        By default all 1, which makes the objective a composite ELBO, but for the pull of the anchors.

    Raises
    ------
    ValueError
        When an argument does not fit.
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, found {epochs!r} and {batch_size!r}")
    cfg = world.config
    labels = world.labels(supervision)
    rng = np.random.default_rng([world.seed, seed, 2])  # a stream of its own: it must not repeat the draws that made the world
    start = _anchors(world, anchors, rng)
    w = replace(weights, reconstruction=weights.reconstruction * reconstruction, anchor=0.0 if anchors is False else weights.anchor)
    x = torch.from_numpy(world.x).float() / math.sqrt(cfg.dim)  # the network multiplies embeddings by sqrt(D)
    train, test = x[: cfg.rows], x[world.test]
    candidates, eta = torch.from_numpy(labels.candidates), torch.from_numpy(labels.eta)
    weight = torch.where(torch.from_numpy(labels.known), w.label, w.binary).double()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(rng.integers(2**31)))
        net = _network(cfg, train, start, latent_dim)
        steps = epochs * math.ceil(cfg.rows / batch_size)
        ascent = Ascent([{"params": list(net.parameters()), "lr": lr}], steps)
        for step, i in enumerate(_batches(cfg.rows, batch_size, epochs, rng)):
            alpha = net.alpha(train[i])
            label = weight[i] * label_term(alpha, candidates[i], eta[i])
            ramp = min(1.0, (step + 1) / (0.25 * steps))
            ascent.step(evidence_bound(label, net.terms(alpha, net.scaled(train[i])), w, ramp) - w.anchor * anchor_term(net.directions, net.anchors))
        with torch.no_grad():
            return SimulatedFit(net.alpha(test).numpy(), net.directions.detach().double().numpy())


def _batches(rows: int, size: int, epochs: int, rng: np.random.Generator) -> Iterator[Int[torch.Tensor, " b"]]:
    for _ in range(epochs):
        order = torch.from_numpy(rng.permutation(rows))
        for start in range(0, rows, size):
            yield order[start : start + size]


def _anchors(world: World, anchors: Anchors, rng: np.random.Generator) -> np.ndarray:
    if isinstance(anchors, np.ndarray):
        if anchors.shape != world.anchors.shape:
            raise ValueError(f"expected anchors of shape {world.anchors.shape}, found {anchors.shape}")
        return anchors
    if isinstance(anchors, str):
        if anchors != "permuted":
            raise ValueError(f"anchors must be True, False, 'permuted' or an array, found {anchors!r}")
        return np.roll(world.anchors, -1, axis=0)
    if anchors:
        return world.anchors
    return np.asarray(np.linalg.norm(world.anchors, axis=1).mean() * _unit(rng.standard_normal(world.anchors.shape)))


def _network(cfg: WorldConfig, x: Float[torch.Tensor, "n d"], anchors: np.ndarray, latent_dim: int) -> EnhancerNetwork:
    net = EnhancerNetwork(cfg.dim, cfg.k, latent_dim=latent_dim, dropout=0.0)
    scaled = net.scaled(x)
    net.centre.copy_(scaled.mean(0))
    net.spread.copy_(scaled.std(0).clamp_min(1e-3))
    net.prior.copy_(dirichlet_prior(cfg.k, cfg.base_rate))
    net.anchors.copy_(torch.from_numpy(anchors))
    with torch.no_grad():
        net.directions.copy_(net.anchors)
    return net


def _unit(v: np.ndarray) -> np.ndarray:
    return np.asarray(v / np.linalg.norm(v, axis=-1, keepdims=True))
