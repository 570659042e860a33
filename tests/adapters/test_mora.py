import math

import pytest
import torch
from rounding import assert_rounded
from torch import nn

from onelora_diffusion.adapters.mora import MoraAdapter, square_rank


def dense_update(M, kind, in_features, out_features):
    """ΔW entry by entry from the definition: which input reaches which output, and by how much."""
    rank = len(M)
    groups = math.ceil(in_features / rank)
    delta = torch.zeros(out_features, in_features, dtype=torch.float64)
    for o in range(out_features):
        for p in range(groups * rank):  # padded inputs are the first ones once more
            n, j = divmod(p, rank)
            if kind == 1:  # every group adds up; output o repeats result o mod r̂
                delta[o, p % in_features] += M[o % rank, j]
                continue
            m, i = divmod(o % (groups * rank), rank)  # output o is result i of group m
            if m != n:
                continue
            half = rank // 2
            angle = n * 10000 ** (-2 * (j % half) / rank)
            delta[o, p % in_features] += M[i, j] * math.cos(angle)
            # R rotates (x_j, x_{j+half}) to (x_j cos − x_{j+half} sin, x_{j+half} cos + x_j sin)
            partner, sign = (j + half, 1) if j < half else (j - half, -1)
            delta[o, p % in_features] += sign * M[i, partner] * math.sin(angle)
    return delta


@pytest.mark.parametrize("kind", [1, 6])
@pytest.mark.parametrize("in_features, out_features", [(12, 16), (16, 16), (7, 40), (40, 9), (30, 27)])
def test_forward_and_merge_equal_the_dense_update(kind, in_features, out_features):
    torch.manual_seed(0)
    linear = nn.Linear(in_features, out_features)
    adapter = MoraAdapter(linear, kind)
    x, out = torch.randn(2, 5, in_features), torch.randn(2, 5, out_features)
    assert torch.equal(adapter(x, out), out)
    nn.init.normal_(adapter.M)
    delta = dense_update(adapter.M.detach().double(), kind, in_features, out_features).float()
    assert_rounded(adapter.delta_weight(), delta, in_features)
    assert_rounded(adapter(x, out), out + x @ delta.T, in_features)
    merged, bias = adapter.merged(linear.weight, linear.bias)
    assert_rounded(merged, linear.weight + delta, in_features)
    assert bias is linear.bias


def test_type_1_by_hand():
    """r̂ = 2: x = 1..5 is padded by 1 to (1, 2) + (3, 4) + (5, 1) = (9, 7); M swaps; tiled to 5 outputs."""
    adapter = MoraAdapter(nn.Linear(5, 5), 1)
    adapter.M.data = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    assert adapter.update(torch.arange(1.0, 6.0)).tolist() == [7, 9, 7, 9, 7]


def test_type_6_by_hand():
    """The group of index 0 is not rotated; that of index 1 turns by one radian."""
    adapter = MoraAdapter(nn.Linear(4, 4), 6)
    adapter.M.data = torch.eye(2)
    turned = [3 * math.cos(1) - 4 * math.sin(1), 4 * math.cos(1) + 3 * math.sin(1)]
    assert_rounded(adapter.update(torch.arange(1.0, 5.0)), torch.tensor([1.0, 2.0, *turned]), terms=2)


@pytest.mark.parametrize("out_features, ranks", [(1152, (34, 34)), (3456, (59, 58)), (4608, (68, 68)), (32, (6, 6))])
def test_ranks(out_features, ranks):
    assert (square_rank(out_features, 1), square_rank(out_features, 6)) == ranks


def test_half_precision_base_keeps_an_fp32_matrix():
    adapter = MoraAdapter(nn.Linear(12, 16, dtype=torch.bfloat16), 6)
    x, out = torch.randn(3, 12, dtype=torch.bfloat16), torch.zeros(3, 16, dtype=torch.bfloat16)
    result = adapter(x, out)
    result.float().square().sum().backward()
    assert result.dtype == torch.bfloat16 and adapter.M.grad.dtype == adapter.M.dtype == torch.float32
