"""The embedded corpus, reading and writing labelled prompts, and labels as candidate sets."""

import importlib.resources
import json
import re
import string
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lance import public
from lance.corpus import (
    SPLITS,
    WRAPPERS,
    DataWarning,
    Prompt,
    Span,
    encode_labels,
    load_corpus,
    read_prompts,
    read_rows,
    refined_prompts,
    reframed_prompts,
    select,
    to_dataset,
    to_frame,
    write_prompts,
)
from lance.errors import DataError, TaxonomyError
from lance.taxonomy import BENIGN, Taxonomy

CORPUS_FOLDER = Path(str(importlib.resources.files("lance"))) / "data" / "corpus"
NONCOMPLIANCE = Taxonomy.builtin()


# ------------------------------------------------------------------- the embedded corpus


def test_every_line_of_the_file_is_a_valid_row(taxonomy: Taxonomy, corpus: list[Prompt]) -> None:
    """`load_corpus` leaves nothing out: the same file read with validation gives the same rows without a warning."""
    path = CORPUS_FOLDER / "prompts.jsonl"
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        rows = read_prompts(path, taxonomy)
    assert len(rows) == len(path.read_bytes().strip().split(b"\n")) == len(corpus)
    assert [p.text for p in rows] == [p.text for p in corpus]


WORD = re.compile(r"\w+|(?<!\S)[.-]+(?!\S)")  # words, and the letters of Morse code


def test_ids_and_texts_are_unique(corpus: list[Prompt]) -> None:
    assert all(p.id for p in corpus)
    for kind, values in (("id", [p.id for p in corpus]), ("text", [" ".join(WORD.findall(p.text.lower())) or p.text for p in corpus])):
        assert [v for v, n in Counter(values).items() if n > 1] == [], f"an {kind} is used twice"


def test_splits_are_given_and_disjoint(corpus: list[Prompt]) -> None:
    parts = {split: load_corpus(split) for split in SPLITS}
    assert sorted(p.id for part in parts.values() for p in part) == sorted(p.id for p in corpus)
    assert len(parts["train"]) > len(parts["validation"]) > 0.05 * len(corpus)
    assert len(parts["test"]) > 0.05 * len(corpus)
    with pytest.raises(DataError, match="'dev'.*train, validation, test"):
        load_corpus("dev")


def test_there_are_enough_rows_of_every_kind(corpus: list[Prompt], taxonomy: Taxonomy) -> None:
    per_leaf = Counter(label for p in corpus for label in p.labels)
    asked = {leaf: 150 if taxonomy[leaf].parent == "safety" else 90 for leaf in taxonomy.keys[1:]}
    assert {leaf: per_leaf[leaf] for leaf, n in asked.items() if per_leaf[leaf] < n} == {}
    assert len(corpus) >= 3000
    assert len(select(corpus, benign=True)) >= 1000
    assert len(select(corpus, contrast=True)) >= 700
    assert len(select(corpus, wrapped=True)) >= 150
    assert sum(p.distribution is not None for p in corpus) >= 400
    assert sum(len(p.refined) for p in corpus) >= 1500
    assert sum(len(p.text.split()) > 60 for p in corpus) >= 0.1 * len(corpus)
    for split in SPLITS:
        here = {label for p in corpus if p.split == split for label in p.labels}
        assert set(taxonomy.keys[1:]) <= here, f"the split {split} lacks a leaf"


def test_labels_are_leaves(corpus: list[Prompt], taxonomy: Taxonomy) -> None:
    """The corpus is labelled as finely as the taxonomy goes."""
    assert [p.id for p in corpus if not set(p.labels) <= set(taxonomy.keys[1:]) or len(set(p.labels)) < len(p.labels)] == []


def test_twins_are_mutual_contrasting_and_in_one_split(corpus: list[Prompt]) -> None:
    by_id = {p.id: p for p in corpus}
    for p in corpus:
        if p.twin is None:
            continue
        assert p.twin in by_id, f"{p.id} names the twin {p.twin}, which does not exist"
        twin = by_id[p.twin]
        assert twin.twin == p.id, f"{p.id} and {twin.id} do not name each other"
        assert twin.split == p.split, f"{p.id} and {twin.id} are in different splits"
        assert twin.benign != p.benign, f"of {p.id} and {twin.id} exactly one should be benign"


