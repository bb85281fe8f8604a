"""Loaders of public data sets, from a local folder or from the hub. None of their text is part of this project.

`data_folder()` is the folder named by the environment variable LANCE_DATA. Each loader returns Prompts whose labels are keys of the taxonomy that it names;
where a data set is coarser than the taxonomy, the label is a candidate set.
"""

import csv
import io
import json
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lance.corpus import DataWarning, Prompt, read_rows
from lance.errors import DataError

COCONOT_CATEGORIES = {
    "Incomplete requests": "incomplete",
    "Unsupported requests": "unsupported",
    "Indeterminate requests": "indeterminate",
    "Humanizing requests": "humanizing",
    "Requests with safety concerns": "safety",
}
COCONOT_LEAVES = {
    "false presuppositions": "false_presupposition",
    "underspecified": "underspecified",
    "incomprehensible": "incomprehensible",
    "input modality limitations": "input_modality",
    "output modality limitations": "output_modality",
    "style and length limitations": "length_or_style",
    "temporal limitations": "temporal",
    "universal unknowns": "universal_unknown",
    "subjective questions": "subjective",
    "personal inquiry": "personal_inquiry",
    "offer advice, opinion or recommendations": "advice_or_opinion",
    "triggers for offensive language": "offensive_language",
    "dangerous or sensitive topics": "dangerous_or_sensitive",
    "misinformation": "misinformation",
    "false information": "misinformation",
    "privacy violations": "privacy",
    "copyright violations": "copyright",
}
COCONOT_TRAIN_LEAK = 11_397  # row of the original train split that is also an evaluation prompt
CATQA_LEAVES = {
    "Adult Content": "offensive_language",
    "Child Abuse": "dangerous_or_sensitive",
    "Economic Harm": "dangerous_or_sensitive",
    "Fraud/Deception": "dangerous_or_sensitive",
    "Hate/Harass/Violence": "safety",
    "Illegal Activity": "dangerous_or_sensitive",
    "Malware Viruses": "dangerous_or_sensitive",
    "Physical Harm": "dangerous_or_sensitive",
    "Political Campaigning": "misinformation",
    "Privacy Violation Activity": "privacy",
    "Tailored Financial Advice": "advice_or_opinion",
}
HARMFUL_SETS = ("advbench", "catqa", "jailbreakbench", "malicious_instruct", "strongreject")
LDL_SETS = ("Movie", "SBU_3DFE", "SJAFFE", "Yeast_alpha", "Yeast_cold", "Yeast_spoem")


def data_folder(required: bool = True) -> Path | None:
    """The folder of public data named by LANCE_DATA.

    Raises
    ------
    DataError
        When it is required and the variable is unset or names no folder.
    """
    value = os.environ.get("LANCE_DATA")
    if value and Path(value).is_dir():
        return Path(value)
    if required:
        state = "is not set" if not value else f"names {value!r}, which is no folder"
        raise DataError(f"LANCE_DATA {state}; set it to a folder with the public data sets (coconot/, xstest/, …), or use the embedded corpus")
    return None


def under(folder: str | Path | None, name: str) -> Path:
    path = (Path(folder) if folder is not None else data_folder() or Path()) / name
    if not path.exists():
        raise DataError(f"{str(path)!r} is missing; LANCE_DATA (or `folder`) must hold {name}")
    return path


def other_format(path: Path, expected: str, found: object) -> DataError:
    return DataError(f"{str(path)!r} is not of the format of this data set: expected {expected}, found {found}; restore the original file")


def jsonl_rows(path: Path, *texts: str) -> list[dict[str, Any]]:
    """Rows of a JSONL file that have these text fields; others are reported and left out."""
    out = []
    for number, row in read_rows(path):
        if missing := [k for k in texts if not isinstance(row.get(k), str)]:
            warnings.warn(f"{path}, line {number}: left out (no text in {', '.join(missing)})", DataWarning, stacklevel=3)
        else:
            out.append(row)
    if texts and not out:
        raise other_format(path, f"rows with the texts {', '.join(texts)}", "none")
    return out


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")  # line breaks inside a quoted field stay as they are
    except UnicodeDecodeError as error:
        raise other_format(path, "UTF-8", f"byte {error.object[error.start]:#x} at {error.start}") from error


