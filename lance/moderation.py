"""Loaders of public moderation sets: BeaverTails, WildGuardMix and OR-Bench, from a local file or folder or from the hub.

None of their text is part of this project. Their labels are coarser than ours: a name that fits one leaf becomes that leaf, any other the category `safety`,
which is a candidate set of all its leaves.
"""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lance.corpus import DataWarning, Prompt
from lance.errors import DataError
from lance.public import csv_rows, hub_rows, jsonl_rows, other_format
from lance.taxonomy import Taxonomy

WILDGUARD_HUB = "allenai/wildguardmix"
WILDGUARD_LABELS = {
    "social_stereotypes_and_unfair_discrimination": "offensive_language",
    "toxic_language_hate_speech": "offensive_language",
    "sexual_content": "offensive_language",
    "violence_and_physical_harm": "dangerous_or_sensitive",
    "cyberattack": "dangerous_or_sensitive",
    "fraud_assisting_illegal_activities": "dangerous_or_sensitive",
    "mental_health_over-reliance_crisis": "safety",
    "defamation_encouraging_unethical_or_unsafe_actions": "safety",
    "causing_material_harm_by_disseminating_misinformation": "misinformation",
    "disseminating_false_or_misleading_information_encouraging_disinformation_campaigns": "misinformation",
    "copyright_violations": "copyright",
    "private_information_individual": "privacy",
    "sensitive_information_organization_government": "privacy",
    "others": "safety",
}
OR_BENCH_HUB = "bench-llm/or-bench"
OR_BENCH_PARTS = {"80k": "or-bench-80k", "hard": "or-bench-hard-1k", "toxic": "or-bench-toxic"}
OR_BENCH_LABELS = {
    "deception": "safety",
    "harassment": "offensive_language",
    "harmful": "safety",
    "hate": "offensive_language",
    "illegal": "dangerous_or_sensitive",
    "privacy": "privacy",
    "self-harm": "dangerous_or_sensitive",
    "sexual": "offensive_language",
    "unethical": "safety",
    "violence": "dangerous_or_sensitive",
}


def load_wildguard(part: str, folder: str | Path | None = None, *, hub: str = WILDGUARD_HUB, revision: str | None = None) -> list[Prompt]:
    """Prompts of WildGuardMix (arXiv 2406.18495), labelled in the built-in taxonomy by `WILDGUARD_LABELS`.

    Rows are pairs of prompt and response; a prompt that occurs twice is given once. `note` holds the subcategory, and `adversarial` before it where the prompt
    was written to get round a guard. Rows whose annotators did not agree (no label) are left out with a warning that counts them.

    Parameters
    ----------
    part : {"train", "test"}
    folder : path, optional
        A download of the set (`train/wildguard_train.parquet`, `test/wildguard_test.parquet`), or a folder with `wildguard_train.jsonl` and
        `wildguard_test.jsonl`; the hub by default, where the set's terms have to be accepted first.

    Raises
    ------
    DataError
        For an unknown part, a missing file, a label or subcategory that is not of this set.
    """
    if part not in ("train", "test"):
        raise DataError(f"unknown part {part!r} of WildGuardMix; expected 'train' or 'test'")
    name = f"wildguard{part}"
    rows = hub_rows(hub, name, part, revision) if folder is None else _wildguard_file(Path(folder), part)
    out: dict[str, Prompt] = {}
    unlabelled = 0
    for n, r in enumerate(rows):
        text, harm = r.get("prompt"), r.get("prompt_harm_label")
        if not isinstance(text, str) or not text.strip() or harm is None:
            unlabelled += 1
            continue
        if harm not in ("harmful", "unharmful"):
            raise DataError(f"row {n} of WildGuardMix has the label {harm!r}; expected 'harmful' or 'unharmful'")
        kind = str(r.get("subcategory") or "")
        note = f"adversarial, {kind}" if r.get("adversarial") else kind
        labels = (_label(kind, WILDGUARD_LABELS, "WildGuardMix", n),) if harm == "harmful" else ()
        out.setdefault(text, Prompt(text=text, labels=labels, id=f"wildguard-{part}-{n}", source="wildguard", note=note))
    if unlabelled:
        warnings.warn(f"WildGuardMix, {part}: left out {unlabelled} rows without a prompt or a label of it", DataWarning, stacklevel=2)
    return list(out.values())


