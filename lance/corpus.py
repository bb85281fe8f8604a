"""Labelled prompts: the record, the file format, and the embedded corpus.

A label is a set of keys of a taxonomy. Empty: benign. One leaf: that leaf. One category, or `unsafe`: a *candidate set*, any of the leaves it
may be. Several leaves: all of them apply. So binary, category and leaf labels train together.
"""

import functools
import importlib.resources
import json
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lance.errors import DataError, LanceError
from lance.taxonomy import BENIGN, Taxonomy

if TYPE_CHECKING:
    import pandas as pd
    from datasets import Dataset

BOM = b"\xef\xbb\xbf"  # some editors put a byte order mark before UTF-8
SPLITS = ("train", "validation", "test")
WRAPPERS = ("role_play", "hypothetical", "translation", "encoding", "prefix_injection", "many_shot", "authority")


class DataWarning(UserWarning):
    """Some rows of a file were invalid and were left out."""


@dataclass(frozen=True)
class Span:
    """Character offsets [start, end) into the prompt, and the leaf for which that piece stands."""

    start: int
    end: int
    leaf: str


@dataclass(frozen=True)
class Prompt:
    """One labelled prompt.

    Attributes
    ----------
    text : str
    labels : tuple of str
        Keys of leaves, one category, or `unsafe`; empty for a benign prompt.
    distribution : mapping or None
        Annotated weights over leaves and `benign` that sum to 1; the truth to measure against.
    twin : str or None
        Id of the contrast twin.
    refined : tuple of str
        What the prompt becomes once the reasons against it are gone.
    spans : tuple of Span
        The pieces that had to go.
    wrapper : str or None
        How it tries to alter the model's behaviour, if it does; one of `WRAPPERS`.
    """

    text: str
    labels: tuple[str, ...] = ()
    id: str = ""
    split: str | None = None
    distribution: Mapping[str, float] | None = None
    twin: str | None = None
    refined: tuple[str, ...] = ()
    spans: tuple[Span, ...] = ()
    wrapper: str | None = None
    source: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise DataError(f"prompt {self.id or '?'!r} has no text; `text` must be a non-empty string, found {self.text!r}")
        if self.split is not None and self.split not in SPLITS:
            raise DataError(f"prompt {self.id!r} has the split {self.split!r}; expected one of {', '.join(SPLITS)}")
        if self.wrapper is not None and self.wrapper not in WRAPPERS:
            raise DataError(f"prompt {self.id!r} has the wrapper {self.wrapper!r}; expected one of {', '.join(WRAPPERS)}")
        for s in self.spans:
            if not 0 <= s.start < s.end <= len(self.text):
                raise DataError(f"prompt {self.id!r} has the span [{s.start}, {s.end}), outside its text of {len(self.text)} characters")
        if self.distribution is not None:
            total = sum(self.distribution.values())
            if any(w < 0 for w in self.distribution.values()) or not abs(total - 1) <= 1e-6:  # NaN is no sum either
                raise DataError(f"the distribution of prompt {self.id!r} must have weights >= 0 that sum to 1; they sum to {total:g}")

    @property
    def benign(self) -> bool:
        return not self.labels

    def to_dict(self) -> dict[str, Any]:
        """Plain data for one line of JSON; empty fields are left out."""
        return {k: v for k, v in asdict(self).items() if v not in (None, "", (), [], {}) or k in ("text", "labels")}

    @classmethod
    def from_dict(cls, row: Mapping[str, Any]) -> "Prompt":
        """Read one row; `prompt` is accepted for `text`, and `label` (one key) for `labels`.

        Raises
        ------
        DataError
            For unknown or missing fields, and for values that do not fit.
        """
        given = set(row)
        row = {k: v for k, v in row.items() if v is not None}  # null says no more than a field left out
        if "text" not in row and "prompt" in row:
            row["text"] = row.pop("prompt")
        if "labels" not in row and "label" in row:
            row["labels"] = row.pop("label")
        if "text" not in row:
            raise DataError(f"a row has no `text` (or `prompt`); its fields are {', '.join(map(str, row)) or 'none'}")
        if not given & {"labels", "label"}:
            raise DataError("a row has no `labels`; give a list of keys ([] for benign), or `label` with one key")
        if unknown := set(row) - set(cls.__dataclass_fields__):
            raise DataError(f"unknown field {sorted(unknown)[0]!r}; known are {', '.join(cls.__dataclass_fields__)}")
        for name in ("id", "twin"):
            if isinstance(row.get(name), int):
                row[name] = str(row[name])
        for name in ("text", "id", "split", "twin", "wrapper", "source", "note"):
            if not isinstance(row.get(name, ""), str):
                raise DataError(f"`{name}` must be a text, found {row[name]!r}")
        row["labels"] = tuple(k for k in _texts(row, "labels") if k not in (BENIGN, "safe"))
        row["refined"] = _texts(row, "refined")
        row["spans"] = _spans(row)
        if "distribution" in row:
            row["distribution"] = _weights(row)
        return cls(**row)


