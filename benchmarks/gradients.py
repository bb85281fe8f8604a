"""How exact the gradients are: the identity in float64, completeness of integrated gradients, and spans against the corpus's annotated ones.

usage: .venv/bin/python benchmarks/gradients.py [--prompts 200]

Prompts are noncompliant ones of the corpus's test split. Spans are compared with the annotated spans word by word (content words; precision, recall, F1),
beside a baseline that marks as many random content words.
"""

import argparse
import json

import numpy as np
import torch

from lance import Lance, load_corpus
from lance.words import content_words


def identity_error(lance: Lance, text: str) -> float:
    """Relative error of grad logit(rho_bar) = sum_k pi_k (grad u_k - grad u_0) with respect to the embedding, in float64."""
    enhancer = lance.enhancer
    x = enhancer.encoder.encode([text]).double().requires_grad_(True)
    u = torch.log(enhancer.alpha_of(x))[0]
    grads = torch.stack([torch.autograd.grad(u[k], x, retain_graph=True)[0][0] for k in range(len(u))])
    pi = torch.softmax(u[1:], 0).detach()
    left = torch.autograd.grad(torch.logsumexp(u[1:], 0) - u[0], x)[0][0]
    right = (pi[:, None] * (grads[1:] - grads[0])).sum(0)
    return float((left - right).norm() / left.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=200)
    args = parser.parse_args()
    lance = Lance.from_pretrained()
    prompts = [p for p in load_corpus("test") if not p.benign][: args.prompts]
    rng = np.random.default_rng(0)
    lance.enhancer._fitted().double()
    identity = [identity_error(lance, p.text) for p in prompts]
    lance.enhancer._fitted().float()
    errors, scores, baseline = [], [], []
    for p in prompts:
        gradient = lance.builder.build(p.text, check_degenerate=False)
        errors += [g.completeness_error for g in gradient]
        words = content_words(p.text)
        true = {w for w in words if any(s.start < w[1] and w[0] < s.end for s in p.spans)}
        found = {w for w in words for g in gradient for s in g.spans if s.start < w[1] and w[0] < s.end}
        if gradient.outcome == "low_risk" or not true:
            continue
        random = {words[i] for i in rng.permutation(len(words))[: len(found)]}
        for picked, out in ((found, scores), (random, baseline)):
            hit = len(picked & true)
            out.append(2 * hit / (len(picked) + len(true)) if picked or true else 0.0)
    print(
        json.dumps(
            {
                "prompts": len(prompts),
                "identity_max_relative_error": max(identity),
                "explained_categories": len(errors),
                "completeness_within_5_percent": float(np.mean(np.array(errors) <= 0.05)),
                "completeness_p95": float(np.quantile(errors, 0.95)),
                "span_word_f1": float(np.mean(scores)),
                "span_word_f1_random": float(np.mean(baseline)),
                "spans_compared": len(scores),
            }
        )
    )


if __name__ == "__main__":
    main()
