"""The enhancer beside its plain baselines on public rows that none of them was trained on, over several seeds.

usage: LANCE_DATA=... .venv/bin/python benchmarks/noncompliance.py [--rows all|embedded|coconot] [--seeds 0 1 2] [--models ...] [--save FOLDER] [--csv FILE]

Training rows are those of `make train`, or of these the embedded corpus or CoCoNot's alone. Measured on CoCoNot's evaluation and contrast prompts (six
classes, benign for contrast), on XSTest (AUROC of risk for unsafe prompts), and on ordinary instructions (share flagged at 0.5). One line of JSON per fit,
appended to --results; --save keeps the enhancers; --csv writes means and spreads over the seeds there, as the book reads them.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.metrics import roc_auc_score

from lance import public
from lance.baselines import LogisticBaseline, SoftmaxBaseline
from lance.calibration import fit_temperature, temper
from lance.corpus import encode_labels
from lance.encoder import PromptEncoder
from lance.enhancer import VariationalEnhancer
from lance.fitting import EnhancerConfig
from lance.metrics import classification_figures
from lance.taxonomy import Taxonomy
from lance.training import TrainingSet, embedded_training_set

ADAPTATIONS = {"frozen": EnhancerConfig, "LoRA": EnhancerConfig.lora, "full": EnhancerConfig.full}
MODELS = {f"{head}, {name}": make for head in ("enhancer", "softmax") for name, make in ADAPTATIONS.items()}
MEASURES = ["macro_f1", "auroc", "ece", "leaf_f1", "xstest_auroc", "ordinary_flagged", "seconds"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--models", nargs="+", default=["logistic", *MODELS], choices=["logistic", *MODELS])
    parser.add_argument("--rows", choices=("all", "embedded", "coconot"), default="all")
    parser.add_argument("--epochs", type=int, default=2, help="of the models that train the encoder")
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--results", type=Path, default=Path("results/noncompliance.jsonl"))
    parser.add_argument("--save", type=Path, help="keep each enhancer in a folder of this one")
    parser.add_argument("--csv", type=Path, help="summarise --results into this file, and fit nothing")
    args = parser.parse_args()
    if args.csv:
        runs = pd.DataFrame([json.loads(line) for line in args.results.read_text().splitlines()])
        found = runs.drop_duplicates(["model", "rows", "epochs", "seed"], keep="last").groupby(["model", "rows", "epochs"])
        mean = found[MEASURES].mean().join(found[MEASURES].std().fillna(0.0).rename(columns=lambda c: f"{c} sd")).assign(seeds=found.size())
        mean.round(5).to_csv(args.csv)
        print(mean.round(4).to_string())
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    taxonomy, encoder = Taxonomy.builtin(), PromptEncoder.from_pretrained(remember=True)
    coconot = public.load_coconot("eval") + public.load_coconot("contrast")
    xstest, ordinary = public.load_xstest(), public.load_instructions()
    for seed in args.seeds:
        data = embedded_training_set(taxonomy, encoder, use_public=args.rows != "embedded", seed=seed)
        if args.rows == "coconot":
            once = [
                list({p.id: p for p in rows if p.source == "coconot" and not p.note.startswith("reframed as")}.values())
                for rows in (data.train, data.validation)
            ]
            data = TrainingSet(*once, sources={})
        labels = encode_labels(data.validation, taxonomy)
        encoder.encode([p.text for p in data.train])  # before the clock starts: what is remembered would be free to all but the first
        for name in args.models:
            start = time.perf_counter()
            if name == "logistic":
                model = LogisticBaseline(taxonomy, encoder, seed=seed).fit(data.train)
            else:
                config = MODELS[name](seed=seed)
                config = replace(config, epochs=args.epochs) if config.trains_encoder else config
                if name.startswith("enhancer"):
                    model = VariationalEnhancer(taxonomy, encoder, config).fit(data.train, data.validation)
                    if args.save:
                        model.save_pretrained(args.save / f"{name.split()[-1]}-{seed}")
                    model.encoder.merge_adapter()
                else:
                    c, hidden = config, config.hidden if config.layers else 0
                    model = SoftmaxBaseline(
                        taxonomy,
                        encoder,
                        rank=c.lora_rank if c.adaptation == "lora" else 0,
                        full=c.adaptation == "full",
                        epochs=c.epochs,
                        batch_size=c.batch_size,
                        lr=c.lr,
                        encoder_lr=c.encoder_lr,
                        hidden=hidden,
                        dropout=c.dropout if hidden else 0.0,
                        seed=seed,
                    ).fit(data.train)
            seconds = time.perf_counter() - start
            found = {key: model.predict_proba([p.text for p in rows]) for key, rows in (("coconot", coconot), ("xstest", xstest), ("ordinary", ordinary))}
            if not name.startswith("enhancer"):  # the same calibration for all
                t = fit_temperature(model.predict_proba([p.text for p in data.validation]) + 1e-9, labels)
                found = {key: temper(p + 1e-9, t) / (p + 1e-9).sum(1, keepdims=True) for key, p in found.items()}
            row = {
                "model": name,
                "seed": seed,
                "rows": args.rows,
                "epochs": args.epochs,
                "training_rows": len(data.train),
                "seconds": seconds,
                **classification_figures(found["coconot"], coconot, taxonomy),
            }
            row["xstest_auroc"] = float(roc_auc_score([not p.benign for p in xstest], 1 - found["xstest"][:, 0]))
            row["ordinary_flagged"] = float(np.mean(1 - found["ordinary"][:, 0] > 0.5))
            print(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}), flush=True)
            args.results.parent.mkdir(parents=True, exist_ok=True)
            with args.results.open("a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
