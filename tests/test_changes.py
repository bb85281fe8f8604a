"""What full fine-tuning changed: found, stored in 8 bits, added again."""

import copy
from pathlib import Path

import pytest
import torch
from builders import bert_folder
from safetensors.torch import load_file, save_file

from lance.changes import change_of, changed, linear_weights, unfreeze
from lance.encoder import PromptEncoder
from lance.errors import ModelError

TEXTS = ["how is the moon", "kill a python process"]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> PromptEncoder:
    return PromptEncoder.from_pretrained(str(bert_folder(tmp_path_factory.mktemp("changes") / "bert")))


@pytest.fixture
def tuned(base: PromptEncoder) -> PromptEncoder:
    out = copy.deepcopy(base)
    unfreeze(out)
    generator = torch.Generator().manual_seed(2)
    for p in out.model.parameters():
        if p.requires_grad:
            p.data += 0.2 * torch.randn(p.shape, generator=generator)
    return out


def test_linear_layers_are_trained_and_nothing_else(tuned: PromptEncoder, base: PromptEncoder):
    trainable = {n.removesuffix(".weight") for n, p in tuned.model.named_parameters() if p.requires_grad}
    assert trainable == set(linear_weights(base))
    assert trainable
    assert not any("LayerNorm" in n or "embeddings" in n for n in trainable)
    assert not any(p.requires_grad for p in base.model.parameters())


def test_a_change_is_found_stored_and_added_again(tuned: PromptEncoder, base: PromptEncoder, tmp_path: Path):
    bare, wanted = base.encode(TEXTS), tuned.encode(TEXTS)
    assert not torch.allclose(wanted, bare, atol=0.05)
    save_file(change_of(tuned, base), tmp_path / "change.safetensors")
    stored = load_file(tmp_path / "change.safetensors")
    again = changed(base, stored)
    assert torch.allclose(again.encode(TEXTS), wanted, atol=0.02)
    assert torch.equal(base.encode(TEXTS), bare)
    assert not any(p.requires_grad for p in again.model.parameters())
    weights = sum(w.numel() for w in linear_weights(base).values())
    assert sum(v.numel() * v.element_size() for v in stored.values()) < 1.5 * weights  # these rows are short; a row has one scale
    for name, weight in linear_weights(again).items():
        error = (weight - linear_weights(tuned)[name]).abs().amax(dim=1)
        largest = (linear_weights(tuned)[name] - linear_weights(base)[name]).abs().amax(dim=1)
        assert (error <= 0.51 * largest / 127 + 1e-7).all()


def test_what_did_not_change_is_not_stored(base: PromptEncoder):
    same = copy.deepcopy(base)
    assert change_of(same, base) == {}
    name, weight = next(iter(linear_weights(same).items()))
    weight.data[0, 0] += 1.0
    assert set(change_of(same, base)) == {f"{name}.change", f"{name}.scale"}
    assert torch.allclose(linear_weights(changed(base, change_of(same, base)))[name], weight, atol=1e-6)


def test_a_change_of_another_encoder_is_a_model_error(tuned: PromptEncoder, base: PromptEncoder):
    change = change_of(tuned, base)
    name = next(iter(change)).rsplit(".", 1)[0]
    for wrong in (
        {"elsewhere.change": change[f"{name}.change"], "elsewhere.scale": change[f"{name}.scale"]},
        {f"{name}.change": change[f"{name}.change"][:, :-1], f"{name}.scale": change[f"{name}.scale"]},
        {f"{name}.change": change[f"{name}.change"]},
    ):
        with pytest.raises(ModelError, match=r"does not fit the encoder .*bert"):
            changed(base, wrong)


def test_embeddings_remembered_before_do_not_outlive_a_change(base: PromptEncoder, tuned: PromptEncoder):
    remembering = PromptEncoder.from_pretrained(base.name, remember=True)
    before = remembering.encode(TEXTS)
    assert not torch.allclose(changed(remembering, change_of(tuned, base)).encode(TEXTS), before, atol=0.05)
    assert torch.equal(remembering.encode(TEXTS), before)


def test_a_fit_that_diverged_is_not_stored(tuned: PromptEncoder, base: PromptEncoder):
    next(iter(linear_weights(tuned).values())).data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="no numbers; take a lower learning rate"):
        change_of(tuned, base)
