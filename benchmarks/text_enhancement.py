"""Label enhancement of prompts, on a frozen encoder: distributions against annotated ones, and what kind of supervision identifies what.

usage: .venv/bin/pip install -e .[peers]; .venv/bin/python benchmarks/text_enhancement.py recover|predict|sweep|ablate|table [options]

recover  the distributions of labelled test prompts, recovered from their embeddings and labels, against the annotated ones
predict  the same without their labels, where a method can do so
sweep    supervision from "unsafe" alone to leaves, with and without anchors and reconstruction: what identifies what
ablate   the enhancer with one part taken away or changed: what each is worth, with all leaf labels
table    means and spreads over the seeds; --csv writes them as the book reads them

Every method gets the same prompts of the embedded corpus (all with several labels, and --rows others, drawn by the seed), their embeddings and their labels;
no annotated distribution is trained on. One number a method is chosen on the annotated validation prompts, by KL: a temperature, the share of smoothing,
or how much a label weighs; the measures without it stand beside (`chosen`: none).
"""

import argparse
import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import pandas as pd
import torch
from label_enhancement import peer
from scipy.stats import entropy
from sklearn.metrics import roc_auc_score

from lance import VariationalEnhancer, load_corpus
from lance.baselines import LogisticBaseline, SoftmaxBaseline
from lance.calibration import fit_temperature, temper
from lance.companions import load_out_of_domain
from lance.corpus import Prompt, encode_labels
from lance.encoder import PromptEncoder
from lance.enhancer import LABEL_WEIGHT
from lance.fitting import EnhancerConfig, twin_pairs
from lance.metrics import DISTRIBUTION_MEASURES, classification_figures, compare_distributions
from lance.objective import ObjectiveWeights, conditioned_on_label
from lance.taxonomy import Taxonomy

Array = np.ndarray
Parameterised = Callable[[float], tuple[Array, Array]]  # parameter -> distributions of the validation and of the test prompts
TEMPERATURES = [float(t) for t in np.geomspace(0.1, 10, 41)]
WEIGHTS = [float(w) for w in np.geomspace(0.5, 128, 33)]
SHARES = [float(s) for s in np.linspace(0.005, 0.3, 60)]


class Ground:
    """The prompts of one seed: training rows, annotated validation and test rows with their true distributions."""

    def __init__(self, taxonomy: Taxonomy, encoder: PromptEncoder, seed: int, rows: int) -> None:
        self.taxonomy, self.encoder, self.seed = taxonomy, encoder, seed
        rng = np.random.default_rng(seed)
        train = load_corpus("train")
        several, one = [p for p in train if len(p.labels) > 1], [p for p in train if len(p.labels) <= 1]
        self.train = several + [one[i] for i in rng.permutation(len(one))[:rows]]
        self.validation, self.test = load_corpus("validation"), load_corpus("test")
        self.annotated = [[p for p in part if p.distribution] for part in (self.validation, self.test)]
        self.truth = [self._distributions(part) for part in self.annotated]
        self.labels = [encode_labels(part, taxonomy) for part in self.annotated]

    def _distributions(self, prompts: Sequence[Prompt]) -> Array:
        return np.array([[(p.distribution or {}).get(k, 0.0) for k in self.taxonomy.keys] for p in prompts])

    def conditioned(self, alpha: Sequence[Array], weight: float) -> tuple[Array, Array]:
        """Validation and test distributions, given concentrations (or probabilities) and the labels."""
        val, test = (conditioned_on_label(a, y.candidates, y.eta, weight * a.sum(1)) for a, y in zip(alpha, self.labels, strict=True))
        return val, test

    def of(self, predict: Callable[[list[str]], Array]) -> list[Array]:
        return [predict([p.text for p in part]) for part in self.annotated]

    def transductive(self, method: Callable[[Array, Array, int], Array], most: int) -> list[Array]:
        """A peer that recovers the rows that it is fitted on: it gets the annotated prompts with their labels, too, beside `most` training prompts."""
        train = [self.train[i] for i in np.random.default_rng(self.seed).permutation(len(self.train))[:most]]
        prompts = [*train, *self.annotated[0], *self.annotated[1]]
        X = self.encoder.encode([p.text for p in prompts]).numpy().astype(np.float64)
        found = method(X, encode_labels(prompts, self.taxonomy).candidates.astype(float), self.seed)
        n, v = len(train), len(self.annotated[0])
        return [found[n : n + v], found[n + v :]]


