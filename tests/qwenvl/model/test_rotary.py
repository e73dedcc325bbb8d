import math

import pytest
import torch

from qwenvl.model.rotary import dynamic_ntk_alpha, own_sequence_length, rotary_positions, rotate, scale_by_log_n


def test_alpha_at_the_edges():
    """1 up to seq_length, 3 up to twice, 7 up to four times: the formula of the spec, in exact arithmetic."""
    lengths = [1, 1023, 1024, 2047, 2048, 2049, 4095, 4096, 4097, 8192, 8193]
    alphas = dynamic_ntk_alpha(torch.tensor(lengths), 2048)
    assert alphas.tolist() == [1, 1, 1, 1, 1, 3, 3, 3, 7, 7, 15]


@pytest.mark.parametrize("seq_length", [700, 2048, 8192])
def test_alpha_against_the_formula(seq_length):
    lengths = torch.arange(1, 4 * seq_length)
    expected = [max(2 ** math.ceil(math.log2(n / seq_length) + 1) - 1, 1) for n in lengths.tolist()]
    assert dynamic_ntk_alpha(lengths, seq_length).tolist() == expected


def test_own_sequence_length_of_packs_and_padding():
    packed = torch.tensor([[0, 1, 2, 0, 1, 0]])
    assert own_sequence_length(packed).tolist() == [[3, 3, 3, 2, 2, 1]]
    left_padded = torch.tensor([[0, 0, 0, 1, 2, 3]])  # two pads, then positions 0..3
    assert own_sequence_length(left_padded)[0, -1] == 4


def test_rotation_depends_on_the_distance_only():
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 1, 64), torch.randn(1, 2, 1, 64)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        at = [rotary_positions(torch.tensor([[n]]), head_dim=64, base=10000) for n in (query_at, key_at)]
        return (rotate(query, at[0]) * rotate(key, at[1])).sum(-1)

    torch.testing.assert_close(score(7, 3), score(1007, 1003), rtol=0, atol=2e-3)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-2)


def test_log_n_scales_queries_beyond_seq_length():
    positions = rotary_positions(torch.tensor([[698, 699, 700, 1399]]), head_dim=64, base=10000, log_n_from=700)
    assert positions.log_n[0, 0, :, 0].tolist() == pytest.approx(
        [1, 1, math.log(701, 700), math.log(1400, 700)], rel=1e-6
    )
    query = torch.randn(1, 2, 4, 64)
    torch.testing.assert_close(scale_by_log_n(query, positions), query * positions.log_n)
