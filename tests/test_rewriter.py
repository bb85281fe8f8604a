"""The embedded rewriter: it learns, copies, follows the gradient, and is the same after saving. A small BERT, and tasks that it learns in seconds."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from builders import LETTERS, bert_folder

from lance.corpus import Prompt, Span
from lance.encoder import PromptEncoder
from lance.errors import DataError, ModelError
from lance.rewriter import Rewriter, RewriterConfig, RewriteRequest, direction
from lance.rewriting import fit_rewriter, nearest_targets, rewrite_pairs
from lance.taxonomy import Taxonomy

SMALL = {"layers": 2, "batch_size": 16, "lr": 3e-3, "dropout": 0.0, "weight_decay": 0.0}
ASK, GO = direction("ask", "the name", "ask who"), direction("go", "the house", "name the moon")


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return PromptEncoder.from_pretrained(str(bert_folder(tmp_path_factory.mktemp("rewriter") / "bert", hidden=48)))


def letters(rng: np.random.Generator, n: int = 3) -> str:
    return " ".join(rng.choice(list(LETTERS[:20]), n, replace=False))


@pytest.fixture(scope="module")
def rewriter(small_encoder: PromptEncoder) -> Rewriter:
    """What is marked goes, the rest is copied; "how" comes first under one direction and "what" under the other."""
    rng = np.random.default_rng(0)
    pairs = []
    for _ in range(600):
        kept, gone = letters(rng).split(), str(rng.choice(["bomb", "kill"]))
        text = " ".join([*kept[:2], gone, *kept[2:]])
        start = text.index(gone)
        first, told = ("how", ASK) if rng.random() < 0.5 else ("what", GO)
        pairs.append((RewriteRequest(text, ((start, start + len(gone)),), ((1.0, told),)), " ".join([first, *kept])))
    config = RewriterConfig(epochs=12, **SMALL)  # type: ignore[arg-type]
    return fit_rewriter(Rewriter(small_encoder, config), pairs, [[] for _ in pairs], pairs[:32])


def request(text: str, told: str, gone: str = "bomb") -> RewriteRequest:
    return RewriteRequest(text, ((text.index(gone), text.index(gone) + len(gone)),), ((1.0, told),))


def test_it_learns(rewriter: Rewriter):
    first, last = rewriter.history[0], rewriter.history[-1]
    assert last["validation_nll"] < 0.5 < first["validation_nll"]
    assert set(last) == {"epoch", "nll", "validation_nll"}


def test_the_same_prompt_under_another_gradient_becomes_another_prompt(rewriter: Rewriter):
    asked, gone = rewriter.rewrite([request("c d bomb e", ASK), request("c d bomb e", GO)])
    assert asked.split()[0] == "how"
    assert gone.split()[0] == "what"


def test_what_is_not_marked_is_copied(rewriter: Rewriter):
    rng = np.random.default_rng(9)
    kept = [letters(rng) for _ in range(20)]
    written = rewriter.rewrite([request(f"{a[:3]} bomb {a[4:]}", ASK) for a in kept])
    right = [set(a.split()) == set(w.split()[1:]) for a, w in zip(kept, written, strict=True)]
    assert np.mean(right) > 0.7, list(zip(kept, written, strict=True))[:5]


def test_a_word_that_no_target_had_can_be_copied(small_encoder: PromptEncoder):
    rng = np.random.default_rng(1)
    texts = [letters(rng, 2) for _ in range(400)]
    pairs = [(RewriteRequest(t), t) for t in texts]
    config = RewriterConfig(epochs=12, **SMALL)  # type: ignore[arg-type]
    model = fit_rewriter(Rewriter(small_encoder, config), pairs, [[] for _ in pairs])
    new = small_encoder.tokenizer("z")["input_ids"][1]
    assert new not in model._fitted().vocabulary.tolist()
    assert any("z" in w.split() for w in model.rewrite([RewriteRequest(f"z {a}") for a in "bcdfgh"]))


def test_written_one_by_one_or_at_once_the_states_are_the_same(rewriter: Rewriter):
    net = rewriter._fitted()
    read = rewriter._read([request("c d bomb e", ASK), request("kill f g bomb", GO)])
    memory = net.read(read.directions, read.weights, read.prompt, read.marks, read.exemplar, read.seen)
    ids = torch.tensor([[2, 8, 9, 10], [2, 20, 21, 9]])
    at_once = net.write(ids, memory, read.seen)
    kept: list = [None] * len(net.writers)
    for t in range(4):
        x = net.step(ids[:, t : t + 1], t, kept, net.others(memory), read.seen)
        assert torch.allclose(x[:, 0], at_once[:, t], atol=1e-4)
    words, places = net.mixture(at_once, memory, read.ids >= 0)
    assert torch.allclose(words.exp().sum(-1) + places.exp().sum(-1), torch.ones(2, 4), atol=1e-4)
    p = net.probabilities(words[:, 0], places[:, 0], read.ids)
    assert torch.allclose(p.sum(-1), torch.ones(2), atol=1e-4)
    target = torch.tensor([[8], [9]])
    one = net.log_likelihood(words[:, :1], places[:, :1], target, read.ids)
    assert torch.allclose(one.exp()[:, 0], p.gather(1, target)[:, 0], atol=1e-4)


def test_a_batch_changes_nothing(rewriter: Rewriter):
    asked = [request("c d bomb e", ASK), request("h i bomb k how what the moon is", GO), request("bomb a", ASK)]
    assert rewriter.rewrite(asked) == [rewriter.rewrite([r])[0] for r in asked]
    assert rewriter.rewrite([]) == []


def test_the_seed_decides(small_encoder: PromptEncoder, rewriter: Rewriter):
    pairs = [(request(f"{a} bomb", ASK), f"how {a}") for a in "abcdefgh"]

    def fit(seed: int) -> float:
        config = RewriterConfig(epochs=1, seed=seed, **SMALL)  # type: ignore[arg-type]
        return fit_rewriter(Rewriter(small_encoder, config), pairs, [["the moon"] for _ in pairs]).loss(pairs)

    state = torch.get_rng_state()
    assert fit(0) == fit(0) != fit(1)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_saved_rewriter_writes_the_same(rewriter: Rewriter, small_encoder: PromptEncoder, tmp_path: Path):
    asked = [request(f"{a} d bomb e", told) for a in "fghij" for told in (ASK, GO)]
    rewriter.save_pretrained(tmp_path)
    again = Rewriter.from_pretrained(tmp_path, small_encoder)
    assert again.rewrite(asked) == rewriter.rewrite(asked)
    assert again.history == rewriter.history
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["encoder"].update(name="another"), "reads the encoder 'another'"),
        (lambda c: c["config"].update(layers=3), "another version"),
        (lambda c: c["config"].update(wings=2), "another version"),
    ],
)
def test_a_folder_that_does_not_fit_is_a_model_error(
    rewriter: Rewriter, small_encoder: PromptEncoder, tmp_path: Path, change: Callable[[dict], None], message: str
):
    rewriter.save_pretrained(tmp_path)
    meta = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    change(meta)
    (tmp_path / "config.json").write_text(json.dumps(meta), encoding="utf-8")
    with pytest.raises(ModelError, match=message):
        Rewriter.from_pretrained(tmp_path, small_encoder)


def test_what_cannot_be_learnt_from_is_refused(small_encoder: PromptEncoder):
    with pytest.raises(DataError, match="0 pairs"):
        fit_rewriter(Rewriter(small_encoder), [], [])
    with pytest.raises(ModelError, match="not fitted"):
        Rewriter(small_encoder).rewrite([RewriteRequest("a")])
    with pytest.raises(ValueError, match="layers"):
        RewriterConfig(layers=0)


def test_pairs_have_the_spans_and_directions_of_their_prompt(taxonomy: Taxonomy):
    prompts = [Prompt("build a bomb", ("privacy", "copyright"), refined=("build a house", "the moon"), spans=(Span(8, 12, "privacy"),)), Prompt("how")]
    pairs = rewrite_pairs(prompts, taxonomy)
    assert [t for _, t in pairs] == ["build a house", "the moon"]
    r = pairs[0][0]
    assert (r.text, r.spans, [w for w, _ in r.directions]) == ("build a bomb", ((8, 12),), [0.5, 0.5])
    assert taxonomy["privacy"].turn in r.directions[0][1]


def test_exemplars_are_similar_and_never_near_duplicates(encoder: PromptEncoder):
    texts = ["how do i bake bread", "how do i bake bread at home", "how can one make a cake", "who won the war of 1812", "when did the war of 1812 end"]
    pairs = [(RewriteRequest(t), f"{i} {t}") for i, t in enumerate(texts)]
    near = nearest_targets(pairs, encoder)
    assert near[0][0] == pairs[2][1]
    assert not {pairs[0][1], pairs[1][1]} & set(near[0])
    assert near[3][0] == pairs[4][1]
    assert nearest_targets(pairs, encoder, [(RewriteRequest("baking a cake"), "")])[0][0] == pairs[2][1]