def tempered(p: Sequence[Array]) -> Parameterised:
    def at(t: float) -> tuple[Array, Array]:
        a, b = (temper(np.clip(q, 1e-12, None) / q.sum(1, keepdims=True), t) for q in p)
        return a, b

    return at


def methods(ground: Ground, conditioned: bool, names: Sequence[str]) -> dict[str, Callable[[], tuple[Parameterised, list[float], float]]]:
    """name -> what gives the distributions by a parameter, the values tried, and the value that stands for 'as it is'."""
    tax, enc, seed, own = ground.taxonomy, ground.encoder, ground.seed, EnhancerConfig()

    def ours(**weights: float) -> tuple[Parameterised, list[float], float]:
        model = VariationalEnhancer(tax, enc, EnhancerConfig(seed=seed, weights=ObjectiveWeights(**weights))).fit(ground.train, ground.validation)
        alpha = ground.of(model.predict_alpha)
        return ((lambda w: ground.conditioned(alpha, w)), WEIGHTS, LABEL_WEIGHT) if conditioned else (tempered(alpha), TEMPERATURES, 1.0)

    def probabilities(model: Any) -> tuple[Parameterised, list[float], float]:
        p = ground.of(model.fit(ground.train).predict_proba)
        return ((lambda w: ground.conditioned([q + 1e-9 for q in p], w)), WEIGHTS, LABEL_WEIGHT) if conditioned else (tempered(p), TEMPERATURES, 1.0)

    def head(smoothing: float = 0.0, hidden: int = 0, dropout: float = 0.0, epochs: int = 40) -> tuple[Parameterised, list[float], float]:
        model = SoftmaxBaseline(tax, enc, rank=0, epochs=epochs, batch_size=128, lr=2e-3, smoothing=smoothing, hidden=hidden, dropout=dropout, seed=seed)
        return probabilities(model)

    def smoothed(share: float) -> tuple[Array, Array]:
        a, b = ((1 - share) * y.candidates / y.candidates.sum(1, keepdims=True) + share / y.candidates.shape[1] for y in ground.labels)
        return a, b

    def peer_of(name: str, length: float = 1.0, most: int = 10**9, **given: Any) -> tuple[Parameterised, list[float], float]:
        method = peer(name, **given)
        return tempered(ground.transductive(lambda X, L, s: method(length * X, L, s), most)), TEMPERATURES, 1.0

    found: dict[str, Callable[[], tuple[Parameterised, list[float], float]]] = {
        "ours": ours,
        "ours, KL of d weighs 0.03": lambda: ours(kl_d=0.03),
        "softmax head": head,
        "softmax head, label smoothing": lambda: head(0.1),
        "softmax head, our trunk": lambda: head(hidden=own.hidden, dropout=own.dropout, epochs=own.epochs),
        "softmax head, our trunk, smoothing": lambda: head(0.1, hidden=own.hidden, dropout=own.dropout, epochs=own.epochs),
        "logistic regression": lambda: probabilities(LogisticBaseline(tax, enc, seed=seed)),
    }
    if conditioned:
        found |= {
            "label smoothing": lambda: (smoothed, SHARES, 0.1),
            "GLLE": lambda: peer_of("GLLE", length=20.0, most=1000, max_iterations=100),  # embeddings of length 1, or more rows or steps: not a number
            "LEVI, 150 epochs": lambda: peer_of("LEVI", labels=True, scaled=True, epochs=150),
        }
    return _chosen(found, names)


def _chosen(found: dict[str, Any], names: Sequence[str]) -> dict[str, Any]:
    if unknown := set(names) - set(found):
        raise SystemExit(f"no method {', '.join(sorted(unknown))}; known are {', '.join(found)}")
    return {k: v for k, v in found.items() if not names or k in names}


def recover(args: argparse.Namespace) -> None:
    encoder, conditioned = PromptEncoder.from_pretrained(remember=True), args.action == "recover"
    for seed in args.seeds:
        ground = Ground(Taxonomy.builtin(), encoder, seed, args.rows)
        encoder.encode([p.text for part in (ground.train, ground.validation, ground.test) for p in part])  # before the clock starts
        for name, make in methods(ground, conditioned, args.methods).items():
            start = time.perf_counter()
            at, values, plain = make()
            best = min(values, key=lambda v: compare_distributions(ground.truth[0], at(v)[0])["KL"])
            seconds = time.perf_counter() - start
            for chosen, value in (("none", plain), ("on validation", best)):
                figures = compare_distributions(ground.truth[1], at(value)[1])
                write(args, {"action": args.action, "method": name, "seed": seed, "chosen": chosen, "value": value, "seconds": seconds} | figures)


