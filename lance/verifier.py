"""The independent second opinion: character n-grams and logistic regression, so that what fools the enhancer need not fool it."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from scipy.special import expit, logit
from sklearn.feature_extraction.text import HashingVectorizer, TfidfTransformer
from sklearn.linear_model import LogisticRegression

from lance.corpus import Prompt
from lance.errors import DataError, ModelError
from lance.modelfiles import read_model_config, write_model_config

BITS = 17
WINDOW = 1200


class Verifier:
    """Probability that a prompt should not simply be complied with, from hashed character n-grams (2 to 5, within words).

    Attributes
    ----------
    threshold : float
        Set on validation rows so that a given share of the benign ones passes; at or above it the verifier objects.
    """

    def __init__(self, *, C: float = 8.0, seed: int = 1) -> None:
        self.C, self.seed = C, seed
        self.threshold = 0.5
        self.idf: np.ndarray | None = None
        self.coef: np.ndarray | None = None
        self.scale, self.shift = 1.0, 0.0
        self._hash = HashingVectorizer(analyzer="char_wb", ngram_range=(2, 5), n_features=1 << BITS, alternate_sign=False, norm=None, dtype=np.float32)

    def fit(self, prompts: Sequence[Prompt], validation: Sequence[Prompt], *, pass_rate: float = 0.98) -> "Verifier":
        """Fit on labelled prompts; calibrate (Platt) and set the threshold on validation rows.

        Raises
        ------
        DataError
            When either has no benign or no noncompliant prompt.
        """
        for name, rows in (("training", prompts), ("validation", validation)):
            if len({p.benign for p in rows}) < 2:
                raise DataError(f"the verifier needs benign and noncompliant prompts; the {name} rows hold only one kind")
        counts = self._counts([p.text for p in prompts])
        tfidf = TfidfTransformer(sublinear_tf=True).fit(counts)
        self.idf = tfidf.idf_.astype(np.float16).astype(np.float32)
        y = np.array([not p.benign for p in prompts])
        model = LogisticRegression(C=self.C, solver="liblinear", class_weight="balanced", random_state=self.seed).fit(self._features(counts), y)
        self.coef = np.append(model.coef_[0], model.intercept_).astype(np.float16).astype(np.float32)
        self.scale, self.shift = 1.0, 0.0
        raw = self._logits([p.text for p in validation])
        y = np.array([not p.benign for p in validation])
        platt = LogisticRegression(C=1e3, random_state=self.seed).fit(raw[:, None], y)
        self.scale, self.shift = float(platt.coef_[0, 0]), float(platt.intercept_[0])
        benign = np.sort(expit(self.scale * raw[~y] + self.shift))
        self.threshold = float(np.nextafter(benign[max(0, math.ceil(pass_rate * len(benign)) - 1)], 2))
        return self

    def risk(self, texts: Sequence[str]) -> np.ndarray:
        """Probabilities (n,); a long prompt is read in overlapping windows and takes the highest."""
        pieces = [(i, t[a : a + WINDOW]) for i, t in enumerate(texts) for a in range(0, max(1, len(t) - WINDOW // 4), WINDOW * 3 // 4)]
        out = np.full(len(texts), -np.inf)
        np.maximum.at(out, np.array([i for i, _ in pieces], dtype=int), self._logits([t for _, t in pieces]))
        return np.asarray(expit(self.scale * out + self.shift))

    def accepts(self, text: str) -> bool:
        """Whether the verifier lets the prompt pass."""
        return bool(self.risk([text])[0] < self.threshold)

    def _counts(self, texts: Sequence[str]) -> Any:
        return self._hash.transform([" ".join(t.lower().split()).encode("utf-8", "replace").decode("utf-8") for t in texts])

    def _features(self, counts: Any) -> Any:
        x = counts.copy()
        x.data = np.log1p(x.data)
        x = x.multiply(self.idf).tocsr()
        norm = np.sqrt(np.asarray(x.multiply(x).sum(1)).ravel())
        return x.multiply(1 / np.maximum(norm, 1e-9)[:, None]).tocsr()

    def _logits(self, texts: Sequence[str]) -> np.ndarray:
        if self.coef is None:
            raise ModelError("this verifier is not fitted; call fit, or Verifier.from_pretrained(folder)")
        if not texts:
            return np.empty(0)
        return np.asarray(self._features(self._counts(texts)) @ self.coef[:-1] + self.coef[-1], dtype=np.float64)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write config.json and model.safetensors."""
        if self.coef is None or self.idf is None:
            raise ModelError("this verifier is not fitted; there is nothing to save")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"idf": self.idf.astype(np.float16), "coef": self.coef.astype(np.float16)}, folder / "model.safetensors")
        meta = {"C": self.C, "seed": self.seed, "scale": self.scale, "shift": self.shift, "threshold": self.threshold}
        write_model_config(folder, meta, ["model.safetensors"])

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> "Verifier":
        """Load what `save_pretrained` wrote; a missing or changed file is a ModelError."""
        meta = read_model_config(Path(folder))
        out = cls(C=meta["C"], seed=meta["seed"])
        state = load_file(Path(folder) / "model.safetensors")
        out.idf, out.coef = state["idf"].astype(np.float32), state["coef"].astype(np.float32)
        out.scale, out.shift, out.threshold = meta["scale"], meta["shift"], meta["threshold"]
        return out


def log_odds(p: np.ndarray | float) -> np.ndarray | float:
    """logit of a probability, kept finite."""
    return logit(np.clip(p, 1e-9, 1 - 1e-9))  # type: ignore[no-any-return]
