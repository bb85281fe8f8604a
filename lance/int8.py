"""Matrices in one byte a number: small enough to ship, near enough to change no figure."""

import torch
from jaxtyping import Float, Int8
from torch import Tensor

LEVELS = 127  # of int8, on either side of 0


def packed(matrix: Float[Tensor, "n m"]) -> tuple[Int8[Tensor, "n m"], Float[Tensor, "n 1"]]:
    """A matrix as whole numbers from -127 to 127 and the scale of each row, on the CPU; a number is off by at most 1/254 of its row's largest."""
    matrix = matrix.detach().float().cpu()
    scale = matrix.abs().amax(dim=1, keepdim=True) / LEVELS
    return (matrix / scale.clamp_min(torch.finfo(torch.float32).tiny)).round().to(torch.int8), scale


def unpacked(numbers: Int8[Tensor, "n m"], scale: Float[Tensor, "n 1"]) -> Float[Tensor, "n m"]:
    """The matrix that `packed` rounded, float32."""
    return numbers.float() * scale