def sweep(args: argparse.Namespace) -> None:
    tax, encoder = Taxonomy.builtin(), PromptEncoder.from_pretrained(remember=True)

    def category(p: Prompt) -> Prompt:
        return replace(p, labels=tuple(dict.fromkeys(tax[k].parent or k for k in p.labels))[:1])

    def unsafe(p: Prompt) -> Prompt:
        return replace(p, labels=("unsafe",) if p.labels else ())

    for seed in args.seeds:
        ground = Ground(tax, encoder, seed, args.rows)
        rng = np.random.default_rng(seed)
        named = rng.random(len(ground.train)) < 0.05
        supervisions = {
            "unsafe or not": [unsafe(p) for p in ground.train],
            "and 5 % categories": [category(p) if n else unsafe(p) for p, n in zip(ground.train, named, strict=True)],
            "categories": [category(p) for p in ground.train],
            "leaves": ground.train,
        }
        single = [p for p in ground.test if len(p.labels) == 1]
        leaf = np.array([tax.index(p.labels[0]) for p in single])
        groups = np.array(tax.groups())
        for name, rows in supervisions.items():
            for anchors in (True, False):
                for reconstruction in (True, False):
                    weights = ObjectiveWeights(reconstruction=args.reconstruction if reconstruction else 0.0, kl_d=0.03)
                    config = EnhancerConfig(
                        seed=seed, anchors="taxonomy" if anchors else "none", seeds_per_anchor=0 if name != "leaves" else 32, weights=weights
                    )
                    model = VariationalEnhancer(tax, encoder, config).fit(rows, [])
                    p = model.predict_proba([q.text for q in single])
                    p[:, 0] = 0
                    by_category = np.stack([p[:, groups == g].sum(1) for g in range(groups.max() + 1)], axis=1)
                    everything = model.predict_proba([q.text for q in ground.test])
                    figures = {
                        "AUROC": float(roc_auc_score([not q.benign for q in ground.test], 1 - everything[:, 0])),
                        "category": float((by_category.argmax(1) == groups[leaf]).mean()),
                        "leaf": float((p.argmax(1) == leaf).mean()),
                        "KL": compare_distributions(ground.truth[1], model.predict_proba([q.text for q in ground.annotated[1]]))["KL"],
                    }
                    write(args, {"action": "sweep", "method": name, "anchors": anchors, "reconstruction": reconstruction, "seed": seed} | figures)


WHOLE, POINT = "as it is", "softmax point estimate"
JUDGED = ("macro_f1", "auroc", "ece", "nll", "leaf_f1", "twins", "KL", "outside", "entropy")
ABLATIONS: dict[str, dict[str, Any]] = {
    WHOLE: {},
    "no reconstruction": {"weights": ObjectiveWeights(reconstruction=0.0)},
    "no anchors": {"anchors": "none"},
    "permuted anchors": {"anchors": "permuted"},
    "flat prior": {"prior": "flat"},
    "start from base rates": {"start": "base_rate"},
    "no pair term": {"weights": ObjectiveWeights(pair=0.0)},
    "no z": {"latent_dim": 0},
    "KL of d weighs 0": {"weights": ObjectiveWeights(kl_d=0.0)},
    "KL of d weighs 0.1": {"weights": ObjectiveWeights(kl_d=0.1)},
}


def ablate(args: argparse.Namespace) -> None:
    tax, encoder = Taxonomy.builtin(), PromptEncoder.from_pretrained(remember=True)
    for seed in args.seeds:
        ground = Ground(tax, encoder, seed, args.rows)
        outside = [t for texts in load_out_of_domain().values() for t in texts]
        chosen = _chosen(ABLATIONS | {POINT: {}}, args.methods)
        for name, changes in ABLATIONS.items():
            if name not in chosen:
                continue
            model = VariationalEnhancer(tax, encoder, EnhancerConfig(seed=seed, **changes)).fit(ground.train, ground.validation)
            write(args, {"action": "ablate", "method": name, "seed": seed} | judged(ground, model.predict_alpha, outside))
        if POINT not in chosen:
            continue
        own = EnhancerConfig()
        head = SoftmaxBaseline(
            tax, encoder, rank=0, epochs=own.epochs, batch_size=own.batch_size, lr=own.lr, hidden=own.hidden, dropout=own.dropout, seed=seed
        ).fit(ground.train)
        t = fit_temperature(head.predict_proba([p.text for p in ground.validation]) + 1e-9, encode_labels(ground.validation, tax))
        figures = judged(ground, lambda texts: temper(head.predict_proba(texts) + 1e-9, t), outside, own_evidence=False)  # noqa: B023 - called at once
        write(args, {"action": "ablate", "method": POINT, "seed": seed} | figures)


