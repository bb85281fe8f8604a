"""Near-duplicate groups, splits that keep them whole, and training rows without evaluation prompts."""

import contextlib
import warnings
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance import splits
from lance.corpus import SPLITS, DataWarning, Prompt, read_prompts, write_prompts
from lance.errors import DataError
from lance.splits import assign_splits, near_duplicate_groups, without_evaluation_prompts


def unit(*rows: list[float]) -> np.ndarray:
    x = np.array(rows, dtype=np.float32)
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def on_circle(*degrees: float) -> np.ndarray:
    """Vectors at given angles: the cosine of two is that of the angle between them."""
    t = np.radians(np.array(degrees, dtype=np.float32))
    return np.stack([np.cos(t), np.sin(t)], axis=1)


def partition(groups: np.ndarray) -> set[frozenset[int]]:
    return {frozenset(np.flatnonzero(groups == g).tolist()) for g in set(groups.tolist())}


# ------------------------------------------------------------------- groups


def test_near_vectors_and_chains_of_them_share_a_group() -> None:
    prompts = [Prompt(f"prompt {i}") for i in range(5)]
    groups = near_duplicate_groups(prompts, on_circle(0, 20, 40, 90, 180), cosine=np.cos(np.radians(25)))
    assert partition(groups) == {frozenset({0, 1, 2}), frozenset({3}), frozenset({4})}, "0 and 2 are 40 degrees apart, and joined by 1"


def test_twins_share_a_group_however_far_apart_they_are() -> None:
    prompts = [Prompt("a", id="a", twin="c"), Prompt("b", id="b"), Prompt("c", id="c", twin="a"), Prompt("d", id="d", twin="not here")]
    assert partition(near_duplicate_groups(prompts, on_circle(0, 90, 180, 270))) == {frozenset({0, 2}), frozenset({1}), frozenset({3})}


def test_opposite_vectors_are_no_duplicates() -> None:
    assert len(partition(near_duplicate_groups([Prompt("a"), Prompt("b")], on_circle(0, 180), cosine=0.5))) == 2


def test_more_rows_than_one_block_holds() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1500, 64)).astype(np.float32)
    x[1400] = x[3]
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    groups = near_duplicate_groups([Prompt(f"p{i}") for i in range(1500)], x, cosine=0.95)
    assert groups[1400] == groups[3]
    assert len(set(groups.tolist())) == 1499


def test_no_prompts_have_no_groups() -> None:
    assert near_duplicate_groups([], np.zeros((0, 4), dtype=np.float32)).tolist() == []


@given(st.lists(st.integers(0, 359), min_size=1, max_size=12), st.floats(0.5, 0.99))
def test_a_group_is_a_connected_component(degrees: list[int], cosine: float) -> None:
    x = on_circle(*degrees)
    groups = near_duplicate_groups([Prompt(f"p{i}") for i in range(len(x))], x, cosine=cosine)
    near = x @ x.T > cosine
    for i, j in np.argwhere(near):
        assert groups[i] == groups[j]
    for members in partition(groups):
        reached, edge = {min(members)}, [min(members)]
        while edge:
            edge = [int(j) for i in edge for j in np.flatnonzero(near[i]) if j not in reached]
            reached |= set(edge)
        assert reached >= members


# ------------------------------------------------------------------- splits


def labelled(n: int) -> list[Prompt]:
    kinds = [("privacy",), ("temporal",), ()]
    return [Prompt(f"prompt {i}", kinds[i % 3], id=str(i)) for i in range(n)]


def test_groups_stay_whole_and_every_kind_is_spread() -> None:
    prompts = labelled(300)
    groups = np.arange(300) // 2
    found = assign_splits(prompts, groups)
    assert [(p.id, p.text, p.labels) for p in found] == [(p.id, p.text, p.labels) for p in prompts]
    for i in range(0, 300, 2):
        assert found[i].split == found[i + 1].split
    for labels in {p.labels for p in prompts}:
        share = Counter(p.split for p in found if p.labels == labels)
        assert set(share) == set(SPLITS)
        assert share["train"] == pytest.approx(70, abs=10)
        assert share["validation"] == pytest.approx(15, abs=8)
        assert share["test"] == pytest.approx(15, abs=8)


def test_shares_can_be_chosen() -> None:
    count = Counter(p.split for p in assign_splits(labelled(200), np.arange(200), shares=(0.5, 0.0, 0.5)))
    assert count["validation"] <= 10
    assert count["train"] == pytest.approx(100, abs=15)


def test_the_seed_decides() -> None:
    prompts, groups = labelled(120), np.arange(120)
    splits = [tuple(p.split for p in assign_splits(prompts, groups, seed=seed)) for seed in (0, 0, 1)]
    assert splits[0] == splits[1] != splits[2]


