"""The taxonomies that ship, reading one's own, and what is said when a file is wrong."""

import copy
import re
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lance.errors import LanceError, TaxonomyError
from lance.taxonomy import BENIGN, RESPONSES, Taxonomy

LEAVES = {
    "incomplete": ["underspecified", "false_presupposition", "incomprehensible"],
    "unsupported": ["input_modality", "output_modality", "length_or_style", "temporal"],
    "indeterminate": ["universal_unknown", "subjective", "model_unknown"],
    "humanizing": ["personal_inquiry", "advice_or_opinion"],
    "safety": ["offensive_language", "dangerous_or_sensitive", "misinformation", "privacy", "copyright"],
}
# The 14 category names of BeaverTails, which its loader turns into keys, and the 10 of OR-Bench.
BEAVERTAILS = (
    "animal_abuse",
    "child_abuse",
    "controversial_topics,politics",
    "discrimination,stereotype,injustice",
    "drug_abuse,weapons,banned_substance",
    "financial_crime,property_crime,theft",
    "hate_speech,offensive_language",
    "misinformation_regarding_ethics,laws_and_safety",
    "non_violent_unethical_behavior",
    "privacy_violation",
    "self_harm",
    "sexually_explicit,adult_content",
    "terrorism,organized_crime",
    "violence,aiding_and_abetting,incitement",
)
OR_BENCH = ("deception", "harassment", "harmful", "hate", "illegal", "privacy", "self_harm", "sexual", "unethical", "violence")
BUILTIN = ("noncompliance", "beavertails", "or_bench")

TWO_LEVELS = """\
name: kitchen
categories:
  - key: heat
    colour: "#AA0000"
    leaves:
      - key: too_hot
        anchor: A request to burn something.
        response: state_limit
      - key: too_cold
        anchor: A request to serve it frozen.
  - key: raw
    anchor: A request to eat it uncooked.
"""
FLAT = """\
name: colours
categories:
  - {key: red, anchor: A question about red.}
  - {key: blue, anchor: A question about blue.}
"""
BY_PARENT = """\
categories:
  - {key: raw, anchor: A request to eat it uncooked.}
  - {key: heat}
  - {key: too_hot, parent: heat, anchor: A request to burn something.}
"""


# ------------------------------------------------------------------- what ships


def test_noncompliance_has_the_categories_and_leaves_of_the_design(taxonomy: Taxonomy) -> None:
    found: dict[str, list[str]] = {}
    for leaf in taxonomy.leaves:
        found.setdefault(str(leaf.parent), []).append(leaf.key)
    assert found == LEAVES
    assert taxonomy.keys == (BENIGN, *(leaf for leaves in LEAVES.values() for leaf in leaves))
    assert taxonomy.category_keys == (BENIGN, *LEAVES)
    assert not taxonomy.is_flat


def test_altering_model_behaviour_is_described_and_is_no_coordinate(taxonomy: Taxonomy) -> None:
    assert [m.key for m in taxonomy.meta] == ["altering_model_behaviour"]
    assert len(taxonomy["altering_model_behaviour"].definition) > 60
    assert "altering_model_behaviour" not in taxonomy.keys
    with pytest.raises(TaxonomyError, match="altering_model_behaviour"):
        taxonomy.index("altering_model_behaviour")


@pytest.mark.parametrize(
    ("leaf", "response"),
    [
        ("underspecified", "ask"),
        ("false_presupposition", "correct_premise"),
        ("incomprehensible", "say_again"),
        ("input_modality", "state_limit"),
        ("universal_unknown", "state_limit"),
        ("subjective", "give_views"),
        *((leaf, "refuse_with_reason") for leaf in LEAVES["safety"]),
    ],
)
def test_kind_of_answer(taxonomy: Taxonomy, leaf: str, response: str) -> None:
    assert taxonomy[leaf].response == response


@pytest.mark.parametrize("name", ["beavertails", "or_bench"])
def test_flat_builtins_hold_the_categories_of_their_data_set(name: str) -> None:
    taxonomy = Taxonomy.builtin(name)
    assert taxonomy.is_flat
    expected = {"beavertails": tuple(n.split(",")[0] for n in BEAVERTAILS), "or_bench": OR_BENCH}[name]
    assert taxonomy.keys == (BENIGN, *expected)
    assert taxonomy.groups() == list(range(len(expected) + 1))