def test_spans_lie_on_whole_words_and_carry_a_leaf_of_the_row(corpus: list[Prompt]) -> None:
    assert sum(len(p.spans) for p in corpus) >= 200
    for p in corpus:
        assert len(p.spans) <= 3, f"{p.id} has {len(p.spans)} spans"
        for s in p.spans:
            piece = p.text[s.start : s.end]
            assert piece == piece.strip() != "", f"{p.id}: {piece!r}"
            assert s.leaf in p.labels, f"{p.id}: a span of {s.leaf}, the labels are {p.labels}"
            cut = any(p.text[max(0, i - 1) : i].isalnum() and p.text[i : i + 1].isalnum() for i in (s.start, s.end))
            assert not cut, f"{p.id}: {piece!r} cuts a word"
        for leaf in p.labels:
            taken = sorted((s.start, s.end) for s in p.spans if s.leaf == leaf)
            assert all(one[1] <= next_[0] for one, next_ in zip(taken, taken[1:], strict=False)), f"spans of {leaf} in {p.id} overlap"


def test_refined_prompts_are_other_texts_and_belong_to_noncompliant_rows(corpus: list[Prompt]) -> None:
    taken = {p.text for p in corpus if not p.benign}
    for p in corpus:
        assert not (p.benign and p.refined), f"{p.id} is benign and has a refined prompt"
        for text in p.refined:
            assert text.strip() == text != "", p.id
            assert text not in taken, f"the refined prompt of {p.id} is itself a noncompliant prompt"


def test_annotated_distributions_and_wrappers_are_of_the_taxonomy(corpus: list[Prompt], taxonomy: Taxonomy) -> None:
    for p in corpus:
        assert set(p.distribution or ()) <= set(taxonomy.keys), p.id
    assert set(WRAPPERS) <= {p.wrapper for p in corpus}, "every wrapper is shown at least once"


def test_the_corpus_comes_with_datasheet_and_guidelines(taxonomy: Taxonomy) -> None:
    for name in ("DATASHEET.md", "GUIDELINES.md"):
        path = CORPUS_FOLDER / name
        assert path.is_file(), f"{name} is missing beside the corpus"
        assert len(path.read_text(encoding="utf-8")) > 1500
    sheet = (CORPUS_FOLDER / "DATASHEET.md").read_text(encoding="utf-8").lower()
    for topic in ("licen", "split", "label", "train", "validation", "test", "contrast"):
        assert topic in sheet, f"the datasheet says nothing of {topic!r}"
    guidelines = (CORPUS_FOLDER / "GUIDELINES.md").read_text(encoding="utf-8")
    assert [leaf for leaf in taxonomy.keys[1:] if f"| {leaf} |" not in guidelines] == []


def test_the_datasheet_counts_the_rows_that_there_are(corpus: list[Prompt]) -> None:
    sheet = (CORPUS_FOLDER / "DATASHEET.md").read_text(encoding="utf-8").replace(",", "").replace("\u202f", "")
    assert re.search(rf"\b{len(corpus)}\b", sheet), f"the datasheet does not name the {len(corpus)} rows"


def _evaluation_texts() -> list[str]:
    prompts = public.load_coconot("eval") + public.load_coconot("contrast") + public.load_xstest()
    return [p.text for p in prompts + public.load_harmful(("jailbreakbench", "strongreject"))]


@pytest.mark.skipif(public.data_folder(required=False) is None, reason="LANCE_DATA is not set: no evaluation files to compare with")
def test_no_text_is_copied_from_public_data(corpus: list[Prompt]) -> None:
    """Folded for case and punctuation, no prompt and no refined prompt equals a public one (short phrases apart)."""

    def fold(text: str) -> str:
        return " ".join(re.findall(r"\w+", text.lower()))

    theirs = [*_evaluation_texts(), *(p.text for p in public.load_coconot("train") + public.load_coconot("pref") + public.load_instructions())]
    theirs += [p.text for p in public.load_harmful() + public.load_robot("pos") + public.load_robot("neg")]
    taken = {fold(t) for t in theirs if len(t.split()) >= 5}
    ours = [(p.id, t) for p in corpus for t in (p.text, *p.refined)]
    assert [i for i, t in ours if fold(t) in taken] == []