@given(st.lists(st.integers(0, 6), min_size=1, max_size=30))
def test_no_group_is_ever_torn(groups: list[int]) -> None:
    found = assign_splits(labelled(len(groups)), np.array(groups))
    assert all(p.split in SPLITS for p in found)
    for g in set(groups):
        assert len({p.split for p, h in zip(found, groups, strict=True) if h == g}) == 1


def test_groups_of_the_embedded_corpus_lie_in_one_split(corpus: list[Prompt], corpus_vectors: np.ndarray) -> None:
    """What the corpus promises of twins and near-duplicates, by the function that made the splits."""
    groups = near_duplicate_groups(corpus, corpus_vectors, cosine=0.92)
    assert 2 <= max(Counter(groups.tolist()).values()) < 20
    torn = [sorted(corpus[i].id for i in members) for members in partition(groups) if len({corpus[i].split for i in members}) > 1]
    assert torn == []


# ------------------------------------------------------------------- evaluation prompts


def test_copies_and_near_copies_of_evaluation_prompts_are_left_out() -> None:
    train = [Prompt("Where's my KEY?"), Prompt("Where is the key of mine?"), Prompt("How tall is it?"), Prompt("A song, please.")]
    evaluation = [Prompt("wheres my key"), Prompt("where s my key"), Prompt("Something else.")]
    x, y = on_circle(0, 100, 200, 290), on_circle(50, 102, 150)
    kept = without_evaluation_prompts(train, evaluation, x, y)
    assert [p.text for p in kept] == ["How tall is it?", "A song, please."], "the first is equal when folded, the second 2 degrees away"
    assert [p.text for p in without_evaluation_prompts(train, evaluation, x, y, cosine=0.99999)] == [p.text for p in train[1:]]


def test_without_evaluation_prompts_nothing_is_left_out() -> None:
    train = [Prompt("How tall is it?")]
    assert without_evaluation_prompts(train, [], on_circle(0), np.zeros((0, 2), dtype=np.float32)) == train


def test_without_training_rows_there_is_nothing_to_keep() -> None:
    assert without_evaluation_prompts([], [Prompt("x")], np.zeros((0, 2), dtype=np.float32), on_circle(0)) == []


def test_many_training_rows_are_compared_in_blocks() -> None:
    rng = np.random.default_rng(1)
    x = unit(*rng.normal(size=(2500, 16)).tolist())
    kept = without_evaluation_prompts([Prompt(f"p{i}", id=str(i)) for i in range(2500)], [Prompt("other")], x, x[2100:2101], cosine=0.999)
    assert {str(i) for i in range(2500)} - {p.id for p in kept} == {"2100"}


# ------------------------------------------------------------------- a growing corpus


def test_rows_that_have_a_split_keep_it_and_draw_their_group_there() -> None:
    prompts = labelled(90)
    first = assign_splits(prompts, np.arange(90))
    grown = [*first, *(Prompt(f"new {i}", ("copyright",), id=f"new-{i}") for i in range(30))]
    groups = np.array([*range(90), *range(20), *range(200, 210)])  # twenty of the new rows are near-duplicates of old ones
    found = assign_splits(grown, groups, seed=5)
    assert found[:90] == first
    assert [p.split for p in found[90:110]] == [p.split for p in first[:20]]
    assert all(p.split in SPLITS for p in found)


def test_the_command_fills_in_splits_and_changes_nothing_else(tmp_path) -> None:
    rows = [
        Prompt("What is in my fridge tonight?", ("model_unknown",), id="a", twin="a-c"),
        Prompt("What belongs in a fridge?", id="a-c", twin="a"),
        Prompt("Which teapot is the best one ever made?", ("subjective",), id="b", split="test"),
        Prompt("Which teapot is the best one ever made??", ("subjective",), id="c", note="a copy"),
    ]
    path = tmp_path / "corpus.jsonl"
    write_prompts(rows, path)
    splits.main(str(path))
    found = read_prompts(path)
    assert [replace(p, split=None) for p in found] == [replace(p, split=None) for p in rows]
    assert found[0].split == found[1].split in SPLITS
    assert found[2].split == found[3].split == "test"


def test_the_command_loses_no_row_that_it_cannot_read(tmp_path) -> None:
    """A corpus with an invalid line is left as it is, or written back with that line; it must not come back shorter."""
    path = tmp_path / "corpus.jsonl"
    write_prompts([Prompt("What is in my fridge tonight?", ("model_unknown",), id="a")], path)
    spoilt = '{"text": "Where is my other sock", "labels": ["model_unknown"], "id": "b"'
    with path.open("a", encoding="utf-8") as f:
        f.write(spoilt + "\n")
    with contextlib.suppress(DataError), warnings.catch_warnings():
        warnings.simplefilter("ignore", DataWarning)
        splits.main(str(path))
    assert spoilt in path.read_text(encoding="utf-8")
