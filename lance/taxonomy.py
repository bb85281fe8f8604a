"""Taxonomies of rejection categories: data, not code.

A taxonomy has top-level categories and, below some or all of them, leaves. The rejection distribution lives on the leaves; index 0 is benign.
A flat taxonomy is one whose categories are themselves the leaves.
"""

import functools
import importlib.resources
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lance.errors import TaxonomyError

BENIGN = "benign"
RESPONSES = ("refuse_with_reason", "correct_premise", "ask", "say_again", "state_limit", "give_views")
_PALETTE = (
    "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#B8A800", "#882255",
    "#44AA99", "#999933", "#AA4499", "#117733", "#661100", "#6699CC", "#888888", "#332288",
)  # fmt: skip


@dataclass(frozen=True)
class Reply:
    """Sentences from which a constructive reply is composed: one reason, one offer, one question."""

    reasons: tuple[str, ...] = ()
    offers: tuple[str, ...] = ()
    questions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Category:
    """One node of a taxonomy.

    `anchor` is the sentence that places the category in embedding space; `drop` and `turn` give the textual gradient its direction;
    `reframe` holds patterns with `{prompt}` that turn a whole prompt (empty where the goal itself is the hazard).
    """

    key: str
    name: str
    definition: str
    colour: str
    parent: str | None = None
    behaviour: str = ""
    response: str = "refuse_with_reason"
    anchor: str = ""
    drop: str = ""
    turn: str = ""
    reframe: tuple[str, ...] = ()
    reply: Reply = field(default_factory=Reply)


