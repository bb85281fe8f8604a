"""What full fine-tuning changed of an encoder, in one byte a weight: small enough to ship, near enough to change no figure."""

import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from lance.encoder import PromptEncoder
from lance.errors import ModelError

LEVELS = 127  # of int8, on either side of 0


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

    A row's largest difference becomes 127, so that the error of a weight is at most 1/254 of that.

    Raises
    ------
    ModelError
        When a weight is not finite.
    """
    before, found = linear_weights(base), {}
    for name, weight in linear_weights(tuned).items():
        difference = (weight - before[name]).float().cpu()
        if not difference.isfinite().all():
            raise ModelError(f"training left layer {name!r} with values that are no numbers; take a lower learning rate")
        if difference.any():
            scale = difference.abs().amax(dim=1, keepdim=True) / LEVELS
            found[f"{name}.change"] = (difference / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8)
            found[f"{name}.scale"] = scale
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
        weights[name].add_((change[key].float() * change[f"{name}.scale"]).to(weights[name]))
    out.model.eval().requires_grad_(False)
    return out