@pytest.mark.parametrize("name", BUILTIN)
def test_every_leaf_says_what_a_reader_and_the_library_need(name: str) -> None:
    taxonomy = Taxonomy.builtin(name)
    for leaf in taxonomy.leaves:
        for field in ("name", "definition", "behaviour", "anchor", "drop", "turn"):
            assert getattr(leaf, field).strip(), f"{leaf.key} has no {field}"
        assert leaf.response in RESPONSES
        assert re.fullmatch("#[0-9A-F]{6}", leaf.colour), leaf.colour
        for part in ("reasons", "offers", "questions"):
            phrasings = getattr(leaf.reply, part)
            assert len(set(phrasings)) == len(phrasings) >= 2, f"{leaf.key}: {part}"
        assert all(pattern.count("{prompt}") == 1 for pattern in leaf.reframe)
    for texts in ([leaf.anchor for leaf in taxonomy.leaves], [leaf.definition for leaf in taxonomy.leaves]):
        assert len(set(texts)) == len(texts)
    colours = [taxonomy.benign.colour, *(leaf.colour for leaf in taxonomy.leaves)]
    assert len(set(colours)) == len(colours), "two leaves share a colour"


@pytest.mark.parametrize("name", BUILTIN)
def test_a_hazardous_goal_is_never_passed_on_inside_another_prompt(name: str) -> None:
    taxonomy = Taxonomy.builtin(name)
    assert [leaf.key for leaf in taxonomy.leaves if leaf.response == "refuse_with_reason" and leaf.reframe] == []


def test_an_unknown_builtin_is_named_with_the_known_ones() -> None:
    with pytest.raises(TaxonomyError, match="'toxicity'.*noncompliance.*beavertails.*or_bench.*from_yaml"):
        Taxonomy.builtin("toxicity")


# ------------------------------------------------------------------- reading one's own


def test_two_levels_from_a_file(tmp_path) -> None:
    path = tmp_path / "kitchen.yml"
    path.write_text(TWO_LEVELS, encoding="utf-8")
    kitchen = Taxonomy.from_yaml(path)
    assert kitchen.name == "kitchen"
    assert kitchen.keys == (BENIGN, "too_hot", "too_cold", "raw")
    assert kitchen.category_keys == (BENIGN, "heat", "raw")
    assert kitchen.groups() == [0, 1, 1, 2]
    assert kitchen["too_hot"].response == "state_limit"
    assert kitchen["too_cold"].colour == "#AA0000", "a leaf without a colour takes that of its category"
    assert kitchen["too_hot"].name == "Too hot", "a leaf without a name takes it from its key"
    assert len(kitchen) == 3


def test_flat_and_by_parent() -> None:
    flat = Taxonomy.from_text(FLAT)
    assert flat.is_flat
    assert flat.keys == (BENIGN, "red", "blue")
    assert flat["red"].colour != flat["blue"].colour
    listed = Taxonomy.from_text(BY_PARENT)
    assert listed.keys == (BENIGN, "raw", "too_hot")
    assert listed.groups() == [0, 1, 2]
    assert listed["too_hot"].parent == "heat"


def test_a_file_without_a_name_is_called_after_itself(tmp_path) -> None:
    path = tmp_path / "pantry.yml"
    path.write_text(BY_PARENT, encoding="utf-8")
    assert Taxonomy.from_yaml(path).name == "pantry"


@pytest.mark.parametrize("text", [TWO_LEVELS, FLAT, BY_PARENT])
def test_to_dict_and_back(text: str) -> None:
    once = Taxonomy.from_text(text)
    again = Taxonomy.from_dict(once.to_dict())
    assert again.leaves == once.leaves
    assert again.category_keys == once.category_keys
    assert again.groups() == once.groups()
    assert again.to_dict() == once.to_dict()


@pytest.mark.parametrize("name", BUILTIN)
def test_builtins_to_yaml_and_back(name: str, tmp_path) -> None:
    taxonomy = Taxonomy.builtin(name)
    path = tmp_path / "copy.yml"
    path.write_text(yaml.safe_dump(taxonomy.to_dict(), allow_unicode=True), encoding="utf-8")
    again = Taxonomy.from_yaml(path)
    assert (again.name, again.source, again.leaves, again.categories, again.benign) == (
        taxonomy.name,
        taxonomy.source,
        taxonomy.leaves,
        taxonomy.categories,
        taxonomy.benign,
    )
    assert [m.definition for m in again.meta] == [m.definition for m in taxonomy.meta]


