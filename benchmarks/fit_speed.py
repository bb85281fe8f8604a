"""Seconds of training and of encoding on this machine.

usage: .venv/bin/python benchmarks/fit_speed.py [--frozen 10000] [--lora 0] [--precision 2000] [--threads 0]

--frozen     fit of the enhancer on a frozen encoder, on so many prompts of the corpus; encoding them is part of it, and told apart
--lora       fit with a LoRA adapter, on so many prompts (0: not measured)
--precision  the shipped enhancer in float32, bfloat16 and int8 (linear layers, dynamically quantised) side by side on so many test prompts: throughput,
             and AUROC of risk on the corpus's labels
"""

import argparse
import copy
import json
import time
from collections.abc import Callable

import numpy as np
import torch
from sklearn.metrics import roc_auc_score
from torch.ao.quantization import quantize_dynamic

from lance import Lance, VariationalEnhancer, load_corpus
from lance.encoder import PromptEncoder
from lance.fitting import EnhancerConfig
from lance.taxonomy import Taxonomy


def timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--frozen", type=int, default=10_000)
    parser.add_argument("--lora", type=int, default=0)
    parser.add_argument("--precision", type=int, default=2000)
    parser.add_argument("--threads", type=int, default=0)
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    taxonomy, encoder = Taxonomy.builtin(), PromptEncoder.from_pretrained()
    rows = load_corpus("train")
    rows = [rows[i] for i in np.random.default_rng(0).permutation(len(rows))]
    validation = load_corpus("validation")[:500]
    encoder.encode(["warm up"] * 64)
    if args.frozen:
        some = rows[: args.frozen]
        encoding = timed(lambda: encoder.encode([p.text for p in some]))
        fit = timed(lambda: VariationalEnhancer(taxonomy, encoder).fit(some, validation))
        print(
            json.dumps({"fit": "frozen", "prompts": len(some), "seconds": round(fit, 1), "of which encoding, measured before": round(encoding, 1)}), flush=True
        )
    if args.lora:
        some = rows[: args.lora]
        fit = timed(lambda: VariationalEnhancer(taxonomy, encoder, EnhancerConfig.lora()).fit(some, validation))
        print(json.dumps({"fit": "LoRA", "prompts": len(some), "epochs": EnhancerConfig.lora().epochs, "seconds": round(fit, 1)}), flush=True)
    if args.precision:
        test = load_corpus("test")[: args.precision]
        texts, truth = [p.text for p in test], [not p.benign for p in test]
        shipped = Lance.from_pretrained().enhancer
        variants = {"float32": shipped, "bfloat16": copy.deepcopy(shipped), "int8": copy.deepcopy(shipped)}
        variants["bfloat16"].encoder.model.to(torch.bfloat16)
        variants["int8"].encoder.model = quantize_dynamic(variants["int8"].encoder.model, {torch.nn.Linear}, dtype=torch.qint8)  # type: ignore[no-untyped-call]
        for model in variants.values():
            model.predict_proba(texts[:64])
        for name, model in variants.items():
            found: list[np.ndarray] = []
            seconds = timed(lambda model=model, found=found: found.append(model.predict_proba(texts)))  # type: ignore[misc]
            print(
                json.dumps(
                    {"precision": name, "prompts a second": round(len(texts) / seconds, 1), "AUROC": round(roc_auc_score(truth, 1 - found[0][:, 0]), 4)}
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
