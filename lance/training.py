"""Training a whole pipeline: what goes in, in which order, and the card that says so."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lance import public
from lance.corpus import Prompt, load_corpus, refined_prompts, reframed_prompts
from lance.encoder import PromptEncoder
from lance.enhancer import VariationalEnhancer
from lance.errors import DataError
from lance.fitting import EnhancerConfig
from lance.pipeline import Lance
from lance.proposers import ExemplarProposer
from lance.refiner import fit_threshold
from lance.splits import without_evaluation_prompts
from lance.taxonomy import Taxonomy
from lance.verifier import Verifier

PASS_RATE, CONTRAST_PASS_RATE = 0.985, 0.95  # of ordinary benign prompts, and of contrast prompts, which people send far less often than a corpus holds them
REFINED_SHARE, REFRAMED_SHARE = 0.2, 0.1  # of rewrites and of noncompliant prompts, as further rows
COCONOT_REPEATS = 2  # the corpus has seven times as many rows as CoCoNot's samples; so both have a say, and none is learnt by heart
TRAIN_HARMFUL = ("advbench", "catqa", "malicious_instruct")  # jailbreakbench and strongreject stay unseen, for measuring


@dataclass(frozen=True)
class TrainingSet:
    """Rows for training and for calibration, and where they came from."""

    train: list[Prompt]
    validation: list[Prompt]
    sources: dict[str, int]


def augmented(prompts: Sequence[Prompt], taxonomy: Taxonomy, seed: int = 0) -> list[Prompt]:
    """Prompts, a share of their rewrites as benign prompts, and reframed prompts (which teach that a reframing cures its own leaf and no other).

    Not all of the rewrites: with their twins they would outnumber the noncompliant prompts by far.
    """
    refined = refined_prompts(prompts)
    refined = _some(refined, round(REFINED_SHARE * len(refined)), np.random.default_rng(seed))
    return [*prompts, *refined, *reframed_prompts(prompts, taxonomy, share=REFRAMED_SHARE, seed=seed)]


def embedded_training_set(taxonomy: Taxonomy, encoder: PromptEncoder, *, use_public: bool = True, seed: int = 0) -> TrainingSet:
    """The embedded corpus and, where LANCE_DATA is set, public training rows.

    From CoCoNot the train sample and the contrast training prompts; harmful instructions (two of five sets stay unseen); R-U-A-Robot. A tenth of the CoCoNot
    rows is held out for calibration. Rows that are, or nearly are, prompts of the evaluation files in LANCE_DATA are left out.
    """
    rng = np.random.default_rng(seed)
    train = augmented(load_corpus("train"), taxonomy, seed)
    validation = augmented(load_corpus("validation"), taxonomy, seed)
    sources = {"embedded corpus, with rewrites and reframings": len(train)}
    if use_public and public.data_folder(required=False) is not None:
        coconot = public.load_coconot("train") + public.load_coconot("pref")
        harmful = public.load_harmful(TRAIN_HARMFUL)
        robot = _some(public.load_robot("pos"), 200, rng) + _some(public.load_robot("neg"), 200, rng)
        rows = coconot + _some(harmful, 600, rng) + robot
        held_out = (
            public.load_coconot("eval") + public.load_coconot("contrast") + public.load_xstest() + public.load_harmful(("jailbreakbench", "strongreject"))
        )
        x = encoder.encode([p.text for p in rows]).numpy()
        y = encoder.encode([p.text for p in held_out]).numpy()
        rows = without_evaluation_prompts(rows, held_out, x, y)
        held = {p.id for p in _some([p for p in rows if p.source == "coconot"], len(coconot) // 10, rng)}
        validation += [replace(p, split="validation") for p in rows if p.id in held]
        rows = [p for p in rows if p.id not in held]
        rows += reframed_prompts(rows, taxonomy, share=REFRAMED_SHARE, seed=seed)
        rows += (COCONOT_REPEATS - 1) * [p for p in rows if p.source == "coconot"]
        train += rows
        sources |= {f"{name} (LANCE_DATA)": n for name, n in sorted(Counter(p.source for p in rows).items())}
    return TrainingSet(train, validation, sources)


def train(
    data: TrainingSet,
    *,
    taxonomy: Taxonomy,
    encoder: PromptEncoder,
    config: EnhancerConfig | None = None,
    exemplars: Sequence[Prompt] = (),
    pass_rate: float = PASS_RATE,
    contrast_pass_rate: float = CONTRAST_PASS_RATE,
    progress: Callable[[dict[str, float]], None] | None = None,
) -> Lance:
    """Fit enhancer and verifier, then set t: the smallest with which at least `pass_rate` of the ordinary benign validation prompts pass and at least
    `contrast_pass_rate` of the contrast prompts among them.

    Raises
    ------
    DataError
        When the training or the validation rows lack benign or noncompliant prompts.
    """
    config = config or EnhancerConfig.full()
    for name, rows in (("training", data.train), ("validation", data.validation)):
        if len({p.benign for p in rows}) < 2:
            raise DataError(f"the {name} rows need benign and noncompliant prompts; found {len(rows)} rows of one kind only")
    enhancer = VariationalEnhancer(taxonomy, encoder, config).fit(data.train, data.validation, progress=progress)
    verifier = Verifier(seed=config.seed + 1).fit(data.train, data.validation, pass_rate=pass_rate)
    threshold = max(
        fit_threshold(enhancer, [p.text for p in rows], pass_rate=rate)
        for rows, rate in zip(ordinary_and_contrast(data.validation), (pass_rate, contrast_pass_rate), strict=True)
        if rows
    )
    alpha = enhancer.predict_alpha([p.text for p in data.validation])
    vacuity = np.minimum(1, alpha.shape[1] / alpha.sum(1))
    limit = max(0.5, float(np.quantile(vacuity, 0.99)))
    return Lance(enhancer, verifier, threshold=threshold, vacuity_limit=limit, exemplars=ExemplarProposer.pairs_of(exemplars), seed=config.seed)


def written_benign(prompts: Sequence[Prompt]) -> list[Prompt]:
    """Benign prompts as people write them; rewrites and reframings, which are easier to pass, count only where there is nothing else."""
    benign = [p for p in prompts if p.benign]
    return [p for p in benign if not p.note.startswith(("refined from", "reframed as"))] or benign


def ordinary_and_contrast(prompts: Sequence[Prompt]) -> tuple[list[Prompt], list[Prompt]]:
    """The benign prompts as people write them, in two lists: ordinary ones, and contrast prompts (twins, and CoCoNot's contrast prompts)."""
    benign = written_benign(prompts)
    contrast = [p.twin is not None or p.source == "coconot" for p in benign]
    return [p for p, c in zip(benign, contrast, strict=True) if not c], [p for p, c in zip(benign, contrast, strict=True) if c]


def write_model_card(lance: Lance, data: TrainingSet, folder: Path, figures: dict[str, Any], seconds: float) -> None:
    """README.md of a model folder: the data, the seed, the settings and the figures."""
    c = lance.enhancer.config
    rows = "\n".join(f"| {name} | {n} |" for name, n in data.sources.items())
    measured = "\n".join(f"| {name} | {value:.4f} |" if isinstance(value, float) else f"| {name} | {value} |" for name, value in figures.items())
    trained = {"frozen": "(frozen)", "lora": f"with a LoRA adapter of rank {c.lora_rank}", "full": "whose linear layers were trained along"}[c.adaptation]
    head = f" and {c.head_epochs} of the network alone" if c.trains_encoder and c.head_epochs else ""
    text = f"""# Model card

Written by `lance.training`; do not edit by hand.

A variational label enhancer over {len(lance.taxonomy)} leaves of the taxonomy `{lance.taxonomy.name}` on the encoder
`{lance.enhancer.base.name}` {trained}, a character n-gram verifier, and {len(lance.exemplars.pairs)} exemplars for rewriting.

## Training rows

| source | rows |
|---|---|
{rows}

Calibrated on {len(data.validation)} validation rows: temperature {lance.enhancer.temperature:.3f}; threshold t = {lance.threshold:.4f} on U95,
with which at least {PASS_RATE:.1%} of the ordinary benign ones pass and at least {CONTRAST_PASS_RATE:.0%} of the contrast prompts;
verifier threshold {lance.verifier.threshold:.4f}.
Seed {c.seed}, {c.epochs} epochs{head}, {seconds:.0f} s.

## Figures

| measure | value |
|---|---|
{measured}

## Use and limits

It says which reasons speak against simply complying with an English prompt, and how sure it is. It is small: it knows the borders that its
corpus writes out, and misses others. It is no safety guarantee. Licence: MIT; the encoder's weights are Apache-2.0.
"""
    (folder / "README.md").write_text(text, encoding="utf-8")


def _some(rows: list[Prompt], n: int, rng: np.random.Generator) -> list[Prompt]:
    return [rows[i] for i in sorted(rng.permutation(len(rows))[:n])]