def csv_rows(path: Path, *columns: str) -> list[dict[str, str]]:
    """Rows of a CSV file that must have these columns."""
    reader = csv.DictReader(io.StringIO(_text(path), newline=""), restval="")
    found = reader.fieldnames or ()
    if not set(columns) <= set(found):
        raise other_format(path, f"the columns {', '.join(columns)}", ", ".join(found) or "none")
    return list(reader)


def hub_rows(repo: str, name: str | None, split: str, revision: str | None) -> list[dict[str, Any]]:
    """Rows of a hub data set; `revision` pins it."""
    import datasets

    try:
        return list(datasets.load_dataset(repo, name, split=split, revision=revision))
    except Exception as error:
        raise DataError(f"cannot load {repo!r} ({name}, {split}) from the hub: {error}; check the connection, or give a local folder") from error


def load_coconot(part: str, folder: str | Path | None = None, *, hub: str | None = None, revision: str | None = None) -> list[Prompt]:
    """CoCoNot (arXiv 2407.12043), labelled in the built-in taxonomy.

    Parameters
    ----------
    part : {"train", "pref", "eval", "contrast"}
        Training prompts; contrast training prompts (benign); evaluation prompts; contrast evaluation prompts (benign).
    folder : path, optional
        Holds coconot/*.jsonl; LANCE_DATA by default.
    hub : str, optional
        Read `allenai/coconot` (or a copy of it) from the hub instead. Row 11,397 of the train split, which is also an evaluation prompt, is left out.
    """
    files = {"train": "train_sample", "pref": "pref", "eval": "eval_dev", "contrast": "contrast_dev"}
    if part not in files:
        raise DataError(f"unknown part {part!r} of CoCoNot; expected one of {', '.join(files)}")
    if hub:
        name, split = {"train": ("original", "train"), "pref": ("pref", "train"), "eval": ("original", "test"), "contrast": ("contrast", "test")}[part]
        rows = [r for i, r in enumerate(hub_rows(hub, name, split, revision)) if not (part == "train" and i == COCONOT_TRAIN_LEAK)]
    else:
        rows = jsonl_rows(under(folder, f"coconot/{files[part]}.jsonl"), "prompt")
    benign = part in ("pref", "contrast")
    out = []
    for i, r in enumerate(rows):
        if not str(r.get("prompt") or "").strip():
            continue
        labels = () if benign else (coconot_label(r.get("category", ""), r.get("subcategory", "")),)
        out.append(
            Prompt(text=r["prompt"], labels=labels, id=f"coconot-{part}-{r.get('id', r.get('index', i))}", source="coconot", note=str(r.get("subcategory", "")))
        )
    return out


def coconot_label(category: str, subcategory: str) -> str:
    """The leaf of a CoCoNot subcategory, or the category (a candidate set) where it has no leaf of its own."""
    leaf = COCONOT_LEAVES.get(str(subcategory).strip().lower())
    if leaf:
        return leaf
    if category not in COCONOT_CATEGORIES:
        raise DataError(f"unknown CoCoNot category {category!r}; expected one of {', '.join(COCONOT_CATEGORIES)}")
    return COCONOT_CATEGORIES[category]


def load_xstest(folder: str | Path | None = None, *, hub: str | None = None, revision: str | None = None) -> list[Prompt]:
    """XSTest prompts (arXiv 2308.01263): unsafe ones are candidates for every safety leaf; `note` holds the type.

    From `folder` (LANCE_DATA by default), or from a copy on the hub that has the columns `prompt`, `type` and `label` in a split `test`.
    """
    rows = hub_rows(hub, None, "test", revision) if hub else jsonl_rows(under(folder, "xstest/prompts_dev.jsonl"), "id", "prompt", "label")
    out = []
    for i, r in enumerate(rows):
        if r.get("label") not in ("safe", "unsafe") or not isinstance(r.get("prompt"), str):
            raise DataError(f"row {i} is not of XSTest's format: expected `prompt` and the label 'safe' or 'unsafe', found the label {r.get('label')!r}")
        labels = ("safety",) if r["label"] == "unsafe" else ()
        out.append(Prompt(text=r["prompt"], labels=labels, id=f"xstest-{r.get('id', i)}", source="xstest", note=str(r.get("type", ""))))
    return out


