"""Feature sums and their in-place addition to a layer's output: the code that runs at every layer and step."""

import torch
from torch import nn
from torch.autograd import forward_ad


class _GroupSums(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, rank):
        ctx.shape, ctx.dtype, ctx.rank = x.shape, x.dtype, rank
        return _sum_groups(x, rank)

    @staticmethod
    def backward(ctx, grad_s):
        # ∂x = (∂s) G: feature i is in group i mod rank, so ∂s repeats along the features. Of one group it is expanded,
        # so that the only tokens × d traffic is the add onto the linear's own ∂x.
        grad_s = grad_s.to(ctx.dtype)
        if ctx.rank == 1:
            return grad_s.unsqueeze(-1).expand(ctx.shape), None
        repeats = -(-ctx.shape[-1] // ctx.rank)
        repeated = grad_s.unsqueeze(-2).expand(*grad_s.shape[:-1], repeats, ctx.rank)
        return repeated.flatten(-2)[..., : ctx.shape[-1]], None


class _AddOuter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, s, b):
        inputs = s, b
        result = _untracked(out)
        if out.dtype == torch.float16:  # 65504 is soon reached by a sum of thousands of features
            result.add_(_outer(s, b))
        else:
            s, b = s.to(out.dtype), b.to(out.dtype)  # cast before saving, so that backward does not cast again
            rank, features = 1 if b.ndim == 1 else len(b), b.shape[-1]
            result.view(-1, features).addmm_(s.reshape(-1, rank), b.view(rank, features))  # addr_ is slower in bf16
        ctx.save_for_backward(*inputs, s, b)
        return result

    @staticmethod
    def backward(ctx, grad):
        own_s, own_b, s, b = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted, so the first must be a function of the inputs
            s, b = own_s.to(s.dtype), own_b.to(b.dtype)
        rows = grad.reshape(-1, b.shape[-1]).to(b.dtype)
        b, s_of_rows = (b, s.flatten()) if b.ndim == 1 else (b.T, s.flatten(0, -2).T)
        grad_s = (rows @ b).view(s.shape).to(own_s.dtype) if ctx.needs_input_grad[1] else None
        grad_b = (s_of_rows @ rows).to(own_b.dtype) if ctx.needs_input_grad[2] else None
        return grad, grad_s, grad_b


class _AddOuterRows(torch.autograd.Function):
    """`_AddOuter` by sample: out (batch, tokens, features), s (batch, tokens, rank), b (batch, rank, features)."""

    @staticmethod
    def forward(ctx, out, s, b):
        inputs = s, b
        result = _untracked(out)
        if out.dtype == torch.float16:
            result.add_(torch.bmm(s, b.to(s.dtype)))
        else:
            s, b = s.to(out.dtype), b.to(out.dtype)
            result.addcmul_(s, b) if b.shape[1] == 1 else result.baddbmm_(s, b)
        ctx.save_for_backward(*inputs, s, b)
        return result

    @staticmethod
    def backward(ctx, grad):
        own_s, own_b, s, b = ctx.saved_tensors
        if torch.is_grad_enabled():  # a second derivative is wanted
            s, b = own_s.to(s.dtype), own_b.to(b.dtype)
        rows = grad.to(b.dtype)
        grad_s = torch.bmm(rows, b.mT).to(own_s.dtype) if ctx.needs_input_grad[1] else None
        grad_b = torch.bmm(s.to(b.dtype).mT, rows).to(own_b.dtype) if ctx.needs_input_grad[2] else None
        return grad, grad_s, grad_b


def _outer(s: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return s.unsqueeze(-1) * b if b.ndim == 1 else s @ b.to(s.dtype)


def _is_derived_elsewhere() -> bool:
    """Whether torch.compile, torch.func or forward-mode AD is at work, which need the plain formula."""
    return (
        torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0  # inside a `dual_level`
    )


def feature_sum(x: torch.Tensor) -> torch.Tensor:
    """Compress features to their sum, s = 1ᵀx = Σᵢ xᵢ (1LoRA, section 3.2): (..., in_features) -> (...).

    It is accumulated in fp32, since a bf16 sum over thousands of features would lose the small ones, and has x's
    dtype, or fp32 for fp16.
    """
    return group_sums(x, 1)


def group_sums(x: torch.Tensor, rank: int) -> torch.Tensor:
    """Compress features to the sums of `rank` groups; feature i is in group i mod rank (MiSS, arXiv:2409.15371).

    (..., features) -> (..., rank) in the precision of `feature_sum`; for rank 1 that sum itself, of shape (...).
    """
    return _sum_groups(x, rank) if _is_derived_elsewhere() else _GroupSums.apply(x, rank)


def _sum_groups(x: torch.Tensor, rank: int) -> torch.Tensor:
    # PyTorch accumulates a bf16 sum in fp32 by itself; told to return fp32, it converts all of x first.
    dtype = torch.float32 if x.dtype == torch.float16 else None
    if rank == 1:
        return x.sum(-1, dtype=dtype)
    rest = x.shape[-1] % rank
    whole = x[..., : x.shape[-1] - rest].unflatten(-1, (-1, rank))
    sums = whole.sum(-2, dtype=dtype)
    return sums + nn.functional.pad(x[..., x.shape[-1] - rest :], (0, rank - rest)) if rest else sums


def _untracked(out: torch.Tensor) -> torch.Tensor:
    """The memory of a linear's output, as a tensor of its own, to be changed in place.

    A linear layer with a 3-D input returns a view, and autograd copies the gradient when a view is changed in place.
    The backward of a linear layer does not read its output, so the change need not be tracked. If an operation has
    saved the output all the same, its backward raises an error, because the tensor's version was increased.
    """
    if not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out.data


class _Parts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, product, number):
        return tuple(part.data for part in product.data.chunk(number, dim=-1))

    @staticmethod
    def backward(ctx, *grads):
        return torch.cat(grads, dim=-1), None


