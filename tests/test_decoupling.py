"""Codes of content and safety, and traversals: what stays and what moves."""

from pathlib import Path

import numpy as np
import pytest

from lance.corpus import Prompt
from lance.decoupling import codes, traverse, twin_ranks
from lance.encoder import PromptEncoder
from lance.enhancer import VariationalEnhancer
from lance.errors import ModelError, TaxonomyError
from lance.pipeline import Lance
from lance.taxonomy import Taxonomy


@pytest.fixture(scope="module")
def shipped(lance_default: Lance) -> VariationalEnhancer:
    return lance_default.enhancer


@pytest.fixture(scope="module")
def some(corpus: list[Prompt]) -> list[Prompt]:
    test = [p for p in corpus if p.split == "test"]
    halves = {p.id: p for p in test}
    return [q for p in test if not p.benign and p.twin in halves for q in (p, halves[str(p.twin)])][:240]


def test_codes_have_one_row_a_prompt(shipped: VariationalEnhancer, some: list[Prompt]):
    found = codes(shipped, [p.text for p in some[:5]])
    assert found.x.shape == (5, shipped.base.dim)
    assert found.z.shape == (5, shipped.config.latent_dim)
    assert found.d_bar.sum(1) == pytest.approx(1)
    assert np.linalg.norm(found.x, axis=1) == pytest.approx(shipped.base.dim**0.5, rel=1e-3)


def test_content_finds_the_twin_and_the_distribution_does_not(shipped: VariationalEnhancer, some: list[Prompt]):
    found = codes(shipped, [p.text for p in some])
    by_z, by_d = np.median(twin_ranks(found.z, some)), np.median(twin_ranks(np.sqrt(found.d_bar), some))
    assert by_z <= 5
    assert by_d > 4 * (by_z + 1)


def test_a_traversal_moves_towards_the_leaf_and_only_there(shipped: VariationalEnhancer, some: list[Prompt], taxonomy: Taxonomy):
    found = codes(shipped, [p.text for p in some[:20]])
    near, far = (traverse(shipped, found, "copyright", s) for s in (1.0, 3.0))
    b = shipped.network.directions.numpy()[taxonomy.index("copyright") - 1]  # type: ignore[union-attr]
    assert far - near == pytest.approx(np.tile(2 * b, (20, 1)), abs=1e-4)
    directions = shipped.network.directions.numpy()  # type: ignore[union-attr]
    assert traverse(shipped, found, "benign") == pytest.approx(found.x - found.d_bar[:, 1:] @ directions, abs=1e-4)
    with pytest.raises(TaxonomyError, match="nonsense"):
        traverse(shipped, found, "nonsense")


def test_twin_ranks_by_hand():
    prompts = [Prompt("a", ("privacy",), id="1", twin="2"), Prompt("b", id="2", twin="1"), Prompt("c", id="3"), Prompt("d", id="4")]
    vectors = np.array([[1.0, 0.0], [0.0, 1.0], [0.9, 0.1], [-1.0, -1.0]])
    assert twin_ranks(vectors, prompts).tolist() == [1]
    assert twin_ranks(vectors, prompts[2:]).tolist() == []


def test_an_unfitted_enhancer_has_no_codes(taxonomy: Taxonomy, encoder: PromptEncoder, tmp_path: Path):
    with pytest.raises(ModelError, match="not fitted"):
        codes(VariationalEnhancer(taxonomy, encoder), ["hello there"])
