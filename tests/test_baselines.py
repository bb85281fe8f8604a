"""The plain baselines: they learn, and their settings do what they say."""

import numpy as np
import pytest

from lance.baselines import LogisticBaseline, SoftmaxBaseline
from lance.corpus import Prompt, encode_labels
from lance.encoder import PromptEncoder
from lance.taxonomy import Taxonomy


@pytest.fixture(scope="module")
def rows(corpus: list[Prompt]) -> list[Prompt]:
    leaves = ("copyright", "temporal")
    return [p for p in corpus if p.split == "train" and len(p.text) < 120 and (p.benign or p.labels in [(leaf,) for leaf in leaves])][::20][:240]


@pytest.fixture(scope="module")
def remembering() -> PromptEncoder:
    return PromptEncoder.from_pretrained(remember=True)


def right(model: LogisticBaseline | SoftmaxBaseline, rows: list[Prompt], taxonomy: Taxonomy) -> float:
    found = model.predict_proba([p.text for p in rows])
    assert found.sum(1) == pytest.approx(1)
    return float((found.argmax(1) == encode_labels(rows, taxonomy).candidates.argmax(1)).mean())


def test_a_head_on_frozen_embeddings_learns_with_and_without_a_trunk(rows: list[Prompt], taxonomy: Taxonomy, remembering: PromptEncoder):
    guess = max(np.mean([p.benign for p in rows]), np.mean([not p.benign for p in rows]))
    for settings in ({}, {"hidden": 32, "dropout": 0.5}):
        model = SoftmaxBaseline(taxonomy, remembering, rank=0, epochs=40, lr=5e-3, **settings).fit(rows)
        assert right(model, rows, taxonomy) > guess + 0.05
    assert right(LogisticBaseline(taxonomy, remembering).fit(rows), rows, taxonomy) > guess + 0.05


def test_label_smoothing_makes_a_head_less_sure(rows: list[Prompt], taxonomy: Taxonomy, remembering: PromptEncoder):
    texts = [p.text for p in rows]
    sure, smooth = (
        SoftmaxBaseline(taxonomy, remembering, rank=0, epochs=40, lr=5e-3, smoothing=s).fit(rows).predict_proba(texts).max(1).mean() for s in (0.0, 0.3)
    )
    assert smooth < sure - 0.05


def test_logistic_regression_learns_a_category_of_which_no_leaf_is_known(rows: list[Prompt], taxonomy: Taxonomy, remembering: PromptEncoder):
    coarse = [Prompt(p.text, ("safety",)) if "copyright" in p.labels else p for p in rows]
    found = LogisticBaseline(taxonomy, remembering).fit(coarse).predict_proba([p.text for p in rows if "copyright" in p.labels])
    members = [taxonomy.index(leaf.key) for leaf in taxonomy.leaves if leaf.parent == "safety"]
    assert found[:, members].sum(1).mean() > 0.5


def test_several_labels_that_all_apply_share_the_mass(rows: list[Prompt], taxonomy: Taxonomy, remembering: PromptEncoder):
    both = [Prompt(p.text, ("copyright", "temporal")) for p in rows if not p.benign]
    found = (
        SoftmaxBaseline(taxonomy, remembering, rank=0, epochs=60, lr=1e-2).fit([*both, *(p for p in rows if p.benign)]).predict_proba([p.text for p in both])
    )
    a, b = found[:, taxonomy.index("copyright")], found[:, taxonomy.index("temporal")]
    assert np.mean(np.abs(a - b)) < 0.15
    assert np.mean(a + b) > 0.5


def test_an_adapted_encoder_learns_more_and_the_one_given_stays(rows: list[Prompt], taxonomy: Taxonomy, remembering: PromptEncoder):
    before = {k: v.clone() for k, v in remembering.model.state_dict().items()}
    few, settings = rows[::6], {"epochs": 2, "lr": 1e-3, "batch_size": 8}
    frozen = right(SoftmaxBaseline(taxonomy, remembering, rank=0, **settings).fit(few), few, taxonomy)
    for adapted in ({"rank": 4}, {"full": True, "encoder_lr": 3e-4}):
        model = SoftmaxBaseline(taxonomy, remembering, **settings, **adapted).fit(few)
        assert right(model, few, taxonomy) >= frozen
        assert not np.allclose(model.encoder.encode(["a poem"]), remembering.encode(["a poem"]), atol=1e-3)
    after = remembering.model.state_dict()
    assert before.keys() == after.keys()
    assert all((before[k] == after[k]).all() for k in before)
