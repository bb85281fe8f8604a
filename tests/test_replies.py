"""Constructive replies: reason, offer and question; always the same for a prompt, and not the same for all."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance.corpus import Prompt
from lance.distribution import RejectionDistribution
from lance.metrics import is_refusal_opening, opening, top_opening_share
from lance.replies import ABSTAINED, GENERIC, READY, constructive_reply
from lance.taxonomy import RESPONSES, Taxonomy

TAXONOMY = Taxonomy.builtin()
LEAVES = [leaf.key for leaf in TAXONOMY.leaves]


def weighted(taxonomy: Taxonomy, **shares: float) -> RejectionDistribution:
    alpha = np.array([1.0, *(20 * shares.get(k, 0.002) for k in taxonomy.keys[1:])])
    return RejectionDistribution(taxonomy.keys, alpha, taxonomy)


@pytest.mark.parametrize("leaf", LEAVES)
def test_every_leaf_gives_a_reason_an_offer_and_a_question(leaf: str):
    reply = TAXONOMY[leaf].reply
    for i in range(20):
        text = constructive_reply(weighted(TAXONOMY, **{leaf: 1.0}), f"prompt number {i}")
        parts = [next((p for p in choices if p in text), None) for choices in (reply.reasons, reply.offers, reply.questions)]
        assert all(parts), text
        assert text == " ".join(parts)
        assert text.endswith("?")


def test_the_same_prompt_always_gets_the_same_words():
    d = weighted(TAXONOMY, privacy=1.0)
    assert len({constructive_reply(d, "Where does she live?") for _ in range(5)}) == 1
    assert constructive_reply(d, "Where does she live?") == constructive_reply(weighted(TAXONOMY, privacy=0.9), "Where does she live?")


@pytest.mark.parametrize("leaf", LEAVES)
def test_the_same_leaf_speaks_in_more_than_one_way(leaf: str):
    d = weighted(TAXONOMY, **{leaf: 1.0})
    found = [constructive_reply(d, f"prompt number {i}") for i in range(60)]
    assert len(set(found)) >= 6
    assert len({opening(t) for t in found}) >= 2


def test_replies_over_the_corpus_follow_no_template(corpus: list[Prompt]):
    found = [constructive_reply(weighted(TAXONOMY, **{p.labels[0]: 1.0}), p.text) for p in corpus if len(p.labels) == 1 and p.labels[0] in LEAVES]
    assert len(found) > 300
    assert top_opening_share(found) < 0.06
    assert np.mean([is_refusal_opening(t) for t in found]) < 0.1


def test_phrasings_are_used_evenly():
    d = weighted(TAXONOMY, privacy=1.0)
    reasons = TAXONOMY["privacy"].reply.reasons
    counts = np.array([sum(constructive_reply(d, f"prompt {i}").startswith(r) for i in range(300)) for r in reasons])
    assert counts.sum() == 300
    assert counts.min() > 0.4 * 300 / len(reasons)


def test_a_second_strong_reason_of_another_kind_is_given_too():
    first, second, same_kind = "privacy", "temporal", "copyright"
    assert TAXONOMY[first].response == TAXONOMY[same_kind].response != TAXONOMY[second].response

    def says(text: str, leaf: str) -> bool:
        return any(r in text for r in TAXONOMY[leaf].reply.reasons)

    both = constructive_reply(weighted(TAXONOMY, **{first: 0.6, second: 0.4}), "x y z")
    assert says(both, first)
    assert says(both, second)
    assert not says(constructive_reply(weighted(TAXONOMY, **{first: 0.8, second: 0.15}), "x y z"), second)
    assert not says(constructive_reply(weighted(TAXONOMY, **{first: 0.6, same_kind: 0.4}), "x y z"), same_kind)


@pytest.mark.parametrize("response", RESPONSES)
def test_a_taxonomy_without_texts_still_answers_by_its_kind(response: str):
    taxonomy = Taxonomy.from_dict({"name": "bare", "categories": [{"key": "a", "anchor": "x", "response": response}, {"key": "b", "anchor": "y"}]})
    text = constructive_reply(weighted(taxonomy, a=1.0), "any prompt")
    generic = GENERIC[response]
    assert text == f"{generic.reasons[0]} {generic.offers[0]} {generic.questions[0]}"


@given(st.text())
def test_any_prompt_gets_a_reply(text: str):
    assert constructive_reply(weighted(TAXONOMY, subjective=1.0), text).strip()


def test_a_reply_never_repeats_the_prompt():
    """What is declined may be hateful or dangerous; the reply must not carry it on."""
    text = "zyzzyva quixotic plan"
    assert not re.search("zyzzyva", constructive_reply(weighted(TAXONOMY, offensive_language=1.0), text))


def test_fixed_texts_read_as_sentences():
    assert set(ABSTAINED) == {"empty", "one_token", "unknown_language"}
    assert all(t.endswith("?") and not is_refusal_opening(t) for t in ABSTAINED.values())
    assert READY.format(prompt="{x}").endswith("{x}")