def _wildguard_file(folder: Path, part: str) -> list[dict[str, Any]]:
    parquet, lines = folder / part / f"wildguard_{part}.parquet", folder / f"wildguard_{part}.jsonl"
    if lines.is_file():
        return jsonl_rows(lines)
    if not parquet.is_file():
        raise DataError(f"neither {str(parquet)!r} nor {str(lines)!r} is there; download WildGuardMix into the folder, or leave it out to read the hub")
    import pandas as pd

    try:
        frame = pd.read_parquet(parquet, columns=["prompt", "adversarial", "prompt_harm_label", "subcategory"])
    except Exception as error:  # pyarrow raises what it runs into
        raise other_format(parquet, "a Parquet file with prompt, adversarial, prompt_harm_label and subcategory", repr(error)) from error
    return [{str(k): (None if pd.isna(v) else v) for k, v in row.items()} for row in frame.to_dict("records")]


def load_or_bench(
    part: str, folder: str | Path | None = None, *, taxonomy: str = "noncompliance", hub: str = OR_BENCH_HUB, revision: str | None = None
) -> list[Prompt]:
    """OR-Bench (arXiv 2405.20947): prompts that seem toxic and are not (benign here), and toxic ones. `note` holds the category.

    Parameters
    ----------
    part : {"80k", "hard", "toxic"}
        All benign prompts; the benign ones that several models refused; toxic prompts.
    folder : path, optional
        Holds `or-bench-80k.csv`, `or-bench-hard-1k.csv`, `or-bench-toxic.csv`; the hub by default.
    taxonomy : {"noncompliance", "or_bench"}
        Label toxic prompts in the built-in taxonomy by `OR_BENCH_LABELS`, or with the set's own ten categories.

    Raises
    ------
    DataError
        For an unknown part or taxonomy, a missing file, or a category that is not of this set.
    """
    if part not in OR_BENCH_PARTS:
        raise DataError(f"unknown part {part!r} of OR-Bench; expected one of {', '.join(OR_BENCH_PARTS)}")
    tables = {"noncompliance": OR_BENCH_LABELS, "or_bench": {c: c.replace("-", "_") for c in OR_BENCH_LABELS}}
    if taxonomy not in tables:
        raise DataError(f"unknown taxonomy {taxonomy!r} for OR-Bench; expected one of {', '.join(tables)}")
    name = OR_BENCH_PARTS[part]
    if folder is None:
        rows = hub_rows(hub, name, "train", revision)
    else:
        path = Path(folder) / f"{name}.csv"
        if not path.is_file():
            raise DataError(f"{str(path)!r} is missing; download OR-Bench into the folder, or leave it out to read the hub")
        rows = csv_rows(path, "prompt", "category")
    return [
        Prompt(
            text=r["prompt"],
            labels=(_label(str(r["category"]), tables[taxonomy], "OR-Bench", n),) if part == "toxic" else (),
            id=f"or-bench-{part}-{n}",
            source="or_bench",
            note=str(r["category"]),
        )
        for n, r in enumerate(rows)
        if str(r.get("prompt") or "").strip()
    ]


def _label(name: str, table: dict[str, str], source: str, row: int) -> str:
    if name not in table:
        raise DataError(f"row {row} of {source} has the category {name!r}; expected one of {', '.join(table)}")
    return table[name]


def load_beavertails(
    path: str | Path | None = None, *, binary: bool = False, hub: str = "PKU-Alignment/BeaverTails", split: str = "30k_test", revision: str | None = None
) -> list[Prompt]:
    """BeaverTails (arXiv 2307.04657), labelled in the built-in `beavertails` taxonomy, from a JSONL file or the hub.

    The labels belong to question and answer pairs; a prompt is given every harm that any of its answers was given (all of them apply), or, with `binary`,
    only `unsafe`. Prompts whose answers were all safe are benign.
    """
    rows = jsonl_rows(Path(path)) if path is not None else hub_rows(hub, None, split, revision)
    taxonomy = Taxonomy.builtin("beavertails")
    harms: dict[str, set[str]] = {}
    for n, r in enumerate(rows):
        try:
            harms.setdefault(r["prompt"], set()).update(beavertails_key(k) for k, on in r["category"].items() if on)
        except (KeyError, AttributeError) as error:
            raise DataError(f"row {n} is not of BeaverTails' format (prompt, category -> bool): {error}") from error
    order: Callable[[str], int] = taxonomy.index
    return [
        Prompt(text=text, labels=(("unsafe",) if binary else tuple(sorted(keys, key=order))) if keys else (), id=f"beavertails-{i}", source="beavertails")
        for i, (text, keys) in enumerate(harms.items())
    ]


def beavertails_key(name: str) -> str:
    """Key in the built-in taxonomy of a BeaverTails category name: its first word group, as in `violence,aiding_and_abetting,incitement` -> `violence`."""
    return name.split(",")[0].strip().replace("-", "_")
