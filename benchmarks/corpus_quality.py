"""The quality of the embedded corpus in figures, each beside what is asked of it.

usage: [LANCE_DATA=...] .venv/bin/python benchmarks/corpus_quality.py

Nearness to evaluation prompts (CoCoNot's evaluation and contrast prompts, XSTest, JailbreakBench, StrongREJECT) is measured where LANCE_DATA is set:
of prompts, of refined prompts and of answers. Leaves with exit status 1 when a limit is broken.
"""

import json
import sys

from lance import public
from lance.companions import corpus_file, load_answers
from lance.corpus import load_corpus, read_rows, refined_prompts
from lance.encoder import PromptEncoder
from lance.quality import COPIED, NEAR, broken_rows, copied_rows, divided_groups, near_pairs, variety


def main() -> int:
    prompts, encoder = load_corpus(), PromptEncoder.from_pretrained()
    vectors = encoder.encode([p.text for p in prompts]).numpy()
    figures = {"rows": len(prompts), **variety([p.text for p in prompts])}
    faults: dict[str, list] = {  # type: ignore[type-arg]
        f"pairs above {NEAR} that are no twins": near_pairs(prompts, vectors),
        "groups of twins and near-duplicates in several splits": divided_groups(prompts, vectors),
        "rows that break the schema, a span or the simplex": broken_rows(row for _, row in read_rows(corpus_file("prompts.jsonl"))),
    }
    if public.data_folder(required=False) is not None:
        held = public.load_coconot("eval") + public.load_coconot("contrast") + public.load_xstest() + public.load_harmful(("jailbreakbench", "strongreject"))
        evaluation = encoder.encode([p.text for p in held]).numpy()
        refined, answers = refined_prompts(prompts), load_answers()
        texts = {"prompts": [(p.id, p.text) for p in prompts], "refined prompts": [(p.id, p.text) for p in refined], "answers": list(answers.items())}
        for kind, rows in texts.items():
            x = vectors if kind == "prompts" else encoder.encode([t for _, t in rows]).numpy()
            faults[f"{kind} above {COPIED} to an evaluation prompt"] = copied_rows([i for i, _ in rows], x, evaluation)
    if figures["top_opening_share"] > 0.03:
        faults["openings of more than 3 % of the rows"] = [figures["top_opening"]]
    print(json.dumps(figures | {name: len(found) for name, found in faults.items()}, indent=2))
    for name, found in faults.items():
        for item in found[:20]:
            print(f"{name}: {item}")
    return int(any(faults.values()))


if __name__ == "__main__":
    sys.exit(main())