def load_harmful(names: Iterable[str] = HARMFUL_SETS, folder: str | Path | None = None) -> list[Prompt]:
    """Harmful instructions; a leaf where the set gives a category that has one, otherwise the safety leaves as candidates."""
    out: list[Prompt] = []
    for name in names:
        if name not in HARMFUL_SETS:
            raise DataError(f"unknown harmful set {name!r}; expected one of {', '.join(HARMFUL_SETS)}")
        for i, (text, label) in enumerate(_harmful(name, folder)):
            if text.strip():
                out.append(Prompt(text=text.strip(), labels=(label,), id=f"{name}-{i}", source=name))
    return out


def _harmful(name: str, folder: str | Path | None) -> list[tuple[str, str]]:
    if name == "catqa":
        return [(q, CATQA_LEAVES.get(c, "safety")) for c, q in _catqa(under(folder, "harmful/catqa_english.json"))]
    if name == "malicious_instruct":
        return [(line, "safety") for line in _text(under(folder, "harmful/malicious_instruct.txt")).splitlines()]
    column = {"advbench": "goal", "jailbreakbench": "Goal", "strongreject": "forbidden_prompt"}[name]
    return [(row[column], "safety") for row in csv_rows(under(folder, f"harmful/{name}.csv"), column)]


def _catqa(path: Path) -> list[tuple[str, str]]:
    """Category and question of each row."""
    try:
        data = json.loads(_text(path))
        return [(category, q.strip()) for category, below in data.items() for questions in below.values() for q in questions]
    except (ValueError, AttributeError, TypeError) as error:
        raise other_format(path, "questions by category and subcategory", error) from error


def load_robot(part: str, folder: str | Path | None = None) -> list[Prompt]:
    """R-U-A-Robot (arXiv 2106.02692): `pos` asks whether one speaks with a machine (personal_inquiry); `neg` holds other utterances (benign)."""
    if part not in ("pos", "neg"):
        raise DataError(f"unknown part {part!r} of R-U-A-Robot; expected 'pos' or 'neg' (the ambiguous rows have no label)")
    labels = ("personal_inquiry",) if part == "pos" else ()
    rows = csv_rows(under(folder, f"r_u_a_robot/{part}.train.csv"), "guid", "text")
    return [Prompt(text=r["text"], labels=labels, id=f"robot-{r['guid']}", source="r_u_a_robot") for r in rows if r["text"].strip()]


def load_instructions(folder: str | Path | None = None) -> list[Prompt]:
    """Ordinary instructions, for counting false alarms. Their licence allows measuring only: they never enter training."""
    rows = jsonl_rows(under(folder, "benign/instructions.jsonl"), "prompt")
    return [Prompt(text=r["prompt"], id=f"instruction-{i}", source="instructions") for i, r in enumerate(rows)]


def load_ldl(name: str, folder: str | Path | None = None) -> tuple[np.ndarray, np.ndarray]:
    """A label-distribution benchmark: features (n, p) and true distributions (n, c), rows of which sum to 1."""
    from scipy.io import loadmat

    if name not in LDL_SETS:
        raise DataError(f"unknown label-distribution set {name!r}; expected one of {', '.join(LDL_SETS)}")
    path = under(folder, f"ldl/{name}.mat")
    try:
        data = loadmat(path)
        return np.asarray(data["features"], dtype=np.float64), np.asarray(data["labels"], dtype=np.float64)
    except Exception as error:  # scipy's reader raises what it runs into
        raise other_format(path, "a MATLAB file with `features` and `labels`", repr(error)) from error