# ------------------------------------------------------------------- the record


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"text": ""}, ["no text"]),
        ({"text": " \n\t"}, ["no text"]),
        ({"text": 7}, ["7"]),
        ({"split": "dev"}, ["'dev'", "validation"]),
        ({"wrapper": "magic"}, ["'magic'", "role_play"]),
        ({"spans": [[0, 99, "privacy"]]}, ["[0, 99)", "outside", "21 characters"]),
        ({"spans": [[5, 5, "privacy"]]}, ["[5, 5)"]),
        ({"spans": [[-1, 2, "privacy"]]}, ["[-1, 2)"]),
        ({"spans": [[1, 2]]}, ["`spans`", "[[1, 2]]"]),
        ({"distribution": {"privacy": 0.4, "benign": 0.4}}, ["sum to 1", "0.8"]),
        ({"distribution": {"privacy": 1.5, "benign": -0.5}}, [">= 0"]),
        ({"colour": "red"}, ["unknown field 'colour'", "labels"]),
    ],
)
def test_a_row_that_does_not_fit_is_refused_with_its_value(fields: dict[str, Any], words: list[str]) -> None:
    row = {"text": "Where does she live? ", "labels": ["privacy"], "id": "row-1"} | fields
    with pytest.raises(DataError) as caught:
        Prompt.from_dict(row)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "word"),
    [
        pytest.param({"labels": 3}, "labels", id="labels that are a number"),
        pytest.param({"labels": [["privacy"]]}, "labels", id="nested labels"),
        pytest.param({"refined": "Who is she?"}, "refined", id="refined that is a text"),
        pytest.param({"spans": [["a", "b", "privacy"]]}, "spans", id="offsets that are words"),
        pytest.param({"distribution": {}}, "distribution", id="an empty distribution"),
        pytest.param({"distribution": {"privacy": "much"}}, "distribution", id="weights that are words"),
        pytest.param({"id": 17}, "id", id="an id that is a number"),
    ],
)
def test_a_field_of_another_type_is_a_data_error_or_is_understood(fields: dict[str, Any], word: str) -> None:
    """A value of another type is either refused by the name of its field, or read as the type that the record declares."""
    try:
        prompt = Prompt.from_dict({"text": "Where does she live?", "labels": ["privacy"]} | fields)
    except DataError as error:
        assert word in str(error)
    else:
        assert isinstance(prompt.id, str)
        assert all(isinstance(label, str) for label in prompt.labels)
        assert prompt.refined in ((), ("Who is she?",)), "a text is no list of letters"


def test_missing_fields_are_named() -> None:
    with pytest.raises(DataError, match=r"no `text`.*labels, id"):
        Prompt.from_dict({"labels": [], "id": "x"})
    with pytest.raises(DataError, match=r"no `labels`.*\[\] for benign"):
        Prompt.from_dict({"text": "How tall is it?"})


@pytest.mark.parametrize(
    "row", [{"prompt": "Hi there", "label": "privacy"}, {"text": "Hi there", "labels": ["privacy"]}, {"text": "Hi there", "label": "privacy"}]
)
def test_other_names_for_text_and_labels(row: dict[str, Any]) -> None:
    prompt = Prompt.from_dict(row)
    assert (prompt.text, prompt.labels, prompt.benign) == ("Hi there", ("privacy",), False)


@pytest.mark.parametrize("labels", [[], None, "benign", ["benign"], "safe", ["safe"]])
def test_ways_to_say_benign(labels: Any) -> None:
    assert Prompt.from_dict({"text": "How tall is it?", "labels": labels}).labels == ()


