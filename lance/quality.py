"""How good a corpus of labelled prompts is, in figures: variety, near-duplicates, splits, nearness to evaluation prompts, and rows that break its schema."""

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lance.companions import corpus_file
from lance.corpus import Prompt
from lance.metrics import distinct_n, opening
from lance.splits import near_duplicate_groups

NEAR, GROUP, COPIED = 0.92, 0.85, 0.90  # cosines above which: no two rows but twins; one split; too near to an evaluation prompt


def corpus_schema() -> dict[str, Any]:
    """The JSON Schema (draft 2020-12) of a row of the embedded corpus."""
    return dict(json.loads(Path(corpus_file("schema.json")).read_text(encoding="utf-8")))


def variety(texts: Sequence[str]) -> dict[str, Any]:
    """`distinct_2`: distinct bigrams over all bigrams. `top_opening_share` of the most common first three words, and which they are."""
    (top, count), *_ = Counter(opening(t, 3) for t in texts).most_common(1)
    return {"distinct_2": distinct_n(texts, 2), "top_opening_share": count / len(texts), "top_opening": top}


def near_pairs(prompts: Sequence[Prompt], vectors: np.ndarray, *, cosine: float = NEAR) -> list[tuple[str, str, float]]:
    """Ids and cosine of the pairs above the limit that are no declared twins, nearest first; `vectors` have length 1, (n, D)."""
    found = []
    for start in range(0, len(prompts), 1024):
        for i, j in np.argwhere(vectors[start : start + 1024] @ vectors.T > cosine):
            a, b = prompts[start + int(i)], prompts[int(j)]
            if start + i < j and a.twin != b.id and b.twin != a.id:
                found.append((a.id, b.id, float(vectors[start + i] @ vectors[j])))
    return sorted(found, key=lambda pair: -pair[2])


def divided_groups(prompts: Sequence[Prompt], vectors: np.ndarray, *, cosine: float = GROUP) -> list[list[str]]:
    """Ids of the groups of twins and near-duplicates (`lance.splits`) that lie in more than one split."""
    members: dict[int, list[Prompt]] = {}
    for p, g in zip(prompts, near_duplicate_groups(prompts, vectors, cosine=cosine).tolist(), strict=True):
        members.setdefault(g, []).append(p)
    return [[p.id for p in group] for group in members.values() if len({p.split for p in group}) > 1]


def copied_rows(ids: Sequence[str], vectors: np.ndarray, evaluation: np.ndarray, *, cosine: float = COPIED) -> list[tuple[str, float]]:
    """Ids of the texts above the cosine to any evaluation prompt, with that cosine, nearest first; (n, D) and (m, D) vectors of length 1."""
    nearest = np.concatenate([(vectors[i : i + 1024] @ evaluation.T).max(1) for i in range(0, len(vectors), 1024)])
    return sorted(((ids[int(i)], float(nearest[i])) for i in np.flatnonzero(nearest > cosine)), key=lambda pair: -pair[1])


def broken_rows(rows: Iterable[Mapping[str, Any]], schema: Mapping[str, Any] | None = None) -> list[tuple[str, str]]:
    """Id and fault of every row of plain data that breaks the schema, has a span outside its text, or a distribution off the simplex.

    Needs the package jsonschema (in the extras `dev` and `book`).
    """
    from jsonschema import Draft202012Validator  # type: ignore[import-untyped]

    validator = Draft202012Validator(dict(schema) if schema is not None else corpus_schema())
    found = []
    for row in rows:
        name = str(row.get("id", "?"))
        faults = [f"{'/'.join(map(str, e.absolute_path)) or 'row'}: {e.message}" for e in validator.iter_errors(dict(row))]
        if not faults:
            length = len(row["text"])
            faults += [f"span [{s['start']}, {s['end']}) outside {length} characters" for s in row.get("spans", ()) if not s["start"] < s["end"] <= length]
            if "distribution" in row and abs(sum(row["distribution"].values()) - 1) > 1e-6:
                faults.append(f"distribution sums to {sum(row['distribution'].values()):g}")
        found += [(name, fault) for fault in faults]
    return found