def _texts(row: Mapping[str, Any], name: str) -> tuple[str, ...]:
    values = row.get(name, ())
    values = [values] if isinstance(values, str) else values
    if not isinstance(values, list | tuple) or not all(isinstance(v, str) for v in values):
        raise DataError(f"`{name}` must be a list of texts, found {values!r}")
    return tuple(values)


def _spans(row: Mapping[str, Any]) -> tuple[Span, ...]:
    spans, out = row.get("spans", ()), []
    for span in spans if isinstance(spans, list | tuple) else (spans,):
        match span:
            case [int(start), int(end), str(leaf)] | {"start": int(start), "end": int(end), "leaf": str(leaf)}:
                out.append(Span(start, end, leaf))
            case _:
                raise DataError(f"`spans` must be a list of [start, end, leaf], found {spans!r}")
    return tuple(out)


def _weights(row: Mapping[str, Any]) -> dict[str, float]:
    weights = row["distribution"]
    if not isinstance(weights, Mapping) or not all(isinstance(w, int | float) for w in weights.values()):
        raise DataError(f"`distribution` must map keys to weights, found {weights!r}")
    return {str(k): float(w) for k, w in weights.items()}


class Labels(NamedTuple):
    """Labels as arrays over the K + 1 coordinates of a taxonomy.

    candidates : bool (n, K + 1)
        The set S of each row; {benign} for a benign row.
    eta : float (n,)
        0: any one member of S; 1: every member applies.
    known : bool (n,)
        False where only "unsafe" is known: the mask m of the objective.
    """

    candidates: np.ndarray
    eta: np.ndarray
    known: np.ndarray


def encode_labels(prompts: Sequence[Prompt], taxonomy: Taxonomy) -> Labels:
    """Turn the labels of prompts into candidate sets over the coordinates of a taxonomy.

    Raises
    ------
    TaxonomyError
        When a label is not a key of the taxonomy.
    """
    candidates = np.zeros((len(prompts), len(taxonomy) + 1), dtype=bool)
    eta = np.zeros(len(prompts))
    known = np.ones(len(prompts), dtype=bool)
    for i, prompt in enumerate(prompts):
        if prompt.benign:
            candidates[i, 0] = True
            continue
        sets = [taxonomy.leaves_of(label) for label in prompt.labels]
        for leaf in {leaf for s in sets for leaf in s}:
            candidates[i, taxonomy.index(leaf)] = True
        eta[i] = float(len(sets) > 1 and all(len(s) == 1 for s in sets))
        known[i] = not candidates[i, 1:].all() or len(taxonomy) == 1
    return Labels(candidates, eta, known)