# ------------------------------------------------------------------- labels and coordinates


def test_labels_stand_for_leaves(taxonomy: Taxonomy) -> None:
    assert taxonomy.leaves_of("privacy") == ("privacy",)
    assert taxonomy.leaves_of("safety") == tuple(LEAVES["safety"])
    assert taxonomy.leaves_of("unsafe") == taxonomy.keys[1:]
    assert taxonomy.leaves_of(BENIGN) == (BENIGN,)
    with pytest.raises(TaxonomyError, match="'rude'.*benign.*unsafe.*incomplete.*privacy"):
        taxonomy.leaves_of("rude")


def test_index_and_lookup_name_what_there_is(taxonomy: Taxonomy) -> None:
    assert [taxonomy.index(k) for k in taxonomy.keys] == list(range(len(taxonomy) + 1))
    assert "safety" in taxonomy and "rude" not in taxonomy
    with pytest.raises(TaxonomyError, match="'safety' is not a leaf"):
        taxonomy.index("safety")
    with pytest.raises(TaxonomyError, match="'rude'.*privacy"):
        taxonomy["rude"]


@st.composite
def layouts(draw: st.DrawFn) -> dict[str, Any]:
    """A valid taxonomy as plain data, two levels deep, flat or mixed."""
    keys = iter(draw(st.lists(st.from_regex(r"[a-z][a-z_0-9]{0,9}", fullmatch=True), min_size=12, max_size=12, unique=True)))
    keys = (k for k in keys if k not in (BENIGN, "unsafe"))
    words = st.text(st.characters(codec="utf-8", exclude_categories=["C"]), min_size=1, max_size=30).map(str.strip).filter(bool)

    def leaf() -> dict[str, Any]:
        return {"key": next(keys), "anchor": draw(words), "definition": draw(words), "response": draw(st.sampled_from(RESPONSES))}

    categories = []
    for size in draw(st.lists(st.integers(0, 2), min_size=1, max_size=3)):
        node = leaf()
        categories.append(node if size == 0 else node | {"leaves": [leaf() for _ in range(size)]})
    return {"name": "drawn", "categories": categories}


@given(layouts())
def test_groups_partition_the_coordinates(layout: dict[str, Any]) -> None:
    taxonomy = Taxonomy.from_dict(layout)
    groups = taxonomy.groups()
    assert len(groups) == len(taxonomy.keys) == len(taxonomy) + 1
    assert groups[0] == 0 and 0 not in groups[1:]
    assert set(groups) == set(range(len(taxonomy.categories) + 1))
    for category in taxonomy.categories:
        of_group = tuple(k for k, g in zip(taxonomy.keys, groups, strict=True) if taxonomy.category_keys[g] == category.key)
        assert taxonomy.leaves_of(category.key) == of_group
    assert Taxonomy.from_dict(taxonomy.to_dict()).leaves == taxonomy.leaves


# ------------------------------------------------------------------- files that are wrong


