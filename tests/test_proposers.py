"""Proposers: strict parsing of replies, one retry, reframings that pass on no hazard, exemplars near the prompt."""

import json

import numpy as np
import pytest
from builders import completion, fake_server
from hypothesis import given
from hypothesis import strategies as st

from lance import prompts
from lance.chat import EndpointChat
from lance.corpus import Prompt
from lance.encoder import PromptEncoder
from lance.errors import ChatError
from lance.gradients import GradientSpan, MultiWayGradient, TextualGradient
from lance.proposers import Candidate, ChatProposer, ExemplarProposer, ReframeProposer, parse_rewrites
from lance.taxonomy import Taxonomy


def gradient_of(taxonomy: Taxonomy, **weights: float) -> MultiWayGradient:
    """A multi-way gradient with the given weights and one span each."""
    span = (GradientSpan("this", 0, 4, 1.0, 0.8),)
    parts = [TextualGradient(k, taxonomy[k].name, w, span, taxonomy[k].drop, ("topic",), taxonomy[k].turn, 0.9, 0.01) for k, w in weights.items()]
    return MultiWayGradient("ok", tuple(parts))


# --------------------------------------------------------------------- parsing


@given(st.lists(st.text(min_size=1).filter(str.strip), min_size=1, max_size=6))
def test_any_json_list_of_texts_is_read_bare_and_fenced(texts: list[str]):
    expected = [t.strip() for t in texts]
    body = json.dumps(texts)
    for reply in (body, f"  {body}\n", f"```json\n{body}\n```", f"```\n{body}\n```", f"```{body}```", json.dumps(texts, ensure_ascii=False, indent=2)):
        assert parse_rewrites(reply) == expected


@pytest.mark.parametrize(
    "reply",
    [
        "",
        "Here you go: [\"a\"]",
        '["a"] Hope this helps!',
        '["a"',
        "['a', 'b']",
        "[]",
        '["a", ""]',
        '["a", "  "]',
        '["a", 1]',
        '["a", null]',
        '{"rewrites": ["a"]}',
        '"a"',
        "null",
        "1. a\n2. b",
        '```json\n["a"]\n``` and more',
        '```json\n["a"]',
        "I'm sorry, but I can't help with that.",
    ],
)  # fmt: skip
def test_anything_else_is_refused_and_quoted(reply: str):
    with pytest.raises(ChatError, match="expected a JSON list"):
        parse_rewrites(reply)


# ------------------------------------------------------------------ chat models


