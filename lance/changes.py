"""What full fine-tuning changed of an encoder, in one byte a weight."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lance.encoder import PromptEncoder
from lance.errors import ModelError
from lance.int8 import packed, unpacked


def unfreeze(encoder: PromptEncoder) -> None:
    """Make the weights of all linear layers trainable (in place); embeddings, biases and normalisation stay as they are."""
    encoder.forget()
    for weight in linear_weights(encoder).values():
        weight.requires_grad_(True)


def linear_weights(encoder: PromptEncoder) -> dict[str, Tensor]:
    """The weights of the linear layers, by the names of the layers."""
    return {name: module.weight for name, module in encoder.model.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def change_of(tuned: PromptEncoder, base: PromptEncoder) -> dict[str, Tensor]:
    """How the linear layers of two encoders of one kind differ: for each that does, int8 `<layer>.change` (out, in) and float32 `<layer>.scale` (out, 1).

    Raises
    ------
    ModelError
        When a weight is not finite.
    """
    before, found = linear_weights(base), {}
    for name, weight in linear_weights(tuned).items():
        difference = weight - before[name]
        if not difference.isfinite().all():
            raise ModelError(f"training left layer {name!r} with values that are no numbers; take a lower learning rate")
        if difference.any():
            found[f"{name}.change"], found[f"{name}.scale"] = packed(difference)
    return found


@torch.no_grad()
def changed(base: PromptEncoder, change: Mapping[str, Tensor]) -> PromptEncoder:
    """A frozen copy of an encoder with such a change added.

    Raises
    ------
    ModelError
        When the change is of another encoder: a layer is missing, or has another shape.
    """
    out = copy.copy(base)
    out.model = copy.deepcopy(base.model)
    out.forget()
    weights = linear_weights(out)
    for key in change:
        name, kind = key.rsplit(".", 1)
        if kind == "scale":
            continue
        if name not in weights or weights[name].shape != change[key].shape or f"{name}.scale" not in change:
            raise ModelError(f"the stored change of layer {name!r} does not fit the encoder {base.name!r}; load it with the encoder that it was trained on")
        weights[name].add_(unpacked(change[key], change[f"{name}.scale"]).to(weights[name]))
    out.model.eval().requires_grad_(False)
    return out
