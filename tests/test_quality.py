"""The measures of a corpus against small cases with known answers, and the embedded corpus against its limits."""

import re
from typing import Any

import numpy as np
import pytest

from lance import public
from lance.companions import corpus_file, load_answers
from lance.corpus import Prompt, read_rows, refined_prompts
from lance.encoder import PromptEncoder
from lance.quality import NEAR, broken_rows, copied_rows, corpus_schema, divided_groups, near_pairs, variety
from lance.taxonomy import BENIGN, Taxonomy

needs_evaluation = pytest.mark.skipif(public.data_folder(required=False) is None, reason="LANCE_DATA is not set: no evaluation files to compare with")


def on_circle(*degrees: float) -> np.ndarray:
    """Vectors of length 1; the cosine of two is that of the angle between them."""
    return np.array([[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees])


# ------------------------------------------------------------------- the measures


def test_variety_of_texts_with_known_bigrams() -> None:
    found = variety(["what is a b", "What is a, c!", "who knows"])
    assert found["distinct_2"] == pytest.approx(5 / 7)  # what-is and is-a twice
    assert (found["top_opening"], found["top_opening_share"]) == ("what is a", pytest.approx(2 / 3))


def test_near_pairs_leave_out_declared_twins_and_come_nearest_first() -> None:
    prompts = [Prompt("a", id="a", twin="b"), Prompt("b", id="b", twin="a"), Prompt("c", id="c"), Prompt("d", id="d")]
    found = near_pairs(prompts, on_circle(0, 5, 15, 90), cosine=float(np.cos(np.radians(20))))
    assert [(a, b) for a, b, _ in found] == [("b", "c"), ("a", "c")]
    assert found[0][2] == pytest.approx(np.cos(np.radians(10)))
    assert near_pairs(prompts, on_circle(0, 5, 15, 90), cosine=0.999) == []


def test_groups_divided_between_splits_are_named() -> None:
    prompts = [Prompt("a", id="a", split="train", twin="b"), Prompt("b", id="b", split="test", twin="a"), Prompt("c", id="c", split="train")]
    assert divided_groups(prompts, on_circle(0, 90, 180)) == [["a", "b"]]
    near = [Prompt(t, id=t, split=s) for t, s in (("a", "train"), ("b", "validation"), ("c", "test"))]
    assert divided_groups(near, on_circle(0, 10, 90)) == [["a", "b"]]
    assert divided_groups(near, on_circle(0, 90, 180)) == []


def test_rows_too_near_to_an_evaluation_prompt_are_named() -> None:
    found = copied_rows(["far", "near", "nearer"], on_circle(90, 20, 5), on_circle(0, -100))
    assert [i for i, _ in found] == ["nearer", "near"]
    assert found[0][1] == pytest.approx(np.cos(np.radians(5)))


GOOD: dict[str, Any] = {
    "text": "Where does she live?",
    "labels": ["privacy"],
    "id": "row-1",
    "split": "train",
    "spans": [{"start": 0, "end": 5, "leaf": "privacy"}],
}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text": " "}, "text"),
        ({"labels": ["rude"]}, "labels"),
        ({"labels": ["privacy", "privacy"]}, "labels"),
        ({"split": "dev"}, "split"),
        ({"colour": "red"}, "colour"),
        ({"spans": []}, "spans"),
        ({"spans": [{"start": 3, "end": 99, "leaf": "privacy"}]}, r"\[3, 99\) outside 20"),
        ({"spans": [{"start": 3, "end": 3, "leaf": "privacy"}]}, r"\[3, 3\)"),
        ({"distribution": {"privacy": 0.7, "benign": 0.7}}, "sums to 1.4"),
        ({"distribution": {"privacy": 1.5, "benign": -0.5}}, "distribution"),
        ({"wrapper": "magic"}, "wrapper"),
        ({"labels": [], "refined": ["x"]}, r"does not allow \['x'\]"),
        ({"refined": ["x", "x"]}, "refined"),
    ],
)
def test_a_broken_row_is_found(change: dict[str, Any], words: str) -> None:
    assert broken_rows([GOOD]) == []
    found = broken_rows([GOOD, GOOD | change])
    assert found
    assert {i for i, _ in found} == {"row-1"}
    assert any(re.search(words, fault) for _, fault in found), found


def test_a_noncompliant_row_without_spans_is_broken() -> None:
    assert broken_rows([{k: v for k, v in GOOD.items() if k != "spans"}])


def test_the_schema_knows_the_leaves_of_the_taxonomy(taxonomy: Taxonomy) -> None:
    assert tuple(corpus_schema()["$defs"]["leaf"]["enum"]) == tuple(k for k in taxonomy.keys if k != BENIGN)


# ------------------------------------------------------------------- the embedded corpus


def test_the_corpus_is_varied(corpus: list[Prompt]) -> None:
    found = variety([p.text for p in corpus])
    assert found["top_opening_share"] <= 0.03
    assert found["distinct_2"] >= 0.4


def test_no_two_prompts_but_twins_are_nearly_the_same(corpus: list[Prompt], corpus_vectors: np.ndarray) -> None:
    assert near_pairs(corpus, corpus_vectors) == []
    assert (corpus_vectors @ corpus_vectors.T > NEAR).sum() > len(corpus), "some twins are as near as that: the limit is not out of reach"


def test_twins_and_near_duplicates_share_a_split(corpus: list[Prompt], corpus_vectors: np.ndarray) -> None:
    assert divided_groups(corpus, corpus_vectors) == []


def test_every_row_fits_the_schema() -> None:
    assert broken_rows(row for _, row in read_rows(corpus_file("prompts.jsonl"))) == []


@needs_evaluation
@pytest.mark.parametrize("kind", ["prompts", "refined", "answers"])
def test_nothing_is_near_an_evaluation_prompt(corpus: list[Prompt], corpus_vectors: np.ndarray, encoder: PromptEncoder, kind: str) -> None:
    held = public.load_coconot("eval") + public.load_coconot("contrast") + public.load_xstest() + public.load_harmful(("jailbreakbench", "strongreject"))
    texts = {"prompts": {p.id: p.text for p in corpus}, "refined": {p.id: p.text for p in refined_prompts(corpus)}, "answers": load_answers()}[kind]
    x = corpus_vectors if kind == "prompts" else encoder.encode(list(texts.values())).numpy()
    assert copied_rows(list(texts), x, encoder.encode([p.text for p in held]).numpy()) == []