def far(inside: Array, outside: Array) -> float:
    """AUROC of a score that should be higher for texts outside the domain."""
    return float(roc_auc_score([0] * len(inside) + [1] * len(outside), np.r_[inside, outside]))


def judged(ground: Ground, alpha: Callable[[list[str]], Array], outside: list[str], *, own_evidence: bool = True) -> dict[str, float]:
    """Figures on the test split, from concentrations or, for a point estimate, which has no evidence of its own, probabilities.

    `outside` and `entropy` say how well vacuity and the entropy of the mean tell texts outside the domain from prompts.
    """
    a = alpha([p.text for p in ground.test])
    p = a / a.sum(1, keepdims=True)
    figures = {k: v for k, v in classification_figures(p, ground.test, ground.taxonomy).items() if k in JUDGED}
    noncompliant, benign = twin_pairs(ground.test).T
    figures["twins"] = float((p[noncompliant, 0] < p[benign, 0]).mean())
    annotated = alpha([q.text for q in ground.annotated[1]])
    figures["KL"] = compare_distributions(ground.truth[1], annotated / annotated.sum(1, keepdims=True))["KL"]
    other = alpha(outside)
    if own_evidence:
        figures["outside"] = far(-a.sum(1), -other.sum(1))
    figures["entropy"] = far(entropy(p, axis=1), entropy(other / other.sum(1, keepdims=True), axis=1))
    return figures


def write(args: argparse.Namespace, record: dict[str, Any]) -> None:
    print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}), flush=True)
    args.results.parent.mkdir(parents=True, exist_ok=True)
    with args.results.open("a") as file:
        file.write(json.dumps(record) + "\n")


def table(args: argparse.Namespace) -> None:
    frame = pd.DataFrame([json.loads(line) for line in args.results.read_text().splitlines()])
    frame = frame.drop_duplicates([k for k in ("action", "method", "chosen", "anchors", "reconstruction", "seed") if k in frame], keep="last")
    parts = []
    for action, given in frame.groupby("action"):
        keys, measures = ["method", "chosen"], ["value", "seconds", *(m.name for m in DISTRIBUTION_MEASURES)]
        if action == "sweep":
            keys, measures = ["method", "anchors", "reconstruction"], ["AUROC", "category", "leaf", "KL"]
        elif action == "ablate":
            keys, measures = ["method"], list(JUDGED)
            whole = given[given["method"] == WHOLE].set_index("seed").loc[given["seed"], measures]
            given = given.join((given[measures] - whole.to_numpy()).rename(columns=lambda c: f"{c} change"))  # of the same seed, so of the same prompts
            measures += [f"{m} change" for m in measures]
        found = given.groupby(keys)[measures]
        mean = found.mean().join(found.std().fillna(0.0).rename(columns=lambda c: f"{c} sd")).assign(seeds=found.size(), action=action)
        print(f"\n# {action}\n" + mean.drop(columns="action").round(4).to_string())
        parts.append(mean.reset_index())
    if args.csv:
        written = pd.concat(parts)
        (written[written["chosen"] != "none"] if "chosen" in written else written).round(5).to_csv(args.csv, index=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("action", choices=("recover", "predict", "sweep", "ablate", "table"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rows", type=int, default=4000, help="training prompts with at most one label")
    parser.add_argument("--methods", nargs="+", default=[])
    parser.add_argument("--reconstruction", type=float, default=0.03, help="weight of that term in the sweep, where it is on")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--results", type=Path, default=Path("results/text_enhancement.jsonl"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    {"recover": recover, "predict": recover, "sweep": sweep, "ablate": ablate, "table": table}[args.action](args)


if __name__ == "__main__":
    main()
