"""The kernel that draws tokens on a GPU gives the tokens of the CPU."""

from __future__ import annotations

import pytest
import torch
from test_sglang_launch import SIZES, rows_of_weights

from asyncrl.engines.sglang.sampling import draw

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(120)]


@pytest.mark.parametrize("size", SIZES)
def test_draws_are_those_of_the_cpu(size):
    rows = rows_of_weights(size)
    assert torch.equal(draw(*(part.cuda() for part in rows)).cpu(), draw(*rows))


def test_rows_that_are_not_numbers_draw_a_token_of_the_vocabulary():
    rows = torch.arange(3, device="cuda")
    assert (draw(torch.full((3, 300), torch.nan, device="cuda"), rows, rows) < 300).all()