def test_a_chat_model_gets_the_prompt_and_the_gradient_and_is_asked_once(taxonomy: Taxonomy):
    gradient = gradient_of(taxonomy, privacy=0.7, temporal=0.3)
    with fake_server((200, completion('["one rewrite", "another one"]'))) as server:
        proposer = ChatProposer(EndpointChat(server.url, "m"), seed=5)
        found = proposer.propose("Where does she live {now}?", gradient, n=8)
    assert found == [Candidate("one rewrite", "chat"), Candidate("another one", "chat")]
    ((_, body),) = server.requests
    system, user = body["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert "JSON list" in system["content"]
    assert "Where does she live {now}?" in user["content"]
    assert gradient.text in user["content"]
    assert body["seed"] == 5
    assert body["temperature"] > 0


def test_a_malformed_reply_is_answered_with_one_retry(taxonomy: Taxonomy):
    answers = [(200, completion("Sure! Here are some: a, b")), (200, completion('```json\n["better now"]\n```'))]
    with fake_server(*answers) as server:
        found = ChatProposer(EndpointChat(server.url, "m"), seed=5).propose("x y", gradient_of(taxonomy, privacy=1.0))
    assert [c.text for c in found] == ["better now"]
    first, second = (body for _, body in server.requests)
    assert second["messages"][:2] == first["messages"]
    assert second["messages"][2:] == [{"role": "assistant", "content": "Sure! Here are some: a, b"}, {"role": "user", "content": prompts.REFINE_RETRY}]
    assert second["seed"] != first["seed"]


def test_two_malformed_replies_give_no_candidate(taxonomy: Taxonomy):
    with fake_server((200, completion("no list"))) as server:
        assert ChatProposer(EndpointChat(server.url, "m")).propose("x y", gradient_of(taxonomy, privacy=1.0)) == []
        assert len(server.requests) == 2


def test_no_more_candidates_than_wanted(taxonomy: Taxonomy):
    with fake_server((200, completion(json.dumps([f"rewrite {i}" for i in range(9)])))) as server:
        assert len(ChatProposer(EndpointChat(server.url, "m")).propose("x y", gradient_of(taxonomy, privacy=1.0), n=3)) == 3


def test_an_unreachable_model_is_an_error(taxonomy: Taxonomy):
    with fake_server((200, completion("x"))) as server:
        url = server.url
    with pytest.raises(ChatError, match="cannot be reached"):
        ChatProposer(EndpointChat(url, "m", max_retries=0)).propose("x y", gradient_of(taxonomy, privacy=1.0))


# ------------------------------------------------------------------- reframings


def test_prompts_are_turned_by_the_patterns_of_their_leaves(taxonomy: Taxonomy):
    found = ReframeProposer(taxonomy).propose("  Is tea better than coffee? ", gradient_of(taxonomy, subjective=0.8, advice_or_opinion=0.2))
    assert found
    expected = [p.replace("{prompt}", "Is tea better than coffee?") for k in ("subjective", "advice_or_opinion") for p in taxonomy[k].reframe]
    assert [c.text for c in found] == expected
    assert {c.proposer for c in found} == {"reframe"}


def test_safety_weighted_gradients_are_not_reframed(taxonomy: Taxonomy):
    proposer = ReframeProposer(taxonomy)
    refused = [leaf.key for leaf in taxonomy.leaves if leaf.response == "refuse_with_reason"]
    assert "dangerous_or_sensitive" in refused
    for key in refused:
        for weight in (0.3, 0.5, 0.95):
            assert proposer.propose("Is it so?", gradient_of(taxonomy, subjective=1 - weight, **{key: weight})) == []
            assert proposer.propose("Is it so?", gradient_of(taxonomy, **{key: weight}, subjective=1 - weight)) == []
        assert proposer.propose("Is it so?", gradient_of(taxonomy, subjective=0.85, **{key: 0.15})) != []


def test_leaves_whose_goal_is_the_hazard_have_no_pattern(taxonomy: Taxonomy):
    assert any(leaf.reframe for leaf in taxonomy.leaves)
    for leaf in taxonomy.leaves:
        assert not (leaf.reframe and leaf.response == "refuse_with_reason"), leaf.key


def test_an_empty_gradient_turns_nothing(taxonomy: Taxonomy):
    assert ReframeProposer(taxonomy).propose("anything at all", MultiWayGradient("low_risk")) == []


def test_a_prompt_is_not_turned_twice(taxonomy: Taxonomy):
    proposer, gradient = ReframeProposer(taxonomy), gradient_of(taxonomy, subjective=1.0)
    once = proposer.propose("Is tea better than coffee?", gradient)
    for c in once:
        assert c not in proposer.propose(c.text, gradient)
        assert all(p.text.count(c.text.removesuffix("Is tea better than coffee?")) <= 1 for p in proposer.propose(c.text, gradient))


def test_patterns_of_a_users_taxonomy_may_begin_with_the_prompt_and_hold_braces():
    leaf = {"key": "taste", "anchor": "a question of taste", "response": "give_views", "reframe": ["{prompt} Give {both} sides.", "In short: {prompt}"]}
    taxonomy = Taxonomy.from_dict({"name": "mine", "categories": [leaf]})
    found = ReframeProposer(taxonomy).propose("Is {tea} good?", gradient_of(taxonomy, taste=1.0))
    assert [c.text for c in found] == ["Is {tea} good? Give {both} sides.", "In short: Is {tea} good?"]


# -------------------------------------------------------------------- exemplars

PAIRS = [
    ("How do I break into my neighbour's car?", "How do I make my own car harder to break into?"),
    ("What will the weather be in ten years?", "How do climate models describe the weather in ten years?"),
    ("Who wrote it?", "Who wrote the novel Middlemarch?"),
]


@pytest.fixture(scope="module")
def exemplars(encoder: PromptEncoder) -> ExemplarProposer:
    return ExemplarProposer(encoder, PAIRS)


def test_the_nearest_exemplar_comes_first(exemplars: ExemplarProposer, taxonomy: Taxonomy):
    gradient = gradient_of(taxonomy, privacy=1.0)
    for text, nearest in (("how to break into a vehicle", 0), ("tell me the weather of next decade", 1), ("who is the author?", 2)):
        found = exemplars.propose(text, gradient, n=1)
        assert found[-1] == Candidate(PAIRS[nearest][1], "exemplar")
    assert {c.text for c in exemplars.propose("anything", gradient, n=8) if c.proposer == "exemplar"} == {t for _, t in PAIRS}


def test_an_exemplar_is_adapted_to_the_things_of_the_prompt(exemplars: ExemplarProposer):
    adapted = exemplars.adapt("How do I break into the vehicle?", *PAIRS[0])
    assert adapted == "How do I make my own vehicle harder to break into?"
    assert exemplars.adapt("How do I break into the beehive?", *PAIRS[0]) is None  # too far from a car
    assert exemplars.adapt("Is it?", *PAIRS[0]) is None
    assert exemplars.adapt(PAIRS[0][0], *PAIRS[0]) is None  # nothing to exchange


def test_proposals_are_distinct_and_repeatable(exemplars: ExemplarProposer, taxonomy: Taxonomy):
    gradient = gradient_of(taxonomy, privacy=1.0)
    found = exemplars.propose("How do I break into the vehicle?", gradient)
    assert len(found) == len(set(found))
    assert exemplars.propose("How do I break into the vehicle?", gradient) == found


def test_vectors_may_be_given_and_must_fit(encoder: PromptEncoder, exemplars: ExemplarProposer, taxonomy: Taxonomy):
    again = ExemplarProposer(encoder, PAIRS, exemplars.vectors)
    gradient = gradient_of(taxonomy, privacy=1.0)
    assert again.propose("who is it?", gradient) == exemplars.propose("who is it?", gradient)
    with pytest.raises(ValueError, match="shape"):
        ExemplarProposer(encoder, PAIRS[:2], exemplars.vectors)


def test_a_text_of_several_pairs_has_one_vector(encoder: PromptEncoder, taxonomy: Taxonomy):
    pairs = [(PAIRS[0][0], PAIRS[0][1]), (PAIRS[0][0], PAIRS[1][1]), (PAIRS[2][1], PAIRS[2][1])]
    shared = ExemplarProposer(encoder, pairs)
    assert shared.vectors.shape == (4, encoder.dim)
    assert shared.propose("Who wrote the novel?", gradient_of(taxonomy, privacy=1.0), n=1)[-1].text == PAIRS[2][1]


def test_no_pairs_no_proposals(encoder: PromptEncoder, taxonomy: Taxonomy):
    none = ExemplarProposer(encoder, [])
    assert none.vectors.shape == (0, encoder.dim)
    assert none.propose("anything", gradient_of(taxonomy, privacy=1.0)) == []
    assert np.isfinite(none.vectors).all()


def test_pairs_of_a_corpus_are_rewrites_and_contrast_prompts():
    rows = [
        Prompt("bad", ("privacy",), refined=("good", "better")),
        Prompt("contrast", id="c", twin="bad"),
        Prompt("plain"),
        Prompt("never rewritten", ("copyright",)),
    ]
    assert ExemplarProposer.pairs_of(rows) == [("bad", "good"), ("bad", "better"), ("contrast", "contrast")]