TEXTS = st.text(st.characters(codec="utf-8"), min_size=1, max_size=60).filter(lambda t: bool(t.strip()))
WORDS = st.text(string.ascii_lowercase + "-", min_size=1, max_size=10)


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    """Any valid record with labels of the built-in taxonomy."""
    text = draw(TEXTS)
    leaves = NONCOMPLIANCE.keys[1:]
    labels = draw(
        st.one_of(st.just(()), st.lists(st.sampled_from(leaves), unique=True, max_size=3).map(tuple), st.sampled_from(["safety", "unsafe"]).map(lambda k: (k,)))
    )
    spans = []
    for start in draw(st.lists(st.integers(0, len(text) - 1), max_size=3)):
        spans.append(Span(start, draw(st.integers(start + 1, len(text))), draw(st.sampled_from(leaves))))
    weights = draw(st.none() | st.dictionaries(st.sampled_from(NONCOMPLIANCE.keys), st.integers(1, 9), min_size=1, max_size=4))
    return Prompt(
        text=text,
        labels=labels,
        id=draw(WORDS | st.just("")),
        split=draw(st.sampled_from([None, *SPLITS])),
        distribution=None if weights is None else {k: v / sum(weights.values()) for k, v in weights.items()},
        twin=draw(st.none() | WORDS),
        refined=tuple(draw(st.lists(TEXTS, max_size=2))),
        spans=tuple(spans),
        wrapper=draw(st.sampled_from([None, *WRAPPERS])),
        source=draw(WORDS | st.just("")),
        note=draw(WORDS | st.just("")),
    )


@given(prompts())
def test_a_prompt_survives_json(prompt: Prompt) -> None:
    assert Prompt.from_dict(json.loads(json.dumps(prompt.to_dict()))) == prompt


@given(st.lists(prompts(), min_size=1, max_size=4))
def test_prompts_survive_a_file(tmp_path_factory: pytest.TempPathFactory, rows: list[Prompt]) -> None:
    """Line separators inside a text (U+2028, NEL, carriage return) do not break lines of the file."""
    path = tmp_path_factory.mktemp("prompts") / "rows.jsonl"
    write_prompts(rows, path)
    assert read_prompts(path) == rows
    assert path.read_bytes().count(b"\n") == len(rows)


# ------------------------------------------------------------------- files with bad rows

GOOD = '{"text": "Where is my key?", "labels": ["model_unknown"]}'


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        pytest.param(b'{"text": "caf\xe9", "labels": []}', ["utf-8"], id="not UTF-8"),
        pytest.param(b"Where is my key?", ["Expecting value"], id="not JSON"),
        pytest.param(b'{"text": "cut off', ["column"], id="cut off"),
        pytest.param(b"[" * 100_000, ["left out"], id="nested without end"),
        pytest.param(b'["Where is my key?"]', ["expected an object", "list"], id="not an object"),
        pytest.param(b'{"text": "Where is my key?"}', ["no `labels`"], id="no labels"),
        pytest.param(b'{"labels": []}', ["no `text`"], id="no text"),
        pytest.param(b'{"text": "", "labels": []}', ["no text"], id="empty text"),
        pytest.param(b'{"text": "Where is my key?", "labels": ["lost_things"]}', ["unknown label 'lost_things'", "model_unknown"], id="unknown leaf"),
        pytest.param(b'{"text": "Hi", "labels": [], "spans": [[0, 9, "privacy"]]}', ["[0, 9)"], id="a span outside"),
    ],
)
def test_a_bad_line_is_reported_by_file_and_line_and_the_rest_is_kept(tmp_path, taxonomy: Taxonomy, bad: bytes, words: list[str]) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\n" + bad + b"\r\n" + GOOD.encode())
    with pytest.warns(DataWarning) as caught:
        rows = read_prompts(path, taxonomy)
    assert [p.text for p in rows] == ["Where is my key?"] * 2
    assert len(caught) == 1
    message = str(caught[0].message)
    assert message.startswith(f"{path}, line 3: left out (")
    for word in words:
        assert word in message


