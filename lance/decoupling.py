"""How far content and safety are apart in the enhancer's latent space: codes to probe, and traversals of one with the other held."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float

from lance.corpus import Prompt
from lance.enhancer import VariationalEnhancer
from lance.fitting import twin_pairs


class Codes(NamedTuple):
    """What the enhancer makes of prompts.

    x : float (n, D)
        Scaled frozen embeddings, which the decoder explains.
    z : float (n, dz)
        Mean of q(z | x, d_bar): content.
    d_bar : float (n, K + 1)
        Mean of q(d | x): the rejection distribution.
    """

    x: np.ndarray
    z: np.ndarray
    d_bar: np.ndarray


@torch.no_grad()
def codes(enhancer: VariationalEnhancer, texts: Sequence[str]) -> Codes:
    """Embedding, content and distribution of each prompt; the embedding of a long one is the mean over its windows.

    Raises
    ------
    ModelError
        When the enhancer is not fitted.
    """
    d_bar = torch.from_numpy(enhancer.predict_proba(texts))
    net = enhancer.network
    assert net is not None
    x = net.scaled(enhancer.base.encode(texts))
    z, _ = net.posterior_z(x, d_bar)
    return Codes(x.numpy(), z.numpy(), d_bar.numpy())


def traverse(enhancer: VariationalEnhancer, found: Codes, leaf: str, strength: float = 1.0) -> Float[np.ndarray, "n d"]:
    """Embeddings of the same prompts with another distribution: x - sum_k d_k b_k + strength b_leaf. Content z and noise stay as they are.

    `leaf` may be `benign`, which adds no direction. A strength above 1 leaves the simplex: it moves on in the direction of the leaf.

    Raises
    ------
    TaxonomyError
        When the leaf is not in the taxonomy.
    """
    k = enhancer.taxonomy.index(leaf)
    net = enhancer.network
    assert net is not None
    b = net.directions.detach().numpy()
    towards = np.zeros_like(b[0]) if k == 0 else b[k - 1]
    return np.asarray(found.x - found.d_bar[:, 1:] @ b + strength * towards)


def twin_ranks(vectors: Float[np.ndarray, "n f"], prompts: Sequence[Prompt]) -> np.ndarray:
    """For each pair of twins among the prompts, how many other prompts are nearer to the noncompliant half than its benign twin is (cosine); 0 is best."""
    unit = vectors - vectors.mean(0)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-12)
    ranks = []
    for i, j in twin_pairs(prompts):
        near = unit @ unit[i]
        near[i] = -np.inf
        ranks.append(int((near > near[j]).sum()))
    return np.array(ranks)
