"""What the enhancer says of a prompt: a Dirichlet over rejection categories, and everything that follows from it in closed form."""

import html
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from scipy.special import betaincc, betaincinv, digamma

from lance.taxonomy import BENIGN, Taxonomy


@dataclass(frozen=True, eq=False)
class RejectionDistribution:
    """q(d | x) = Dir(alpha) over benign and the leaves (or the categories) of a taxonomy.

    The coordinates partition into groups whose masses are again Dirichlet, with the sums of alpha as parameters; the risk rho = 1 - d_0 is therefore
    exactly Beta(A - alpha_0, alpha_0), with A the sum of alpha.

    Attributes
    ----------
    keys : tuple of str
        Coordinates; the first is benign.
    alpha : float array (K + 1,)
        Concentrations, all > 0.
    """

    keys: tuple[str, ...]
    alpha: np.ndarray
    taxonomy: Taxonomy

    def __post_init__(self) -> None:
        alpha = np.asarray(self.alpha, dtype=np.float64)
        if alpha.shape != (len(self.keys),) or not np.isfinite(alpha).all() or (alpha <= 0).any():
            raise ValueError(f"alpha must hold {len(self.keys)} finite values > 0, found shape {alpha.shape} with minimum {alpha.min(initial=np.inf):g}")
        object.__setattr__(self, "alpha", alpha)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RejectionDistribution) and self.keys == other.keys and np.array_equal(self.alpha, other.alpha)

    def __hash__(self) -> int:
        return hash((self.keys, self.alpha.tobytes()))

    @property
    def concentration(self) -> float:
        """A, the sum of alpha: how much evidence there is."""
        return float(self.alpha.sum())

    @cached_property
    def mean(self) -> dict[str, float]:
        """d_bar = alpha / A: expected weight of each coordinate; sums to 1."""
        return dict(zip(self.keys, (self.alpha / self.alpha.sum()).tolist(), strict=True))

    @property
    def risk(self) -> float:
        """E[rho] = 1 - alpha_0 / A, the expected mass of all reasons not simply to comply, in [0, 1]."""
        return 1.0 - self.mean[self.keys[0]]

    def risk_quantile(self, q: float) -> float:
        """The q-quantile of rho ~ Beta(A - alpha_0, alpha_0)."""
        if not 0 <= q <= 1:
            raise ValueError(f"a quantile lies in [0, 1], found {q!r}")
        return float(betaincinv(self.alpha[1:].sum(), self.alpha[0], q))

    @cached_property
    def risk_upper(self) -> float:
        """U95: the 95 % quantile of the risk; the figure that the refiner brings down."""
        return self.risk_quantile(0.95)

    @cached_property
    def risk_interval(self) -> tuple[float, float]:
        """The central 90 % interval of the risk (5 % and 95 % quantiles)."""
        return self.risk_quantile(0.05), self.risk_upper

    def risk_exceeds(self, t: float) -> float:
        """P(rho > t)."""
        return float(betaincc(self.alpha[1:].sum(), self.alpha[0], t))

    @cached_property
    def shares(self) -> dict[str, float]:
        """pi_k = alpha_k / (A - alpha_0): weights of the categories among themselves; the mixing weights of the multi-way gradient."""
        rest = self.alpha[1:]
        return dict(zip(self.keys[1:], (rest / rest.sum()).tolist(), strict=True))

    @property
    def vacuity(self) -> float:
        """(K + 1) / A, at most 1: how little evidence there is (subjective logic; Sensoy et al., 2018)."""
        return min(1.0, len(self.keys) / self.concentration)

    @property
    def entropy(self) -> float:
        """H[d_bar] in nats: total uncertainty."""
        p = self.alpha / self.alpha.sum()
        return float(-(p * np.log(p)).sum())

    @property
    def epistemic(self) -> float:
        """H[d_bar] - E_q H[d] in nats: the part of the uncertainty that more evidence would remove (Malinin and Gales, 2018)."""
        p = self.alpha / self.alpha.sum()
        expected = -(p * (digamma(self.alpha + 1) - digamma(self.concentration + 1))).sum()
        return max(0.0, self.entropy - float(expected))

    @property
    def share_entropy(self) -> float:
        """Entropy of the shares over ln K, in [0, 1]; near 1 the reasons are diffuse."""
        pi = np.array(list(self.shares.values()))
        return float(-(pi * np.log(pi)).sum() / np.log(len(pi))) if len(pi) > 1 else 0.0

    @property
    def top(self) -> str:
        """Key of the coordinate with the largest mean, benign included."""
        return self.keys[int(self.alpha.argmax())]

    def by(self, level: str) -> "RejectionDistribution":
        """The distribution over `"leaf"` (itself) or `"category"`: sums of alpha, an exact Dirichlet again."""
        if level not in ("leaf", "category"):
            raise ValueError(f"level must be 'leaf' or 'category', found {level!r}")
        if level == "leaf" or self.keys == self.taxonomy.category_keys:
            return self
        alpha = np.bincount(self.taxonomy.groups(), weights=self.alpha)
        return RejectionDistribution(self.taxonomy.category_keys, alpha, self.taxonomy)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: means by leaf and by category, the risk and its measures, and alpha itself."""
        low, high = self.risk_interval
        return {
            "distribution": self.mean,
            "categories": self.by("category").mean,
            "risk": self.risk,
            "risk_lower": low,
            "risk_upper": high,
            "vacuity": self.vacuity,
            "epistemic": self.epistemic,
            "entropy": self.entropy,
            "top": self.top,
            "top_category": self.by("category").top,
            "alpha": dict(zip(self.keys, self.alpha.tolist(), strict=True)),
        }

    def __repr__(self) -> str:
        ranked = sorted(self.mean.items(), key=lambda kv: -kv[1])[:3]
        low, high = self.risk_interval
        return f"RejectionDistribution({', '.join(f'{k} {v:.2f}' for k, v in ranked)}; risk {self.risk:.2f} [{low:.2f}, {high:.2f}])"

    def _repr_html_(self) -> str:
        low, high = self.risk_interval
        rows = []
        for key, value in sorted(self.mean.items(), key=lambda kv: -kv[1]):
            if value < 0.01:
                continue
            c = self.taxonomy.benign if key == BENIGN else self.taxonomy[key]
            bar = f'<div style="background:{c.colour};width:{value * 100:.1f}%;height:0.8em"></div>'
            rows.append(f'<tr><td style="text-align:left">{html.escape(c.name)}</td><td style="width:16em">{bar}</td><td>{value:.2f}</td></tr>')
        return f"<table><caption>risk {self.risk:.2f}, 90 % interval {low:.2f} to {high:.2f}</caption>{''.join(rows)}</table>"