@pytest.mark.parametrize(
    ("old", "new", "line", "words"),
    [
        pytest.param("key: raw", "key: too_hot", 11, ["duplicate key 'too_hot'", "line 6"], id="a key used twice"),
        pytest.param("        response: state_limit", "        response: shrug", 6, ["'shrug'", "state_limit"], id="unknown response"),
        pytest.param("        anchor: A request to serve it frozen.\n", "", 9, ["too_cold", "no `anchor`"], id="missing anchor"),
        pytest.param("anchor: A request to eat it uncooked.", "anchor: '  '", 11, ["raw", "no `anchor`"], id="blank anchor"),
        pytest.param("  - key: raw\n", "  - key: raw\n    parent: stove\n", 11, ["unknown parent 'stove'", "heat"], id="unknown parent"),
        pytest.param("      - key: too_cold\n", "      - key: too_cold\n        parent: raw\n", 9, ["below 'heat'", "'raw'"], id="parent against its place"),
        pytest.param("    colour:", "    color:", 3, ["unknown field 'color'", "colour"], id="unknown field"),
        pytest.param("key: too_hot", "key: too hot", 6, ["'too hot' is not allowed"], id="a key with a space"),
        pytest.param("key: raw", "key: benign", 11, ["'benign' is not allowed"], id="a reserved key"),
        pytest.param("key: raw", "name: raw", 11, ["no `key`"], id="no key"),
        pytest.param("        response: state_limit", "        reframe: ['Is it hot?']", 6, ["{prompt}", "Is it hot?"], id="reframe without the prompt"),
        pytest.param("        response: state_limit", "        anchor: Once more.", 8, ["'anchor' is given twice"], id="a field given twice"),
        pytest.param("  - key: raw\n", "  - raw\n  - key: raw\n", 1, ["'raw'", "mapping"], id="a category that is a word"),
        pytest.param('colour: "#AA0000"', 'colour: "#AA0000', None, ["not valid YAML"], id="not YAML"),
    ],
)
def test_errors_give_file_and_line(tmp_path, old: str, new: str, line: int | None, words: list[str]) -> None:
    assert old in TWO_LEVELS
    path = tmp_path / "mine.yml"
    path.write_text(TWO_LEVELS.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(TaxonomyError) as caught:
        Taxonomy.from_yaml(path)
    message = str(caught.value)
    assert str(path) in message
    assert (f"line {line}:" if line else "line ") in message
    for word in words:
        assert word in message, message


@pytest.mark.parametrize(
    "text",
    ["", "[]", "just a sentence", "name: x", "categories: []", "categories: {}", "categories: [1, 2]", "categories:\n  - {key: a, anchor: b, leaves: []}"],
)
def test_texts_that_are_no_taxonomy(text: str) -> None:
    with pytest.raises(TaxonomyError, match=r"taxonomy, line \d+: "):
        Taxonomy.from_text(text)


def test_unreadable_files_say_what_to_give(tmp_path) -> None:
    with pytest.raises(TaxonomyError, match=r"nowhere\.yml.*UTF-8 YAML"):
        Taxonomy.from_yaml(tmp_path / "nowhere.yml")
    latin = tmp_path / "latin.yml"
    latin.write_bytes("name: café".encode("latin-1"))
    with pytest.raises(TaxonomyError, match=r"latin\.yml.*UTF-8"):
        Taxonomy.from_yaml(latin)


def test_yaml_that_would_build_objects_is_refused() -> None:
    with pytest.raises(TaxonomyError, match="line 1"):
        Taxonomy.from_text("name: !!python/object/apply:os.getcwd []\ncategories: []")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param(FLAT + "  - {key: crimson, parent: red, anchor: x}\n  - {key: blood, parent: crimson, anchor: y}\n", id="a leaf below a leaf"),
        pytest.param("categories:\n  - {key: a, parent: a, anchor: x}\n", id="its own parent"),
        pytest.param(FLAT + "meta:\n  - {name: no key}\n", id="meta without a key"),
        pytest.param(FLAT + "benign: fine\n", id="benign that is a word"),
        pytest.param(FLAT + "  - {key: green, anchor: x, reply: sorry}\n", id="reply that is a word"),
        pytest.param(FLAT + "  - {key: green, anchor: x, reframe: 3}\n", id="reframe that is a number"),
    ],
)
def test_misplaced_values_are_taxonomy_errors(text: str) -> None:
    with pytest.raises(TaxonomyError, match=r"line \d+: "):
        Taxonomy.from_text(text)


VALUES = st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=5), st.just([]), st.just({}), st.just([{}]), st.just(["x"]))


@given(st.data())
def test_a_damaged_file_is_read_or_refused_and_never_crashes(data: st.DataObject) -> None:
    """One value anywhere in a valid file is replaced by something of another kind."""
    layout = copy.deepcopy(yaml.safe_load(TWO_LEVELS))
    layout |= {"benign": {"name": "Fine"}, "meta": [{"key": "wrapped", "name": "Wrapped"}]}
    layout["categories"][1] |= {"reply": {"reasons": ["Because."]}, "reframe": ["Why: {prompt}"]}
    places: list[tuple[Any, Any]] = []

    def walk(node: Any) -> None:
        for key in node if isinstance(node, dict) else range(len(node)):
            places.append((node, key))
            if isinstance(node[key], dict | list):
                walk(node[key])

    walk(layout)
    node, key = data.draw(st.sampled_from(places), label="place")
    node[key] = data.draw(VALUES, label="value")
    try:
        taxonomy = Taxonomy.from_text(yaml.safe_dump(layout))
    except LanceError as error:
        assert re.search(r"line \d+: ", str(error))
    else:
        assert len(taxonomy.groups()) == len(taxonomy.keys)
