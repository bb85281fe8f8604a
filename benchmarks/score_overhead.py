"""What `score` costs beside the bare encoder's forward passes on the same batches.

usage: .venv/bin/python benchmarks/score_overhead.py [--prompts 2000] [--rounds 5]

Both run in turns in one process; the ratio of each round and its median are printed. The bare encoder gets its batches tokenised beforehand, `score` does
everything: tokenising, forward passes, heads, distributions, the records that are written.
"""

import argparse
import json
import statistics
import time

import torch

from lance import Lance, load_corpus
from lance.pipeline import score_record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=64)
    args = parser.parse_args()
    lance = Lance.from_pretrained()
    corpus = [p.text for p in load_corpus()]
    texts = [corpus[i % len(corpus)] for i in range(args.prompts)]
    base = lance.enhancer.base
    windows = base.windows(texts)
    batches = [base.collate([windows[i] for i in index]) for index in base.batches(windows, args.batch_size)]

    def bare() -> None:
        with torch.inference_mode():
            for ids, mask in batches:
                base.forward(ids, mask)

    def score() -> None:
        for d in lance.score(texts, args.batch_size):
            score_record(d)

    bare()
    score()
    ratios, seconds = [], []
    for _ in range(args.rounds):
        start = time.perf_counter()
        bare()
        middle = time.perf_counter()
        score()
        end = time.perf_counter()
        ratios.append((end - middle) / (middle - start))
        seconds.append((middle - start, end - middle))
    print(json.dumps({"prompts": len(texts), "ratio_median": statistics.median(ratios), "ratios": ratios, "seconds_bare_score": seconds}))


if __name__ == "__main__":
    main()