class Taxonomy:
    """An ordered set of leaves under top-level categories, with benign at index 0.

    Parameters
    ----------
    name : str
    categories : sequence of Category
        The top level, in order.
    leaves : sequence of Category
        Each with `parent` set to a category's key; a flat taxonomy has one leaf per category, of the same key.
    """

    def __init__(
        self,
        name: str,
        categories: Sequence[Category],
        leaves: Sequence[Category],
        *,
        benign: Category | None = None,
        meta: Sequence[Category] = (),
        source: str = "",
    ) -> None:
        self.name = name
        self.source = source
        self.categories = tuple(categories)
        self.leaves = tuple(leaves)
        self.benign = benign or Category(BENIGN, "Benign", "Nothing stands against simply answering.", "#7F7F7F")
        self.meta = tuple(meta)
        self._leaf_index = {BENIGN: 0} | {leaf.key: i for i, leaf in enumerate(self.leaves, start=1)}
        self._by_key = {c.key: c for c in (self.benign, *self.categories, *self.leaves, *self.meta)}

    def __len__(self) -> int:
        """Number of leaves, K, without benign."""
        return len(self.leaves)

    def __repr__(self) -> str:
        return f"Taxonomy({self.name!r}, {len(self.categories)} categories, {len(self)} leaves)"

    def __contains__(self, key: object) -> bool:
        return key in self._by_key

    def __getitem__(self, key: str) -> Category:
        try:
            return self._by_key[key]
        except KeyError:
            raise TaxonomyError(f"{key!r} is not in taxonomy {self.name!r}; its keys are {', '.join(sorted(self._by_key))}") from None

    @property
    def keys(self) -> tuple[str, ...]:
        """Coordinates of the distribution: benign, then the leaves; length K + 1."""
        return tuple(self._leaf_index)

    @property
    def category_keys(self) -> tuple[str, ...]:
        """benign, then the top-level categories."""
        return (BENIGN, *(c.key for c in self.categories))

    @property
    def is_flat(self) -> bool:
        return all(leaf.key == leaf.parent for leaf in self.leaves)

    def index(self, key: str) -> int:
        """Coordinate of a leaf (or of benign) in the distribution."""
        if key not in self._leaf_index:
            raise TaxonomyError(f"{key!r} is not a leaf of taxonomy {self.name!r}; the leaves are {', '.join(self.keys)}")
        return self._leaf_index[key]

    def leaves_of(self, key: str) -> tuple[str, ...]:
        """Leaf keys that a label may stand for: itself, the leaves of a category, or (for `unsafe`) all of them.

        Raises
        ------
        TaxonomyError
            When `key` is neither a leaf nor a category nor `unsafe` nor `benign`.
        """
        if key in self._leaf_index:
            return (key,)
        if key == "unsafe":
            return tuple(leaf.key for leaf in self.leaves)
        below = tuple(leaf.key for leaf in self.leaves if leaf.parent == key)
        if not below:
            raise TaxonomyError(
                f"unknown label {key!r}; expected 'benign', 'unsafe', a category ({', '.join(c.key for c in self.categories)}) "
                f"or a leaf ({', '.join(leaf.key for leaf in self.leaves)})"
            )
        return below

    def groups(self) -> list[int]:
        """For each coordinate of the distribution the index of its top-level category; 0 is benign. Length K + 1."""
        order = {key: i for i, key in enumerate(self.category_keys)}
        return [0, *(order[leaf.parent or leaf.key] for leaf in self.leaves)]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, in the layout that `from_dict` and `from_yaml` read."""

        def node(c: Category) -> dict[str, Any]:
            d = {k: getattr(c, k) for k in ("key", "name", "definition", "colour", "behaviour", "response", "anchor", "drop", "turn")}
            d["reframe"] = list(c.reframe)
            d["reply"] = {k: list(getattr(c.reply, k)) for k in ("reasons", "offers", "questions")}
            return {k: v for k, v in d.items() if v not in ("", [])}

        categories = []
        for c in self.categories:
            below = [leaf for leaf in self.leaves if leaf.parent == c.key]
            if len(below) == 1 and below[0].key == c.key:
                categories.append(node(below[0]))
            else:
                categories.append(node(c) | {"leaves": [node(leaf) for leaf in below]})
        return {
            "name": self.name,
            "source": self.source,
            "benign": {"name": self.benign.name, "definition": self.benign.definition, "colour": self.benign.colour},
            "meta": [{"key": m.key, "name": m.name, "definition": m.definition} for m in self.meta],
            "categories": categories,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Taxonomy":
        """Build from plain data, as `to_dict` returns it."""
        return cls.from_text(yaml.safe_dump(dict(data), allow_unicode=True, sort_keys=False), origin="taxonomy")

    @classmethod
    def from_yaml(cls, path: str | Path) -> "Taxonomy":
        """Read a taxonomy from a YAML file, two levels deep or flat.

        Raises
        ------
        TaxonomyError
            With file and line, for: unreadable YAML, missing or duplicate keys, an unknown parent, an unknown response, a missing anchor.
        """
        path = Path(path)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise TaxonomyError(f"cannot read taxonomy {str(path)!r}: {error}; give the path of a UTF-8 YAML file") from error
        return cls.from_text(text, origin=str(path))

    @classmethod
    def from_text(cls, text: str, *, origin: str = "taxonomy") -> "Taxonomy":
        """Parse YAML text; `origin` names it in error messages."""
        return _Reader(text, origin).read()

    @classmethod
    def builtin(cls, name: str = "noncompliance") -> "Taxonomy":
        """A taxonomy that ships with the library: `noncompliance`, `beavertails` or `or_bench`."""
        return _builtin(name)


@functools.cache
def _builtin(name: str) -> Taxonomy:
    files = {"noncompliance": "taxonomy.yml", "beavertails": "taxonomy_beavertails.yml", "or_bench": "taxonomy_or_bench.yml"}
    if name not in files:
        raise TaxonomyError(f"no built-in taxonomy {name!r}; there are {', '.join(files)} (or Taxonomy.from_yaml for your own)")
    return Taxonomy.from_yaml(Path(str(importlib.resources.files("lance") / "data" / files[name])))


class _LineLoader(yaml.SafeLoader):
    """SafeLoader that remembers the line of each mapping and refuses a key given twice."""


def _mapping(loader: _LineLoader, node: yaml.MappingNode) -> dict[str, Any]:
    seen: set[str] = set()
    for key_node, _ in node.value:
        key = str(loader.construct_object(key_node))
        if key in seen:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", key_node.start_mark)
        seen.add(key)
    return {"__line__": node.start_mark.line + 1} | {str(k): v for k, v in loader.construct_mapping(node, deep=True).items()}


_LineLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

_FIELDS = set(Category.__dataclass_fields__) | {"leaves", "__line__"}


class _Reader:
    """Reads and validates one taxonomy text, and says where it is wrong."""

    def __init__(self, text: str, origin: str) -> None:
        self.text, self.origin = text, origin
        self.lines: dict[str, int] = {}

    def fail(self, line: int, message: str) -> TaxonomyError:
        return TaxonomyError(f"{self.origin}, line {line}: {message}")

    def read(self) -> Taxonomy:
        try:
            data = yaml.load(self.text, Loader=_LineLoader)  # noqa: S506 - a SafeLoader subclass
        except yaml.MarkedYAMLError as error:
            line = error.problem_mark.line + 1 if error.problem_mark else 1
            raise self.fail(line, f"not valid YAML: {error.problem}") from error
        if not isinstance(data, dict):
            raise self.fail(1, "expected a mapping with `name` and `categories`")
        nodes = data.get("categories")
        if not isinstance(nodes, list) or not nodes:
            raise self.fail(data["__line__"], "expected `categories`, a list with at least one category")
        categories: list[Category] = []
        leaves: list[Category] = []
        declared = {n["key"] for n in nodes if isinstance(n, dict) and isinstance(n.get("key"), str)}
        for node in nodes:
            node = self.check(node, data["__line__"])
            below = node.get("leaves")
            parent = node.get("parent")
            if parent is not None:  # a leaf in list form, naming its category
                if parent not in declared:
                    raise self.fail(node["__line__"], f"{node['key']!r} has the unknown parent {parent!r}; the categories are {', '.join(sorted(declared))}")
                leaves.append(self.leaf(node, parent, len(leaves)))
                continue
            category = self.category(node, None, len(categories))
            categories.append(category)
            if below is not None:
                if not isinstance(below, list) or not below:
                    raise self.fail(node["__line__"], f"`leaves` of {category.key!r} must be a list with at least one leaf; leave it out for a flat category")
                for sub in below:
                    sub = self.check(sub, node["__line__"])
                    if sub.get("parent") not in (None, category.key):
                        raise self.fail(sub["__line__"], f"{sub['key']!r} stands below {category.key!r} but names the parent {sub['parent']!r}")
                    leaves.append(self.leaf(sub, category.key, len(leaves), category.colour))
            elif not any(isinstance(n, dict) and n.get("parent") == category.key for n in nodes):
                leaves.append(self.leaf(node, category.key, len(leaves), category.colour))
        leaves.sort(key=lambda leaf: [c.key for c in categories].index(leaf.parent or leaf.key))
        benign = data.get("benign") or {}
        meta = [Category(m["key"], m.get("name", m["key"]), m.get("definition", ""), "#000000") for m in data.get("meta") or []]
        return Taxonomy(
            str(data.get("name") or Path(self.origin).stem),
            categories,
            leaves,
            benign=Category(
                BENIGN, benign.get("name", "Benign"), benign.get("definition", "Nothing stands against simply answering."), benign.get("colour", "#7F7F7F")
            ),
            meta=meta,
            source=str(data.get("source") or ""),
        )

    def check(self, node: Any, line: int) -> dict[str, Any]:
        if not isinstance(node, dict):
            raise self.fail(line, f"expected a mapping with `key`, found {node!r}")
        line = node["__line__"]
        key = node.get("key")
        if not isinstance(key, str) or not key:
            raise self.fail(line, "a category has no `key`; give it a short text without spaces")
        if any(ch.isspace() for ch in key) or key in (BENIGN, "unsafe"):
            raise self.fail(line, f"key {key!r} is not allowed; use a word without spaces other than 'benign' and 'unsafe'")
        if key in self.lines:
            raise self.fail(line, f"duplicate key {key!r}, first used in line {self.lines[key]}; keys are unique in the whole file")
        self.lines[key] = line
        unknown = set(node) - _FIELDS
        if unknown:
            raise self.fail(line, f"{key!r} has the unknown field {sorted(unknown)[0]!r}; known are {', '.join(sorted(_FIELDS - {'__line__'}))}")
        return node

    def category(self, node: dict[str, Any], parent: str | None, index: int, colour: str | None = None) -> Category:
        reply = node.get("reply") or {}
        return Category(
            key=node["key"],
            name=str(node.get("name") or node["key"].replace("_", " ").capitalize()),
            definition=str(node.get("definition") or ""),
            colour=str(node.get("colour") or colour or _PALETTE[index % len(_PALETTE)]),
            parent=parent,
            behaviour=str(node.get("behaviour") or ""),
            response=str(node.get("response") or "refuse_with_reason"),
            anchor=str(node.get("anchor") or ""),
            drop=str(node.get("drop") or ""),
            turn=str(node.get("turn") or ""),
            reframe=_texts(node.get("reframe")),
            reply=Reply(*(_texts(reply.get(k)) for k in ("reasons", "offers", "questions"))),
        )

    def leaf(self, node: dict[str, Any], parent: str, index: int, colour: str | None = None) -> Category:
        leaf = self.category(node, parent, index, colour)
        line = node["__line__"]
        if not leaf.anchor.strip():
            raise self.fail(line, f"leaf {leaf.key!r} has no `anchor`; add a sentence that describes its prompts (it places the leaf in embedding space)")
        if leaf.response not in RESPONSES:
            raise self.fail(line, f"leaf {leaf.key!r} has the unknown response {leaf.response!r}; expected one of {', '.join(RESPONSES)}")
        for pattern in leaf.reframe:
            if "{prompt}" not in pattern:
                raise self.fail(line, f"a `reframe` of leaf {leaf.key!r} lacks {{prompt}}: {pattern!r}")
        return leaf


def _texts(value: Iterable[str] | str | None) -> tuple[str, ...]:
    return (value,) if isinstance(value, str) else tuple(str(v) for v in value or ())
