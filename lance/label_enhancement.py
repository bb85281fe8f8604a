"""Label enhancement for any feature matrix: from logical labels to label distributions, by the network and the objective of the text enhancer.

Only the likelihood of the label differs. A prompt's label is a set of candidates; the logical labels of the standard benchmark are the largest
coordinates of the distribution, until their mass passes one half (`top_set_term`). The posterior q(d | x) reads the features alone, so that new rows need
no label; where the label of a row is known, its distribution is q(d | x) conditioned on it.
"""

import math

import numpy as np
import torch
from jaxtyping import Bool, Float
from sklearn.base import BaseEstimator
from sklearn.decomposition import PCA
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.distributions import Dirichlet

from lance.errors import DataError, ModelError
from lance.network import Ascent, EnhancerNetwork
from lance.objective import ObjectiveWeights, evidence_bound, sample_simplex, top_set_term

EVIDENCE_MAX = 2000.0


def logical_labels(distributions: Float[np.ndarray, "n c"], mass: float = 0.5) -> Bool[np.ndarray, "n c"]:
    """The standard protocol's labels: the largest coordinates of each row, added in descending order until their mass passes `mass`."""
    order = np.argsort(-distributions, axis=1, kind="stable")
    before = np.take_along_axis(distributions, order, 1).cumsum(1) - np.take_along_axis(distributions, order, 1)
    chosen = np.zeros(distributions.shape, dtype=bool)
    np.put_along_axis(chosen, order, before <= mass + 1e-12, 1)
    return chosen