def parts_of(product: torch.Tensor, number: int) -> tuple[torch.Tensor, ...]:
    """Split a product's features into equal parts that share its memory and may each be changed in place.

    Autograd does not allow that for `product.chunk(number, dim=-1)`, whose parts are views of one tensor.
    """
    if _is_derived_elsewhere() or not product.requires_grad:
        return product.chunk(number, dim=-1)
    return _Parts.apply(product, number)


def add_outer_(out: torch.Tensor, s: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Decompress the sums of features onto a linear's output, out += s b (1LoRA, equation 3), in its memory.

    Saves `s` (`rank` numbers a token) and `b` for backward, and never forms a second tokens × features tensor:
    ∂b = sᵀ ∂out and ∂s = ∂out bᵀ are products with a thin matrix. Nothing may have saved `out` for backward.

    Args:
        out: (..., out_features), contiguous.
        s: (...), or (..., rank), as `group_sums` gives it.
        b: (out_features,), or (rank, out_features), any floating dtype.
    """
    if _is_derived_elsewhere():
        return out + _outer(s, b).to(out.dtype)
    return _AddOuter.apply(out, s, b)


def add_outer_rows_(out: torch.Tensor, s: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """As `add_outer_`, to `out` (batch, ..., out_features), with one `b` a sample: (batch, [rank,] out_features)."""
    if torch.is_grad_enabled() and not _is_derived_elsewhere():
        of_samples = b.reshape(len(b), -1, b.shape[-1])
        flat, sums = out.reshape(len(out), -1, out.shape[-1]), s.reshape(len(s), -1, of_samples.shape[1])
        return _AddOuterRows.apply(flat, sums, of_samples).view(out.shape)
    if b.ndim == 2:
        return _add_rows(out, s.unsqueeze(-1), _beside(b, out))
    flat, sums = out.reshape(len(out), -1, out.shape[-1]), s.reshape(len(s), -1, s.shape[-1])
    if out.dtype == torch.float16:
        return _add(flat, torch.bmm(sums.float(), b.float())).view(out.shape)
    sums, b = sums.to(out.dtype), b.to(out.dtype)
    added = torch.baddbmm(flat, sums, b) if torch.is_grad_enabled() else flat.baddbmm_(sums, b)
    return added.view(out.shape)


def _beside(rows: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """Reshape (batch, features) to (batch, 1, ..., features), which broadcasts over the tokens of `out`."""
    return rows.view(len(rows), *[1] * (out.ndim - 2), rows.shape[-1])


class _AddVector(torch.autograd.Function):
    @staticmethod
    def forward(ctx, out, beta):
        ctx.dtype = beta.dtype
        result = _untracked(out)
        return result.add_(beta.to(out.dtype))  # an addition of two dtypes is several times slower

    @staticmethod
    def backward(ctx, grad):
        grad_beta = grad.reshape(-1, grad.shape[-1]).sum(0, dtype=ctx.dtype) if ctx.needs_input_grad[1] else None
        return grad, grad_beta


def add_vector_(out: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """Shift a linear's output (..., out_features) by a trained bias (out_features,) in place, out += β (BitFit).

    Nothing may have saved `out` for backward.
    """
    if _is_derived_elsewhere():
        return out + beta.to(out.dtype)
    return _AddVector.apply(out, beta)


def add_vector_rows_(out: torch.Tensor, beta: torch.Tensor) -> torch.Tensor:
    """As `add_vector_`, with one β for each sample: (batch, out_features)."""
    return _add(out, _beside(beta, out))


def scale_rows(out: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    """γ ⊙ out, with one γ for each sample: (batch, out_features)."""
    return _beside(gamma, out).to(out.dtype) * out


def _add_rows(out: torch.Tensor, s: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    if out.dtype == torch.float16:  # 65504 is soon reached by a sum of thousands of features
        return _add(out, s * rows)
    s, rows = s.to(out.dtype), rows.to(out.dtype)
    return torch.addcmul(out, s, rows) if _is_kept() else out.addcmul_(s, rows)


def _add(out: torch.Tensor, term: torch.Tensor) -> torch.Tensor:
    return (out + term).to(out.dtype) if _is_kept() else out.add_(term)


def _is_kept() -> bool:
    """Whether an output must not be changed in place: when gradients are recorded, and in compiled code."""
    return torch.is_grad_enabled() or _is_derived_elsewhere()