def test_a_file_without_one_good_row_is_an_error(tmp_path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("one\ntwo\n", encoding="utf-8")
    with pytest.warns(DataWarning) as caught, pytest.raises(DataError, match=r"mine\.jsonl.*no valid row.*`text` and `labels`"):
        read_prompts(path)
    assert [re.search(r"line (\d+)", str(w.message)).group(1) for w in caught] == ["1", "2"]
    path.write_text("", encoding="utf-8")
    with pytest.raises(DataError, match="no valid row"):
        read_prompts(path)


def test_files_that_cannot_be_read_say_what_to_give(tmp_path) -> None:
    for path in (tmp_path / "nowhere.jsonl", tmp_path):
        with pytest.raises(DataError, match=re.escape(str(path)) + ".*give the path of a JSONL file"):
            read_prompts(path)


def test_numbers_of_lines_count_blank_ones(tmp_path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"a": 1}\n\n   \n{"a": 2}\n', encoding="utf-8")
    assert list(read_rows(path)) == [(1, {"a": 1}), (4, {"a": 2})]


def test_a_byte_order_mark_is_no_part_of_the_first_row(tmp_path) -> None:
    path = tmp_path / "windows.jsonl"
    path.write_text(GOOD + "\n" + GOOD, encoding="utf-8-sig")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        assert len(read_prompts(path)) == 2


# ------------------------------------------------------------------- labels as candidate sets


def test_encode_labels_by_kind(taxonomy: Taxonomy) -> None:
    rows = [(), ("privacy",), ("safety",), ("unsafe",), ("privacy", "copyright"), ("safety", "temporal")]
    candidates, eta, known = encode_labels([Prompt("x", labels) for labels in rows], taxonomy)
    sets = [{taxonomy.keys[j] for j in np.flatnonzero(row)} for row in candidates]
    safety = set(taxonomy.leaves_of("safety"))
    assert sets == [{BENIGN}, {"privacy"}, safety, set(taxonomy.keys[1:]), {"privacy", "copyright"}, safety | {"temporal"}]
    assert eta.tolist() == [0, 0, 0, 0, 1, 0], "only a set of leaves says that all of them apply"
    assert known.tolist() == [True, True, True, False, True, True], "`unsafe` says no more than the coarse label"
    assert candidates.dtype == known.dtype == np.dtype(bool)
    with pytest.raises(TaxonomyError, match="'lost_things'"):
        encode_labels([Prompt("x", ("lost_things",))], taxonomy)
    assert encode_labels([], taxonomy).candidates.shape == (0, len(taxonomy) + 1)


LABELS = st.sampled_from([*NONCOMPLIANCE.keys[1:], *NONCOMPLIANCE.category_keys[1:], "unsafe"])


@given(st.lists(st.lists(LABELS, unique=True, max_size=4).map(tuple), min_size=1, max_size=6), st.sampled_from([NONCOMPLIANCE]))
def test_laws_of_candidate_sets(labels: list[tuple[str, ...]], taxonomy: Taxonomy) -> None:
    candidates, eta, known = encode_labels([Prompt("x", row) for row in labels], taxonomy)
    assert candidates.shape == (len(labels), len(taxonomy) + 1)
    for row, chosen, weight, mask in zip(labels, candidates, eta, known, strict=True):
        assert chosen.any(), "no candidate set is empty"
        assert chosen[0] == (not row), "benign stands alone"
        assert {taxonomy.keys[j] for j in np.flatnonzero(chosen)} == {leaf for label in row for leaf in taxonomy.leaves_of(label)} | (
            {BENIGN} if not row else set()
        )
        assert weight in (0, 1)
        assert not weight or set(row) <= set(taxonomy.keys)
        assert mask == (not chosen[1:].all())
        assert encode_labels([Prompt("x", row[::-1])], taxonomy).candidates.tolist() == [chosen.tolist()], "the order of labels does not matter"


# ------------------------------------------------------------------- derived rows


def test_refined_texts_become_benign_rows_in_the_split_of_their_origin(corpus: list[Prompt]) -> None:
    derived = refined_prompts(corpus)
    assert len(derived) == sum(len(p.refined) for p in corpus)
    assert len({p.id for p in derived} | {p.id for p in corpus}) == len(derived) + len(corpus)
    by_id = {p.id: p for p in corpus}
    for p in derived:
        origin = by_id[p.note.removeprefix("refined from ")]
        assert p.benign and p.text in origin.refined and p.split == origin.split


@pytest.mark.parametrize("seed", [0, 1])
def test_a_reframing_cures_its_own_leaf_and_no_other(corpus: list[Prompt], taxonomy: Taxonomy, seed: int) -> None:
    derived = reframed_prompts(corpus, taxonomy, seed=seed)
    by_id = {p.id: p for p in corpus}
    assert 0.1 < len(derived) / sum(not p.benign for p in corpus) < 0.5
    cured = 0
    for p in derived:
        origin = by_id[p.id.removesuffix("-f")]
        leaf = p.note.removeprefix("reframed as ")
        assert origin.text in p.text and p.text != origin.text and p.split == origin.split
        if origin.labels == (leaf,):
            assert p.benign
            cured += 1
        else:
            assert p.labels == origin.labels, "a pattern of another leaf leaves the label"
        if set(origin.labels) & set(taxonomy.leaves_of("safety")):
            assert not p.benign, "no pattern makes a hazardous prompt benign"
    assert 0 < cured < len(derived)


def test_reframing_is_drawn_by_seed(corpus: list[Prompt], taxonomy: Taxonomy) -> None:
    drawn: Callable[[int], list[Prompt]] = lambda seed: reframed_prompts(corpus[:400], taxonomy, seed=seed)  # noqa: E731
    assert drawn(3) == drawn(3) != drawn(4)


def test_without_patterns_there_is_nothing_to_reframe(corpus: list[Prompt]) -> None:
    assert reframed_prompts(corpus[:50], Taxonomy.builtin("or_bench")) == []


def test_a_prompt_with_braces_is_reframed_as_it_is(taxonomy: Taxonomy) -> None:
    text = "Print {x} and {0} and {prompt} for me, will you"
    found = reframed_prompts([Prompt(text, ("temporal",), id="braces")], taxonomy, share=1.0)
    assert len(found) == 1 and text in found[0].text


# ------------------------------------------------------------------- filters and tables


def small() -> list[Prompt]:
    return [
        Prompt("fine", id="a-c", twin="a"),
        Prompt("not fine", labels=("privacy", "model_unknown"), id="a", twin="a-c", spans=(Span(0, 3, "privacy"),), refined=("better",)),
        Prompt("play the guard", labels=("copyright",), id="b", wrapper="role_play"),
        Prompt("plain", id="c"),
    ]


@pytest.mark.parametrize(
    ("conditions", "ids"),
    [
        ({}, ["a-c", "a", "b", "c"]),
        ({"leaf": "model_unknown"}, ["a"]),
        ({"benign": True}, ["a-c", "c"]),
        ({"benign": False}, ["a", "b"]),
        ({"contrast": True}, ["a-c"]),
        ({"contrast": False, "benign": True}, ["c"]),
        ({"wrapped": True}, ["b"]),
        ({"wrapped": False, "leaf": "copyright"}, []),
    ],
)
def test_filters_keep_what_meets_every_condition(conditions: dict[str, Any], ids: list[str]) -> None:
    assert [p.id for p in select(small(), **conditions)] == ids


def test_a_frame_and_a_dataset_hold_every_field() -> None:
    frame = to_frame(small())
    assert list(frame.columns) == list(Prompt.__dataclass_fields__)
    assert frame.loc[1, "labels"] == ["privacy", "model_unknown"]
    assert frame.loc[1, "spans"] == [{"start": 0, "end": 3, "leaf": "privacy"}]
    assert list(to_frame([]).columns) == list(frame.columns)
    pytest.importorskip("datasets", reason="the extra `data` is not installed")
    table = to_dataset(small())
    assert table["id"][:] == ["a-c", "a", "b", "c"]
    assert table[1]["refined"] == ["better"]
    assert table[1]["spans"][0]["leaf"] == "privacy"
