"""Training the embedded rewriter: pairs from a corpus, exemplars for each, and the ascent of the likelihood."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from lance.corpus import Prompt
from lance.encoder import PromptEncoder
from lance.errors import DataError
from lance.network import Ascent
from lance.rewriter import Rewriter, RewriteRequest, direction
from lance.taxonomy import Taxonomy

Pair = tuple[RewriteRequest, str]
NO_EXEMPLAR, NO_SPANS = 0.15, 0.2  # shares of the requests that lose their exemplar, or their marks, so that the model can do without
NEIGHBOURS, TOO_NEAR = 8, 0.85  # what is nearer to a prompt than that is a near-duplicate of it, as in the splits


def rewrite_pairs(prompts: Sequence[Prompt], taxonomy: Taxonomy) -> list[Pair]:
    """A request and its target for each rewrite of the prompts: their spans, and one direction for each of their leaves, all of equal weight."""
    out: list[Pair] = []
    for p in prompts:
        leaves = [taxonomy[key] for key in p.labels]
        directions = tuple((1 / len(leaves), direction(leaf.name, leaf.drop, leaf.turn)) for leaf in leaves)
        out += [(RewriteRequest(p.text, tuple((s.start, s.end) for s in p.spans), directions), target) for target in p.refined]
    return out


def nearest_targets(pairs: Sequence[Pair], encoder: PromptEncoder, of: Sequence[Pair] | None = None) -> list[list[str]]:
    """For each pair (or each of other pairs, `of`) the targets of the most similar ones among `pairs`, best first, near-duplicates aside."""
    x = encoder.encode([r.text for r, _ in pairs]).numpy()
    y = encoder.encode([t for _, t in pairs]).numpy()
    asked = x if of is None else encoder.encode([r.text for r, _ in of]).numpy()
    out = []
    for row in asked:
        cosine = x @ row
        score = np.where(cosine > TOO_NEAR, -np.inf, 0.5 * cosine + y @ row)
        best = np.argsort(-score, kind="stable")[:NEIGHBOURS]
        out.append(list(dict.fromkeys(pairs[i][1] for i in best if np.isfinite(score[i]))))
    return out


def fit_rewriter(
    rewriter: Rewriter,
    pairs: Sequence[Pair],
    neighbours: Sequence[Sequence[str]],
    validation: Sequence[Pair] = (),
    *,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Rewriter:
    """Maximise the likelihood of the targets, token by token (in place).

    Parameters
    ----------
    rewriter : Rewriter
    pairs : sequence of (request, target)
    neighbours : sequence of sequences of str
        For each pair the exemplars to draw from, anew in each epoch; it may be empty.
    validation : sequence of (request, target)
        Measured after each epoch.

    Raises
    ------
    DataError
        When there are no pairs, or not one list of exemplars for each.
    """
    if not pairs or len(pairs) != len(neighbours):
        raise DataError(f"expected pairs to learn from and exemplars for each; found {len(pairs)} pairs, {len(neighbours)} lists of exemplars")
    c, rng = rewriter.config, np.random.default_rng(rewriter.config.seed)
    sources, shown = list(dict.fromkeys(r.text for r, _ in pairs)), list(dict.fromkeys(["", *(t for near in neighbours for t in near)]))
    states = dict(zip(sources, rewriter.tokens(sources, c.prompt_tokens), strict=True))
    examples = dict(zip(shown, rewriter.tokens(shown, c.exemplar_tokens), strict=True))
    sentences, targets = rewriter.sentences([r for r, _ in pairs]), rewriter.targets([t for _, t in pairs])
    vocabulary = {i for ids in targets for i in ids} | {i for t in states.values() for i in t.ids} | {rewriter.start}
    lengths = np.array([len(t) + len(states[r.text].ids) / 4 for (r, _), t in zip(pairs, targets, strict=True)])
    with torch.random.fork_rng():
        torch.manual_seed(c.seed)
        net = rewriter.network = rewriter.new_network(sorted(vocabulary))
        epochs = [list(_batches(lengths, c.batch_size, rng)) for _ in range(c.epochs)]
        ascent = Ascent([{"params": list(net.parameters()), "lr": c.lr}], sum(map(len, epochs)), weight_decay=c.weight_decay, clip=1.0)
        rewriter.history = []
        for epoch, batches in enumerate(epochs, start=1):
            net.train()
            total = count = 0.0
            for index in batches:
                drawn = [_drawn(pairs[i][0], neighbours[i], rng) for i in index]
                read = rewriter.collate(drawn, [states[r.text] for r in drawn], [examples[r.exemplar] for r in drawn], sentences)
                likelihood, tokens = rewriter.likelihood(net, read, [targets[i] for i in index])
                ascent.step(likelihood / tokens)
                total, count = total + float(likelihood.detach()), count + tokens
            net.eval()
            rewriter.history.append({"epoch": float(epoch), "nll": -total / count} | ({"validation_nll": rewriter.loss(validation)} if validation else {}))
            if progress:
                progress(rewriter.history[-1])
    net.requires_grad_(False)
    rewriter.round()
    return rewriter


def _drawn(request: RewriteRequest, near: Sequence[str], rng: np.random.Generator) -> RewriteRequest:
    exemplar = near[int(rng.integers(len(near)))] if near and rng.random() >= NO_EXEMPLAR else ""
    return RewriteRequest(request.text, () if rng.random() < NO_SPANS else request.spans, request.directions, exemplar)


def _batches(lengths: np.ndarray, size: int, rng: np.random.Generator) -> Iterator[list[int]]:
    """Shuffled batches of similar length."""
    order = rng.permutation(len(lengths))
    chunks = [order[i : i + 32 * size] for i in range(0, len(order), 32 * size)]
    found = [chunk[np.argsort(lengths[chunk], kind="stable")][i : i + size] for chunk in chunks for i in range(0, len(chunk), size)]
    for i in rng.permutation(len(found)):
        yield found[i].tolist()
