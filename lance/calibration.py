"""Temperature calibration of Dirichlet posteriors on labelled prompts."""

import math

import numpy as np
from scipy.optimize import minimize_scalar

from lance.corpus import Labels


def fit_temperature(alpha: np.ndarray, labels: Labels) -> float:
    """T in [0.08, 12] that minimises the negative log-likelihood of the labels under the tempered means."""

    def nll(log_t: float) -> float:
        return -float(label_log_likelihood(temper(alpha, math.exp(log_t)), labels).mean())

    return float(math.exp(minimize_scalar(nll, bounds=(-2.5, 2.5), method="bounded").x))


def temper(alpha: np.ndarray, temperature: float) -> np.ndarray:
    """alpha^(1/T), rescaled so that its sum A stays: the mean is softened or sharpened, the evidence kept."""
    log = np.log(alpha) / temperature
    p = np.exp(log - log.max(1, keepdims=True))
    return np.asarray(alpha.sum(1, keepdims=True) * p / p.sum(1, keepdims=True))


def label_log_likelihood(alpha: np.ndarray, labels: Labels) -> np.ndarray:
    """ln sum_S d_bar, or the mean of ln d_bar over S where every member applies; (n,), in nats."""
    p = alpha / alpha.sum(1, keepdims=True)
    any_of = np.log((p * labels.candidates).sum(1))
    all_of = (np.log(p) * labels.candidates).sum(1) / labels.candidates.sum(1)
    return np.asarray((1 - labels.eta) * any_of + labels.eta * all_of)
