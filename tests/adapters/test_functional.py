import pytest
import torch
from rounding import assert_rounded

from onelora_diffusion.adapters.functional import add_outer_, add_outer_rows_, add_vector_, feature_sum, group_sums


def test_feature_sum_accumulates_bf16_in_fp32():
    x = torch.full((1, 4097), 1 / 512, dtype=torch.bfloat16)
    x[0, 0] = 1
    assert feature_sum(x).item() == 9  # 1 + 4096 / 512; added one by one in bf16, it would stay 1


def test_feature_sum_of_fp16_is_fp32():
    assert feature_sum(torch.full((1, 4096), 100.0, dtype=torch.float16)).item() == 409_600  # past fp16's range


def test_group_sums_by_hand():
    x = torch.tensor([[1.0, 2, 4, 8, 16], [1, 1, 1, 1, 1]])
    assert group_sums(x, 1).tolist() == [31, 5]
    assert group_sums(x, 2).tolist() == [[21, 10], [3, 2]]  # inputs 0, 2, 4 and inputs 1, 3
    assert group_sums(x, 5).tolist() == x.tolist()
    assert group_sums(torch.full((1, 4096), 100.0, dtype=torch.float16), 2).tolist() == [[204_800, 204_800]]


def test_add_outer_of_two_sums_by_hand():
    out = torch.zeros(2, 3)
    b = torch.tensor([[10.0, 20.0, 30.0], [1.0, 1.0, 1.0]])
    added = add_outer_(out, torch.tensor([[1.0, 2.0], [2.0, 0.0]]), b)
    assert added.tolist() == [[12, 22, 32], [20, 40, 60]]
    assert added.data_ptr() == out.data_ptr()
    rows = add_outer_rows_(torch.zeros(2, 1, 3), torch.tensor([[[1.0, 2.0]], [[2.0, 0.0]]]), torch.stack([b, -b]))
    assert rows.tolist() == [[[12, 22, 32]], [[-20, -40, -60]]]


def test_add_outer_by_hand():
    out = torch.zeros(2, 3)
    added = add_outer_(out, torch.tensor([1.0, 2.0]), torch.tensor([10.0, 20.0, 30.0]))
    assert added.tolist() == [[10, 20, 30], [20, 40, 60]]
    assert added.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("rank", [1, 2])
def test_gradients_equal_the_plain_formula(rank):
    torch.manual_seed(0)
    linear = torch.nn.Linear(5, 7)
    x, b, beta = torch.randn(2, 3, 5), torch.randn((7,) if rank == 1 else (2, 7)), torch.randn(7)
    sums = torch.tensor([[1.0, 0, 1, 0, 1], [0, 1, 0, 1, 0]]) if rank == 2 else torch.ones(1, 5)

    def gradients(formula):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, b, beta)]
        formula(*leaves).square().sum().backward()
        return [leaf.grad for leaf in leaves]

    ours = gradients(lambda x, b, beta: add_vector_(add_outer_(linear(x), group_sums(x, rank), b), beta))
    plain = gradients(lambda x, b, beta: linear(x) + x @ sums.T @ torch.atleast_2d(b) + beta)
    for own, expected in zip(ours, plain, strict=True):
        assert_rounded(own, expected, terms=5 * 7 * 6)  # features in and out, and tokens


def test_fp16_feature_sum_past_its_range_stays_finite():
    s = torch.tensor([100_000.0], requires_grad=True)  # past fp16's 65504
    b = torch.tensor([0.01, -0.02], requires_grad=True)
    out = add_outer_(torch.zeros(1, 2, dtype=torch.float16), s, b)
    assert out.tolist() == [[1000, -2000]]
    out.backward(torch.ones(1, 2, dtype=torch.float16))
    assert b.grad.tolist() == [100_000, 100_000]


def test_backward_saves_one_number_a_token():
    saved = set()
    x = torch.randn(4, 6, 8, requires_grad=True)
    out, b = torch.zeros(4, 6, 16), torch.zeros(16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.numel()) or t, lambda t: t):
        add_outer_(out, feature_sum(x), b)
    assert saved == {16, 24}  # b, and s for 4 × 6 tokens


def test_backward_saves_as_many_numbers_a_token_as_there_are_groups():
    saved = set()
    x = torch.randn(4, 6, 8, requires_grad=True)
    out, b = torch.zeros(4, 6, 16), torch.zeros(2, 16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.add(t.numel()) or t, lambda t: t):
        add_outer_(out, group_sums(x, 2), b)
    assert saved == {32, 48}  # b, and two sums for 4 × 6 tokens


def formula_of(linear):
    def formula(x, b, beta):
        return add_vector_(add_outer_(linear(x), group_sums(x, 1 if b.ndim == 1 else len(b)), b), beta)

    return formula


@pytest.mark.parametrize("shape_of_b", [(4,), (2, 4)])
def test_first_and_second_derivatives_in_both_modes_equal_finite_differences(shape_of_b):
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 4, dtype=torch.float64)
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((2, 3), shape_of_b, (4,))]

    def formula(*inputs):
        return formula_of(linear)(*inputs) ** 3

    assert torch.autograd.gradcheck(formula, inputs, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(formula, inputs)


def test_torch_func_goes_through_the_formula():
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 4)
    x, b, beta = torch.randn(5, 3), torch.randn(4), torch.randn(4)
    expected = linear.weight + torch.outer(b, torch.ones(3))  # ∂y/∂x
    jacobians = torch.func.vmap(torch.func.jacrev(formula_of(linear)), in_dims=(0, None, None))(x, b, beta)
    assert_rounded(jacobians, expected.expand(5, 4, 3), terms=2)
    forward = torch.func.jacfwd(formula_of(linear))(x[0], b, beta)
    assert_rounded(forward, expected, terms=2)


def test_second_derivatives_of_bf16_reach_fp32_vectors():
    """d/db of |∂y/∂x|² for y = Σ (W x + b Σx)² in the plain formula's own way."""
    torch.manual_seed(0)
    linear = torch.nn.Linear(3, 4, dtype=torch.bfloat16)
    x, b = torch.randn(2, 3).bfloat16().requires_grad_(), torch.randn(4, requires_grad=True)

    def second(formula):
        (slope,) = torch.autograd.grad(formula().float().square().sum(), x, create_graph=True)
        return torch.autograd.grad(slope.float().square().sum(), b)[0]

    ours = second(lambda: add_outer_(linear(x), feature_sum(x), b))
    plain = second(lambda: linear(x) + x.sum(-1, keepdim=True) * b.bfloat16())
    assert_rounded(ours, plain.bfloat16(), terms=3 * 4 * 2)  # features in and out, and tokens, all rounded to bf16