def read_rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, row) of a JSONL file; lines that are no JSON objects are reported and left out.

    Raises
    ------
    DataError
        When the file cannot be read at all.
    """
    try:
        with Path(path).open("rb") as file:
            yield from parse_rows(file, str(path))
    except OSError as error:
        raise DataError(f"cannot read {str(path)!r}: {error.strerror or error}; give the path of a JSONL file") from error


def parse_rows(lines: Iterable[bytes], name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """What `read_rows` yields, line by line, from an open binary file; `name` is what warnings call it."""
    for number, line in enumerate(lines, start=1):
        given = line.removeprefix(BOM) if number == 1 else line
        if not given.strip():
            continue
        try:
            row = json.loads(given.decode("utf-8"))
            if not isinstance(row, dict):
                raise ValueError(f"expected an object, found {type(row).__name__}")
        except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
            warnings.warn(f"{name}, line {number}: left out ({error})", DataWarning, stacklevel=2)
            continue
        yield number, row


def read_prompts(path: str | Path, taxonomy: Taxonomy | None = None) -> list[Prompt]:
    """Read labelled prompts from a JSONL file; invalid rows are reported with file and line, and the good ones are kept.

    Raises
    ------
    DataError
        When the file cannot be read, or not one row of it is valid.
    """
    prompts: list[Prompt] = []
    for number, row in read_rows(path):
        try:
            prompt = Prompt.from_dict(row)
            if taxonomy is not None:
                for label in prompt.labels:
                    taxonomy.leaves_of(label)
        except LanceError as error:
            warnings.warn(f"{path}, line {number}: left out ({error})", DataWarning, stacklevel=2)
            continue
        prompts.append(prompt)
    if not prompts:
        raise DataError(f"{str(path)!r} holds no valid row; each line is an object with `text` and `labels`")
    return prompts


def write_prompts(prompts: Iterable[Prompt], path: str | Path) -> None:
    """Write prompts as JSONL, one object a line, in the given order."""
    lines = (json.dumps(p.to_dict(), ensure_ascii=False) + "\n" for p in prompts)
    Path(path).write_bytes("".join(lines).encode("utf-8", "backslashreplace"))  # which makes a lone surrogate the JSON escape that it was


@functools.cache
def _embedded() -> tuple[Prompt, ...]:
    path = Path(str(importlib.resources.files("lance") / "data" / "corpus" / "prompts.jsonl"))
    return tuple(Prompt.from_dict({"source": "lance", **row}) for _, row in read_rows(path))


def load_corpus(split: str | None = None) -> list[Prompt]:
    """The embedded corpus, whole or one split (`train`, `validation`, `test`).

    Twins and near-duplicates always fall into one split.
    """
    if split is not None and split not in SPLITS:
        raise DataError(f"unknown split {split!r}; expected one of {', '.join(SPLITS)}")
    return [p for p in _embedded() if split in (None, p.split)]


def select(
    prompts: Iterable[Prompt], *, leaf: str | None = None, benign: bool | None = None, contrast: bool | None = None, wrapped: bool | None = None
) -> list[Prompt]:
    """The prompts that meet every condition given: with that leaf among their labels; benign or not; a contrast twin (benign) or not; wrapped or not."""
    return [
        p
        for p in prompts
        if (leaf is None or leaf in p.labels)
        and benign in (None, p.benign)
        and contrast in (None, p.benign and p.twin is not None)
        and wrapped in (None, p.wrapper is not None)
    ]


def to_frame(prompts: Iterable[Prompt]) -> "pd.DataFrame":
    """One row a prompt, one column a field; `labels` and `refined` are lists, `spans` lists of dictionaries."""
    import pandas as pd

    columns = list(Prompt.__dataclass_fields__)
    frame = pd.DataFrame([asdict(p) for p in prompts], columns=columns)
    for name in ("labels", "refined", "spans"):
        frame[name] = frame[name].map(list)
    return frame


def to_dataset(prompts: Iterable[Prompt]) -> "Dataset":
    """A `datasets.Dataset` with the columns of `to_frame`; needs the extra `data`."""
    from datasets import Dataset

    return Dataset.from_pandas(to_frame(prompts), preserve_index=False)


def refined_prompts(prompts: Iterable[Prompt]) -> list[Prompt]:
    """The refined texts of noncompliant prompts as benign prompts of their own, in the split of their origin."""
    return [
        Prompt(text=text, id=f"{p.id}-r{i}", split=p.split, source=p.source, note=f"refined from {p.id}")
        for p in prompts
        for i, text in enumerate(p.refined, start=1)
    ]


def reframed_prompts(prompts: Sequence[Prompt], taxonomy: Taxonomy, *, share: float = 0.3, seed: int = 0) -> list[Prompt]:
    """Training rows that teach what a reframing does and does not cure.

    A share of the noncompliant prompts is wrapped in a `reframe` pattern of a leaf. When the pattern belongs to the prompt's only leaf, the result is benign;
    when it belongs to another leaf, the label stays: no pattern may become a way round a hazard.
    """
    rng = np.random.default_rng(seed)
    leaves = [leaf for leaf in taxonomy.leaves if leaf.reframe]
    out: list[Prompt] = []
    if not leaves:
        return out
    for p in prompts:
        if p.benign or len(p.text) > 600 or rng.random() >= share:
            continue
        own = taxonomy[p.labels[0]] if len(p.labels) == 1 and p.labels[0] in taxonomy else None
        cured = own is not None and bool(own.reframe) and rng.random() < 0.6
        leaf = own if cured and own is not None else leaves[rng.integers(len(leaves))]
        pattern = leaf.reframe[rng.integers(len(leaf.reframe))]
        labels = () if leaf is own else p.labels
        out.append(Prompt(text=pattern.format(prompt=p.text), labels=labels, id=f"{p.id}-f", split=p.split, source=p.source, note=f"reframed as {leaf.key}"))
    return out