class LabelEnhancer(BaseEstimator):  # type: ignore[misc]
    """Label enhancement of logical labels over any features, with scikit-learn's verbs.

    `scale` and `evidence` were chosen on validation folds of SJAFFE (lowest KL, then Clark) and hold for every set; `evidence` is the one to change where
    distributions are known to be peaked (smaller) or nearly uniform (larger).

    Parameters
    ----------
    mass : float or None
        Where the labelling stopped: the mass that the labels of a row just pass. None: labels are the largest coordinates, however many.
    evidence : float
        Concentration of the prior, per label: d ~ Dir(evidence, ..., evidence).
    scale : float
        Prior standard deviation of a log-concentration as the features vary; the smaller, the less they say.
    components : int
        Principal components of the standardised features that are kept, at most.
    softness : float
        Resolution of d in the likelihood of a label, see `top_set_term`.
    weights : ObjectiveWeights, optional
        Of the objective. `binary`, `anchor` and `pair` have no meaning here and are ignored.
    latent_dim, hidden : int
        Of the decoder.
    draws : int
        Of d per row and step, in the label term.
    epochs, least_steps : int
        The fit takes the larger of the two lengths.
    batch_size : int
    lr : float
        AdamW's; ten times as much for the mean concentrations.
    random_state : int

    Attributes
    ----------
    network_ : EnhancerNetwork
    n_features_in_, n_labels_ : int

    Examples
    --------
    >>> d = LabelEnhancer().fit(X, L).transform(X, L)     # doctest: +SKIP
    """

    def __init__(
        self,
        *,
        mass: float | None = 0.5,
        evidence: float = 3.0,
        scale: float = 0.2,
        components: int = 200,
        softness: float = 0.01,
        weights: ObjectiveWeights | None = None,
        latent_dim: int = 10,
        hidden: int = 64,
        draws: int = 8,
        epochs: int = 15,
        least_steps: int = 150,
        batch_size: int = 256,
        lr: float = 0.005,
        random_state: int = 0,
    ) -> None:
        self.mass, self.evidence, self.scale, self.components, self.softness = mass, evidence, scale, components, softness
        self.weights, self.latent_dim, self.hidden, self.draws = weights, latent_dim, hidden, draws
        self.epochs, self.least_steps, self.batch_size, self.lr, self.random_state = epochs, least_steps, batch_size, lr, random_state

    def fit(self, X: np.ndarray, L: np.ndarray) -> "LabelEnhancer":
        """Maximise the objective on features X (n, p) and logical labels L (n, c), at least one label a row.

        Raises
        ------
        DataError
            When the arrays do not fit together, hold values that are not finite, or L is not of zeros and ones.
        """
        X, chosen = self._features(X), self._labels(L)
        if len(X) != len(chosen):
            raise DataError(f"X has {len(X)} rows and L has {len(chosen)}; they must be the same rows")
        if len(X) < 2:
            raise DataError("expected at least two rows")
        self.n_features_in_, self.n_labels_ = X.shape[1], chosen.shape[1]
        pca = PCA(min(self.components, X.shape[1], len(X) - 1), random_state=self.random_state)
        with np.errstate(invalid="ignore"):  # constant features have no variance to explain; they say nothing, which is fine
            self._reduce = make_pipeline(StandardScaler(), pca).fit(X)
        reduced = self._reduce.transform(X)
        self._norm = float(np.sqrt((reduced**2).sum(1).mean())) or 1.0
        features = torch.from_numpy(reduced / self._norm).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.random_state)
            self.network_ = self._fit_network(features, torch.from_numpy(chosen))
        return self

    def _fit_network(self, features: Float[Tensor, "n q"], chosen: Bool[Tensor, "n c"]) -> EnhancerNetwork:
        n, q = features.shape
        w = self.weights or ObjectiveWeights(kl_d=0.05)
        net = EnhancerNetwork(q, self.n_labels_ - 1, layers=0, hidden=self.hidden, latent_dim=self.latent_dim, dropout=0.0, alpha_max=EVIDENCE_MAX)
        net.prior.fill_(self.evidence)
        head = net.alpha_head
        torch.nn.init.zeros_(head.weight)
        torch.nn.init.constant_(head.bias, math.log(self.evidence))
        with torch.no_grad():
            x = net.scaled(features)
            for k in range(net.k):
                net.directions[k] = x[chosen[:, k + 1]].mean(0) - x.mean(0) if chosen[:, k + 1].any() else 0.0
        steps = max(self.least_steps, self.epochs * math.ceil(n / self.batch_size))
        others = [p for name, p in net.named_parameters() if name != "alpha_head.bias"]
        ascent = Ascent([{"params": [head.bias], "lr": 10 * self.lr}, {"params": others, "lr": self.lr}], steps, weight_decay=0.0)
        done = 0
        while done < steps:
            for i in torch.split(torch.randperm(n), self.batch_size):
                if done == steps:
                    break
                alpha = net.alpha(features[i])
                d = sample_simplex(alpha.expand(self.draws, -1, -1))
                label = torch.logsumexp(top_set_term(d, chosen[i], self.mass, self.softness), dim=0) - math.log(self.draws)
                bound = evidence_bound(w.label * label, net.terms(alpha, net.scaled(features[i])), w)
                prior = 0.5 * q * (head.weight**2).sum() / self.scale**2
                ascent.step(bound - prior / n)
                done += 1
        return net.eval().requires_grad_(False)

    def concentrations(self, X: np.ndarray) -> Float[np.ndarray, "n c"]:
        """alpha of q(d | x) = Dir(alpha), for rows without a label."""
        if not hasattr(self, "network_"):
            raise ModelError("this label enhancer is not fitted; call fit(X, L) first")
        X = self._features(X)
        if X.shape[1] != self.n_features_in_:
            raise DataError(f"X has {X.shape[1]} features, and the enhancer was fitted with {self.n_features_in_}")
        with torch.no_grad():
            return np.asarray(self.network_.alpha(torch.from_numpy(self._reduce.transform(X) / self._norm).float()).numpy())

    def transform(self, X: np.ndarray, L: np.ndarray | None = None) -> Float[np.ndarray, "n c"]:
        """Label distributions (n, c), rows summing to 1: means of q(d | x), or of q(d | x) conditioned on the logical labels where they are given."""
        alpha = self.concentrations(X)
        if L is None:
            return np.asarray(alpha / alpha.sum(1, keepdims=True))
        chosen = self._labels(L)
        if chosen.shape != alpha.shape:
            raise DataError(f"expected logical labels of shape {alpha.shape}, found {chosen.shape}")
        with torch.random.fork_rng(devices=[]):  # a sharper likelihood than that of the fit, which needs its gradient
            torch.manual_seed(self.random_state)
            return conditioned_mean(torch.from_numpy(alpha), torch.from_numpy(chosen), self.mass, self.softness / 2).numpy()

    def fit_transform(self, X: np.ndarray, L: np.ndarray) -> Float[np.ndarray, "n c"]:
        """`fit(X, L).transform(X, L)`: the recovered distributions of the rows that were fitted."""
        return self.fit(X, L).transform(X, L)

    def _features(self, X: np.ndarray) -> np.ndarray:
        X = np.asarray(X, dtype=np.float64)
        if X.ndim != 2 or not X.size:
            raise DataError(f"X must be a matrix (n, p), found an array of shape {X.shape}")
        if not np.isfinite(X).all():
            row, column = np.argwhere(~np.isfinite(X))[0]
            raise DataError(f"X has {X[row, column]} in row {row}, column {column}; fill or drop what is missing first")
        return X

    def _labels(self, L: np.ndarray) -> np.ndarray:
        L = np.asarray(L)
        if L.ndim != 2 or L.shape[1] < 2:
            raise DataError(f"L must be a matrix (n, c) with c >= 2, found an array of shape {L.shape}")
        if not np.isin(L, (0, 1)).all():
            raise DataError(f"L must hold zeros and ones, found {L[~np.isin(L, (0, 1))].flat[0]}; `logical_labels` makes them of distributions")
        if not L.any(axis=1).all():
            raise DataError(f"row {int(np.flatnonzero(~L.any(axis=1))[0])} of L has no label; leave it out of fit and call transform without labels")
        return L.astype(bool)


@torch.no_grad()
def conditioned_mean(
    alpha: Float[Tensor, "n c"], chosen: Bool[Tensor, "n c"], mass: float | None, softness: float, *, draws: int = 300, rounds: int = 5, rows: int = 512
) -> Float[Tensor, "n c"]:
    """E[d | L] for d ~ Dir(alpha), by adaptive importance sampling (Cappe et al., 2004): each round proposes around the mean of the round before, and the
    likelihood sharpens from round to round. Uses torch's generator.
    """
    found = []
    for a, labels in zip(torch.split(alpha, rows), torch.split(chosen, rows), strict=True):
        proposal = a
        for sharper in range(rounds - 1, -1, -1):
            d = Dirichlet(proposal).sample((draws,)).clamp_min(1e-9)
            log_weight = top_set_term(d, labels, mass, softness * 2.0**sharper) + ((a - proposal) * d.log()).sum(-1)
            weight = torch.softmax(log_weight, dim=0).unsqueeze(-1)
            mean = (weight * d).sum(0)
            proposal = mean * a.sum(1, keepdim=True) + 0.02
        found.append(mean)
    return torch.cat(found)
