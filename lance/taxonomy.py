"""Taxonomies of rejection categories: data, not code.

A taxonomy has top-level categories and, below some or all of them, leaves. The rejection distribution lives on the leaves; index 0 is benign.
A flat taxonomy is one whose categories are themselves the leaves.
"""

import functools
import importlib.resources
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

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


_BENIGN = Category(BENIGN, "Benign", "Nothing stands against simply answering.", "#7F7F7F")


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
        self.benign = benign or _BENIGN
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


class _Node(dict[str, Any]):
    """A mapping of the file that knows its line."""

    line = 1


class _NodeLoader(yaml.SafeLoader):
    """SafeLoader that makes a _Node of each mapping and refuses a key given twice."""


def _mapping(loader: _NodeLoader, node: yaml.MappingNode) -> _Node:
    keys = [str(loader.construct_object(key)) for key, _ in node.value]
    for i, key in enumerate(keys):
        if key in keys[:i]:
            raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is given twice", node.value[i][0].start_mark)
    out = _Node((str(k), v) for k, v in loader.construct_mapping(node, deep=True).items())
    out.line = node.start_mark.line + 1
    return out


_NodeLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)

_FIELDS = (*Category.__dataclass_fields__, "leaves")
_KINDS = {str: "a text (in quotes)", list: "a list", _Node: "a mapping"}
T = TypeVar("T", str, list, _Node)


class _Reader:
    """Reads and validates one taxonomy text, and says where it is wrong."""

    def __init__(self, text: str, origin: str) -> None:
        self.text, self.origin = text, origin
        self.lines: dict[str, int] = {}

    def fail(self, line: int, message: str) -> TaxonomyError:
        return TaxonomyError(f"{self.origin}, line {line}: {message}")

    def read(self) -> Taxonomy:
        try:
            data = yaml.load(self.text, Loader=_NodeLoader)  # noqa: S506 - a SafeLoader subclass
        except (yaml.YAMLError, ValueError, RecursionError) as error:  # 2024-02-30 is a ValueError
            mark = getattr(error, "problem_mark", None)
            raise self.fail(mark.line + 1 if mark else 1, f"not valid YAML: {getattr(error, 'problem', None) or error}") from error
        if not isinstance(data, _Node):
            raise self.fail(1, "expected a mapping with `name` and `categories`")
        nodes = self.nodes(data, "categories")
        if not nodes:
            raise self.fail(data.line, "expected `categories`, a list with at least one category")
        tops = [node["key"] for node in nodes if node.get("parent") is None]
        categories: list[Category] = []
        leaves: list[Category] = []
        for node in nodes:
            if (parent := node.get("parent")) is not None:  # a leaf in list form, naming its category
                if parent not in tops:
                    raise self.fail(node.line, f"{node['key']!r} has the unknown parent {parent!r}; the categories are {', '.join(sorted(tops)) or 'missing'}")
                leaves.append(self.leaf(node, parent, len(leaves)))
                continue
            category = self.category(node, None, len(categories))
            categories.append(category)
            for sub in node.get("leaves") or ():
                if sub.get("parent") not in (None, category.key):
                    raise self.fail(sub.line, f"{sub['key']!r} stands below {category.key!r} but names the parent {sub['parent']!r}")
                leaves.append(self.leaf(sub, category.key, len(leaves), category.colour))
            if node.get("leaves") is None and not any(n.get("parent") == category.key for n in nodes):
                leaves.append(self.leaf(node, category.key, len(leaves), category.colour))
        leaves.sort(key=lambda leaf: tops.index(leaf.parent or leaf.key))
        benign = self.field(data, "benign", _Node())
        return Taxonomy(
            self.field(data, "name", Path(self.origin).stem),
            categories,
            leaves,
            benign=replace(_BENIGN, **{k: self.field(benign, k, getattr(_BENIGN, k)) for k in ("name", "definition", "colour")}),
            meta=[Category(m["key"], self.field(m, "name", m["key"]), self.field(m, "definition", ""), "#000000") for m in self.nodes(data, "meta")],
            source=self.field(data, "source", ""),
        )

    def field(self, node: _Node, name: str, default: T) -> T:
        """A field of the type of `default`, which stands for one that is absent or empty."""
        value, kind = node.get(name), type(default)
        if value is not None and not isinstance(value, kind):
            raise self.fail(node.line, f"`{name}` must be {_KINDS[kind]}, found {value!r}")
        return value or default

    def texts(self, node: _Node, name: str) -> tuple[str, ...]:
        value = node.get(name)
        values = [value] if isinstance(value, str) else self.field(node, name, [])
        if not all(isinstance(v, str) for v in values):
            raise self.fail(node.line, f"`{name}` must be a list of texts (in quotes), found {value!r}")
        return tuple(values)

    def nodes(self, node: _Node, name: str) -> list[_Node]:
        return [self.check(n, node.line) for n in self.field(node, name, [])]

    def check(self, node: Any, line: int) -> _Node:
        if not isinstance(node, _Node):
            raise self.fail(line, f"expected a mapping with `key`, found {node!r}")
        key = node.get("key")
        if not isinstance(key, str) or not key:
            raise self.fail(node.line, "a category has no `key`; give it a short text without spaces")
        if any(ch.isspace() for ch in key) or key in (BENIGN, "unsafe"):
            raise self.fail(node.line, f"key {key!r} is not allowed; use a word without spaces other than 'benign' and 'unsafe'")
        if key in self.lines:
            raise self.fail(node.line, f"duplicate key {key!r}, first used in line {self.lines[key]}; keys are unique in the whole file")
        self.lines[key] = node.line
        if unknown := sorted(set(node) - set(_FIELDS)):
            raise self.fail(node.line, f"{key!r} has the unknown field {unknown[0]!r}; known are {', '.join(sorted(_FIELDS))}")
        if not self.nodes(node, "leaves") and "leaves" in node:
            raise self.fail(node.line, f"`leaves` of {key!r} must be a list with at least one leaf; leave it out for a flat category")
        return node

    def category(self, node: _Node, parent: str | None, index: int, colour: str | None = None) -> Category:
        return Category(
            key=node["key"],
            name=self.field(node, "name", node["key"].replace("_", " ").capitalize()),
            colour=self.field(node, "colour", colour or _PALETTE[index % len(_PALETTE)]),
            parent=parent,
            response=self.field(node, "response", "refuse_with_reason"),
            reframe=self.texts(node, "reframe"),
            reply=Reply(*(self.texts(self.field(node, "reply", _Node()), k) for k in ("reasons", "offers", "questions"))),
            **{k: self.field(node, k, "") for k in ("definition", "behaviour", "anchor", "drop", "turn")},
        )

    def leaf(self, node: _Node, parent: str, index: int, colour: str | None = None) -> Category:
        leaf = self.category(node, parent, index, colour)
        if "leaves" in node:
            raise self.fail(node.line, f"leaf {leaf.key!r} has `leaves` of its own; a taxonomy has two levels, categories and their leaves")
        if not leaf.anchor.strip():
            raise self.fail(node.line, f"leaf {leaf.key!r} has no `anchor`; add a sentence that describes its prompts (it places the leaf in embedding space)")
        if leaf.response not in RESPONSES:
            raise self.fail(node.line, f"leaf {leaf.key!r} has the unknown response {leaf.response!r}; expected one of {', '.join(RESPONSES)}")
        for pattern in leaf.reframe:
            if "{prompt}" not in pattern:
                raise self.fail(node.line, f"a `reframe` of leaf {leaf.key!r} lacks {{prompt}}: {pattern!r}")
        return leaf
