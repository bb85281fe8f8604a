"""Matrices in one byte a number: what rounding costs, and its edges."""

import torch

from lance.int8 import packed, unpacked


def test_each_number_is_off_by_at_most_half_a_level_of_its_row():
    matrix = torch.randn(50, 30, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 3, 50).unsqueeze(1)
    numbers, scale = packed(matrix)
    again = unpacked(numbers, scale)
    assert numbers.dtype == torch.int8
    assert (numbers.abs().amax(1) == 127).all()
    assert ((again - matrix).abs().amax(1) <= matrix.abs().amax(1) / 253).all()
    assert torch.equal(packed(again)[0], numbers)


def test_a_row_of_zeros_stays_so():
    assert torch.equal(unpacked(*packed(torch.zeros(2, 3))), torch.zeros(2, 3))
