"""Near-duplicate groups, splits that keep them together, and the removal of evaluation prompts from training rows."""

import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from lance.corpus import SPLITS, DataWarning, Prompt, read_prompts, write_prompts
from lance.errors import DataError, LanceError


def near_duplicate_groups(prompts: Sequence[Prompt], vectors: np.ndarray, *, cosine: float = 0.85) -> np.ndarray:
    """Group index of each prompt, (n,): twins, and prompts with embedding cosine above the limit, share a group (and so do chains of them).

    `vectors` are embeddings of length 1, (n, D).
    """
    index = {p.id: i for i, p in enumerate(prompts) if p.id}
    pairs = [(i, index[p.twin]) for i, p in enumerate(prompts) if p.twin in index]
    for start in range(0, len(prompts), 1024):
        near = np.argwhere(vectors[start : start + 1024] @ vectors.T > cosine)
        pairs += [(start + int(i), int(j)) for i, j in near]
    rows, cols = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
    graph = coo_matrix((np.ones(len(rows)), (rows, cols)), shape=(len(prompts), len(prompts)))
    return np.asarray(connected_components(graph, directed=False)[1])


def assign_splits(prompts: Sequence[Prompt], groups: np.ndarray, *, shares: Sequence[float] = (0.7, 0.15, 0.15), seed: int = 0) -> list[Prompt]:
    """Prompts with a split each; groups stay whole, and each label set is spread over the splits as evenly as groups allow.

    A group of which some prompt has a split already goes there (to that of the first such prompt), so that a corpus can grow without moving its rows.
    """
    rng = np.random.default_rng(seed)
    members: dict[int, list[int]] = {}
    for i, g in enumerate(groups.tolist()):
        members.setdefault(g, []).append(i)
    filled: dict[tuple[str, str], float] = {}
    out: list[Prompt] = list(prompts)

    def put(group: int, split: str) -> None:
        for i in members[group]:
            key = (split, _stratum(prompts[i]))
            filled[key] = filled.get(key, 0) + 1
            out[i] = replace(prompts[i], split=split)

    settled = {g: next((prompts[i].split for i in rows if prompts[i].split), None) for g, rows in members.items()}
    for g, split in settled.items():
        if split:
            put(g, split)
    for g in sorted((g for g, split in settled.items() if not split), key=lambda g: (-len(members[g]), rng.random())):
        need = np.zeros(len(SPLITS))
        for label in (_stratum(prompts[i]) for i in members[g]):
            total = 1 + sum(filled.get((s, label), 0) for s in SPLITS)
            need += [share - filled.get((s, label), 0) / total for s, share in zip(SPLITS, shares, strict=True)]
        put(g, SPLITS[int(np.argmax(need + 1e-6 * rng.random(len(need))))])
    return out


def without_evaluation_prompts(
    train: Sequence[Prompt], evaluation: Sequence[Prompt], train_vectors: np.ndarray, evaluation_vectors: np.ndarray, *, cosine: float = 0.95
) -> list[Prompt]:
    """Training rows that are no copies of evaluation prompts: neither equal after folding case and punctuation, nor above the embedding cosine."""
    if not train or not evaluation:
        return list(train)
    taken = {_folded(p.text) for p in evaluation}
    nearest = np.concatenate([(train_vectors[i : i + 1024] @ evaluation_vectors.T).max(1) for i in range(0, len(train), 1024)])
    return [p for p, c in zip(train, nearest, strict=True) if c <= cosine and _folded(p.text) not in taken]


def _stratum(p: Prompt) -> str:
    return p.labels[0] if p.labels else ("contrast" if p.twin else "benign")


def _folded(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.lower()))


def main(path: str) -> None:
    """Give a split to those prompts of a corpus file that have none yet, and write the file back.

    Raises
    ------
    DataError
        When a row of the file is invalid: it would be missing from what is written.
    """
    from lance.encoder import PromptEncoder

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", DataWarning)
            prompts = read_prompts(path)
    except DataWarning as error:
        raise DataError(f"{error}; mend that line first, nothing was written") from error
    vectors = PromptEncoder.from_pretrained().encode([p.text for p in prompts]).numpy()
    write_prompts(assign_splits(prompts, near_duplicate_groups(prompts, vectors)), path)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("usage: python -m lance.splits CORPUS.jsonl")
    try:
        main(sys.argv[1])
    except LanceError as error:
        sys.exit(str(error))
