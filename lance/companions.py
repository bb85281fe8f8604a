"""What stands beside the prompts of the embedded corpus: annotation passes, answers, constructive declines, and texts outside its domain."""

import importlib.resources
from collections.abc import Mapping
from typing import Any

import numpy as np

from lance.corpus import read_rows
from lance.taxonomy import Taxonomy


def load_annotations() -> dict[str, tuple[dict[str, float], ...]]:
    """Three independent passes over the prompts with several leaves: weights over leaves and `benign` that sum to 1, by the id of the prompt.

    Their mean is the `distribution` of the prompt.
    """
    return {row["id"]: tuple(row["passes"]) for row in _rows("annotations.jsonl")}


def load_answers() -> dict[str, str]:
    """Helpful answers of one to four sentences, by the id of a benign prompt, or of a refined one as `refined_prompts` names it."""
    return {row["id"]: row["answer"] for row in _rows("answers.jsonl")}


def load_declines() -> dict[str, tuple[str, ...]]:
    """Constructive declines by leaf: a reason, what can be offered instead, often a question. No two open with the same five words."""
    out: dict[str, list[str]] = {}
    for row in _rows("declines.jsonl"):
        out.setdefault(row["leaf"], []).append(row["text"])
    return {leaf: tuple(texts) for leaf, texts in out.items()}


def load_out_of_domain() -> dict[str, tuple[str, ...]]:
    """Texts outside the domain of the embedded models, by kind: `language` (other than English), `code` (bare snippets), `gibberish`. Only to measure with."""
    out: dict[str, list[str]] = {}
    for row in _rows("out_of_domain.jsonl"):
        out.setdefault(row["kind"], []).append(row["text"])
    return {kind: tuple(texts) for kind, texts in out.items()}


def agreement(annotations: Mapping[str, tuple[Mapping[str, float], ...]], taxonomy: Taxonomy) -> dict[str, float]:
    """How far the passes agree.

    Returns
    -------
    dict
        `distance`: mean total variation distance, in [0, 1], between two passes over one prompt. `chance`: the same between passes over different prompts.
        `alpha` = 1 - distance / chance: Krippendorff's alpha (Educational and Psychological Measurement, 1970) with this distance. `same_top`: share of the
        prompts on whose strongest coordinate all passes agree.
    """
    table = np.array([[[p.get(k, 0.0) for k in taxonomy.keys] for p in passes] for passes in annotations.values()])  # prompts, passes, coordinates
    n, m, _ = table.shape
    within = [np.abs(table[:, a] - table[:, b]).sum(1).mean() / 2 for a in range(m) for b in range(a)]
    flat = table.reshape(n * m, -1)
    total = sum(float(np.abs(flat[i] - flat).sum()) for i in range(len(flat))) / 2
    same = float(np.sum(within)) * 2 * n  # pairs within a prompt, both ways round
    chance = (total - same) / (n * m * (n * m - m))
    distance = float(np.mean(within))
    top = table.argmax(2)
    return {"distance": distance, "chance": chance, "alpha": 1 - distance / chance, "same_top": float((top == top[:, :1]).all(1).mean())}


def disagreement(annotations: Mapping[str, tuple[Mapping[str, float], ...]], taxonomy: Taxonomy) -> np.ndarray:
    """Between which coordinates the passes move mass: symmetric (K + 1, K + 1), zero on the diagonal; its upper triangle adds up to the mean distance.

    From pass p to pass q of one prompt, what p has more of some coordinates goes to those of which q has more, in proportion; averaged over pairs of passes.
    """
    moved = np.zeros((len(taxonomy) + 1, len(taxonomy) + 1))
    count = 0
    for passes in annotations.values():
        table = np.array([[p.get(k, 0.0) for k in taxonomy.keys] for p in passes])
        for a in range(len(table)):
            for b in range(a):
                more, less = np.maximum(table[a] - table[b], 0), np.maximum(table[b] - table[a], 0)
                count += 1
                if more.sum() > 0:
                    moved += np.outer(more, less) / more.sum()
    return (moved + moved.T) / max(count, 1)


def corpus_file(name: str) -> str:
    """Path of a file of the embedded corpus: `prompts.jsonl`, `annotations.jsonl`, `answers.jsonl`, `declines.jsonl`, …"""
    return str(importlib.resources.files("lance") / "data" / "corpus" / name)


def _rows(name: str) -> list[dict[str, Any]]:
    return [row for _, row in read_rows(corpus_file(name))]
