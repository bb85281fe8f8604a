"""Annotation passes, answers and declines: complete, of the taxonomy, natural; and the agreement figure against cases with a known answer."""

import re
from collections import Counter

import numpy as np
import pytest

from lance.companions import agreement, disagreement, load_annotations, load_answers, load_declines, load_out_of_domain
from lance.corpus import Prompt, refined_prompts
from lance.taxonomy import Taxonomy

REFUSING = re.compile(r"^(i'?m sorry|sorry|i can('?t|not)|i won'?t|as an ai|unfortunately|i am unable)", re.IGNORECASE)


def test_every_prompt_with_several_leaves_has_three_passes_and_their_mean(corpus: list[Prompt], taxonomy: Taxonomy) -> None:
    found = load_annotations()
    assert set(found) == {p.id for p in corpus if p.distribution is not None}
    assert set(found) >= {p.id for p in corpus if len(p.labels) > 1}
    for p in corpus:
        if p.distribution is None:
            continue
        passes = found[p.id]
        assert len(passes) == 3
        for weights in passes:
            assert set(weights) <= set(taxonomy.keys)
            assert sum(weights.values()) == pytest.approx(1, abs=1e-6)
        for key in taxonomy.keys:
            assert p.distribution.get(key, 0.0) == pytest.approx(sum(w.get(key, 0.0) for w in passes) / 3, abs=2e-3)
        assert set(p.labels) & set(p.distribution), f"{p.id}: no weight on its labels"


def test_agreement_of_copies_is_one_and_of_strangers_about_zero(taxonomy: Taxonomy) -> None:
    keys = taxonomy.keys
    copies = {f"p{i}": ({keys[1 + i]: 1.0},) * 3 for i in range(10)}
    assert agreement(copies, taxonomy) == pytest.approx({"distance": 0.0, "chance": 1.0, "alpha": 1.0, "same_top": 1.0})
    strangers = {f"p{i}": tuple({keys[1 + (i * step + step) % 10]: 1.0} for step in (1, 3, 7)) for i in range(10)}
    assert abs(agreement(strangers, taxonomy)["alpha"]) < 0.15


def test_disagreement_says_between_which_leaves_mass_moves(taxonomy: Taxonomy) -> None:
    a, b, c = taxonomy.keys[1:4]
    found = disagreement({"p": ({a: 1.0}, {a: 0.6, b: 0.3, c: 0.1})}, taxonomy)
    assert found[1, 2] == found[2, 1] == pytest.approx(0.3)
    assert found[1, 3] == pytest.approx(0.1)
    assert found[2, 3] == 0
    annotations = load_annotations()
    assert np.triu(disagreement(annotations, taxonomy)).sum() == pytest.approx(agreement(annotations, taxonomy)["distance"])


def test_the_annotators_agree_far_beyond_chance(taxonomy: Taxonomy) -> None:
    found = agreement(load_annotations(), taxonomy)
    assert found["alpha"] > 0.667  # below which Krippendorff advises against any conclusion
    assert found["same_top"] > 0.5


def test_answers_belong_to_prompts_that_can_be_answered(corpus: list[Prompt]) -> None:
    prompts = {p.id: p.text for p in [*corpus, *refined_prompts(corpus)] if p.benign}
    answers = load_answers()
    assert len(answers) >= 600
    assert [i for i in answers if i not in prompts] == []
    for key, text in answers.items():
        assert text.strip() == text != "", key
        assert not REFUSING.match(text), f"{key} opens like a refusal: {text[:60]!r}"
        assert text != prompts[key]
    openings = Counter(" ".join(re.findall(r"[\w']+", text.lower())[:3]) for text in answers.values())
    assert openings.most_common(1)[0][1] <= 0.03 * len(answers)


def test_declines_cover_every_leaf_and_never_repeat_an_opening(taxonomy: Taxonomy) -> None:
    declines = load_declines()
    assert set(declines) == set(taxonomy.keys[1:])
    assert min(map(len, declines.values())) >= 15
    texts = [t for leaf in declines.values() for t in leaf]
    assert [t for t in texts if REFUSING.match(t)] == []
    openings = Counter(tuple(re.findall(r"[\w']+", t.lower())[:5]) for t in texts)
    assert [o for o, n in openings.items() if n > 1] == []


def test_texts_outside_the_domain_are_no_prompts_of_the_corpus(corpus: list[Prompt]) -> None:
    found = load_out_of_domain()
    assert {kind: len(texts) >= 80 for kind, texts in found.items()} == {"language": True, "code": True, "gibberish": True}
    texts = [t for kind in found.values() for t in kind]
    assert len(set(texts)) == len(texts)
    assert not set(texts) & {t for p in corpus for t in (p.text, *p.refined)}
