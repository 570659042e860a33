"""Small models in the shape of the code that papers publish: names of modules, what they call, what they return.

DiT (github.com/facebookresearch/DiT, models.py), SiT (willisma/SiT, models.py), REPA (sihyun-yu/REPA, models/sit.py),
LightningDiT (hustvl/LightningDiT, models/lightningdit.py), DDT (MCG-NJU/DDT, src/models/denoiser/
decoupled_improved_dit.py) and RAE (bytetriper/RAE, src/stage2/models/DDT.py). Positions are not encoded by rotation
here, and no layer starts at zero, so that every one of them has a say.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class RMSNorm(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.weight, eps=1e-6)


def layer_norm(width):
    return nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)


class PatchEmbed(nn.Module):
    """timm's: a convolution."""

    def __init__(self, channels, width, patch):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TimestepEmbedder(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, t):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32, device=t.device) / 128)
        angles = t[:, None].float() * frequencies
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1).to(self.mlp[0].weight.dtype))


class LabelEmbedder(nn.Module):
    """Drops labels by itself: a dropped one becomes `num_classes`, the last row of the table."""

    def __init__(self, num_classes, width, dropout_prob):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + (dropout_prob > 0), width)
        self.num_classes, self.dropout_prob = num_classes, dropout_prob

    def token_drop(self, labels, force_drop_ids=None):
        if force_drop_ids is None:
            dropped = torch.rand(len(labels), device=labels.device) < self.dropout_prob
        else:
            dropped = force_drop_ids == 1
        return torch.where(dropped, self.num_classes, labels)

    def forward(self, labels, train, force_drop_ids=None):
        if train and self.dropout_prob > 0 or force_drop_ids is not None:
            labels = self.token_drop(labels, force_drop_ids)
        return self.embedding_table(labels)


class Attention(nn.Module):
    """timm's, and those of LightningDiT, DDT and RAE after it: one linear layer for q, k and v."""

    def __init__(self, width, heads, bias=True, qk_norm=None):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=bias)
        self.q_norm, self.k_norm = (qk_norm(width // heads) if qk_norm else nn.Identity() for _ in range(2))
        self.proj = nn.Linear(width, width)

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = F.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj(x.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.fc1, self.act, self.fc2 = nn.Linear(width, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class SwiGLUFFN(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w12, self.w3 = nn.Linear(width, 2 * (2 * hidden // 3)), nn.Linear(2 * hidden // 3, width)

    def forward(self, x):
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class FeedForward(nn.Module):
    def __init__(self, width, hidden):
        super().__init__()
        self.w1, self.w3 = (nn.Linear(width, 2 * hidden // 3, bias=False) for _ in range(2))
        self.w2 = nn.Linear(2 * hidden // 3, width, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


def modulation(width, parts, activated=True):
    return nn.Sequential(*[nn.SiLU()] * activated, nn.Linear(width, parts * width))


class Block(nn.Module):
    """What each repository's own kind of block has in common; c is (batch, width), or (batch, tokens, width)."""

    def __init__(self, width, heads, norm=layer_norm, mlp=Mlp, qk_norm=None, bias=True, activated=True):
        super().__init__()
        self.norm1, self.norm2 = norm(width), norm(width)
        self.attn = Attention(width, heads, bias, qk_norm)
        self.mlp = mlp(width, 4 * width)
        self.adaLN_modulation = modulation(width, 6, activated)

    def forward(self, x, c):
        c = c.unsqueeze(1) if c.ndim < x.ndim else c
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_1 * self.attn(modulate(self.norm1(x), shift_1, scale_1))
        return x + gate_2 * self.mlp(modulate(self.norm2(x), shift_2, scale_2))


class FinalLayer(nn.Module):
    def __init__(self, width, out_features, norm=layer_norm, activated=True):
        super().__init__()
        self.norm_final = norm(width)
        self.linear = nn.Linear(width, out_features)
        self.adaLN_modulation = modulation(width, 2, activated)

    def forward(self, x, c):
        c = c.unsqueeze(1) if c.ndim < x.ndim else c
        shift, scale = self.adaLN_modulation(c).chunk(2, dim=-1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class DiT(nn.Module):
    def __init__(self, width=32, depth=2, heads=2, size=8, channels=4, num_classes=10, dropout_prob=0.1, **block):
        super().__init__()
        self.patch, self.out_channels = 2, 2 * channels
        self.x_embedder = PatchEmbed(channels, width, self.patch)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, dropout_prob)
        self.pos_embed = nn.Parameter(_positions(width, size // self.patch), requires_grad=False)
        self.blocks = nn.ModuleList(Block(width, heads, **block) for _ in range(depth))
        norm = {"norm": block["norm"]} if "norm" in block else {}
        self.final_layer = FinalLayer(width, self.patch**2 * self.out_channels, **norm)

    def forward(self, x, t, y):
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y, self.training)
        for index, block in enumerate(self.blocks):
            x = block(x, c)
            self.after(index, x)
        return self.unpatchify(self.final_layer(x, c))

    def after(self, index, x):
        """REPA looks at the tokens here."""

    def unpatchify(self, x):
        side = math.isqrt(x.shape[1])
        x = x.reshape(len(x), side, side, self.patch, self.patch, -1)
        return torch.einsum("nhwpqc->nchpwq", x).reshape(len(x), -1, side * self.patch, side * self.patch)


class SiT(DiT):
    def forward(self, x, t, y):
        return super().forward(x, t, y).chunk(2, dim=1)[0]


class Repa(DiT):
    def __init__(self, width=32, **settings):
        super().__init__(width=width, **settings)
        self.projectors = nn.ModuleList([nn.Sequential(nn.Linear(width, 24), nn.SiLU(), nn.Linear(24, 12))])

    def forward(self, x, t, y):
        return super().forward(x, t, y), self.zs

    def after(self, index, x):
        if index == 0:
            batch, tokens, width = x.shape
            self.zs = [projector(x.reshape(-1, width)).reshape(batch, tokens, -1) for projector in self.projectors]


class LightningDiT(DiT):
    def __init__(self, **settings):
        super().__init__(norm=RMSNorm, mlp=SwiGLUFFN, qk_norm=RMSNorm, **settings)


class Embed(nn.Module):
    """DDT's: a linear layer."""

    def __init__(self, features, width):
        super().__init__()
        self.proj = nn.Linear(features, width)

    def forward(self, x):
        return self.proj(x)


class PlainLabelEmbedder(nn.Module):
    """DDT's: it is given one class more, and its training loop drops labels."""

    def __init__(self, num_classes, width):
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes, width)
        self.num_classes = num_classes

    def forward(self, labels):
        return self.embedding_table(labels)


class DDT(nn.Module):
    def __init__(self, width=32, depth=3, encoder_depth=1, heads=2, channels=4, num_classes=10):
        super().__init__()
        self.encoder_depth, self.patch = encoder_depth, 2
        self.x_embedder, self.s_embedder = (Embed(channels * self.patch**2, width) for _ in range(2))
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = PlainLabelEmbedder(num_classes + 1, width)
        self.final_layer = FinalLayer(width, channels * self.patch**2, activated=False)
        kind = {"norm": RMSNorm, "mlp": FeedForward, "qk_norm": RMSNorm, "bias": False, "activated": False}
        self.blocks = nn.ModuleList(Block(width, heads, **kind) for _ in range(depth))

    def forward(self, x, t, y):
        size = x.shape[-2:]
        x = F.unfold(x, self.patch, stride=self.patch).transpose(1, 2)
        t, y = self.t_embedder(t).unsqueeze(1), self.y_embedder(y).unsqueeze(1)
        s, c = self.s_embedder(x), F.silu(t + y)
        for block in self.blocks[: self.encoder_depth]:
            s = block(s, c)
        s = F.silu(t + s)
        x = self.x_embedder(x)
        for block in self.blocks[self.encoder_depth :]:
            x = block(x, s)
        return F.fold(self.final_layer(x, s).transpose(1, 2), size, self.patch, stride=self.patch)


class RaeDDT(nn.Module):
    """RAE's `DiTwDDTHead`: a deep encoder of the condition, and a shallow and wide decoder."""

    def __init__(self, widths=(32, 48), depths=(2, 1), heads=2, channels=8, num_classes=10):
        super().__init__()
        self.encoder_depth = depths[0]
        self.x_embedder, self.s_embedder = PatchEmbed(channels, widths[1], 1), PatchEmbed(channels, widths[0], 1)
        self.s_projector = nn.Linear(*widths)
        self.t_embedder = TimestepEmbedder(widths[0])
        self.y_embedder = LabelEmbedder(num_classes, widths[0], dropout_prob=0.1)
        self.final_layer = FinalLayer(widths[1], channels, norm=RMSNorm)
        all_widths = [width for width, depth in zip(widths, depths, strict=True) for _ in range(depth)]
        kind = {"norm": RMSNorm, "mlp": SwiGLUFFN, "qk_norm": RMSNorm}
        self.blocks = nn.ModuleList(Block(width, heads, **kind) for width in all_widths)

    def forward(self, x, t, y):
        t, y = self.t_embedder(t), self.y_embedder(y, self.training)
        s, c = self.s_embedder(x), F.silu(t + y)
        for block in self.blocks[: self.encoder_depth]:
            s = block(s, c)
        s = self.s_projector(F.silu(t.unsqueeze(1) + s))
        out = self.x_embedder(x)
        for block in self.blocks[self.encoder_depth :]:
            out = block(out, s)
        return self.final_layer(out, s).transpose(1, 2).unflatten(-1, x.shape[-2:])


def _positions(width, side):
    """(1, side · side, width): sines and cosines of the column in the first half, of the row in the second."""
    frequencies = 10000.0 ** -(torch.arange(width // 4, dtype=torch.float64) / (width / 4))
    rows, columns = torch.meshgrid(*[torch.arange(side, dtype=torch.float64)] * 2, indexing="ij")
    parts = [place.reshape(-1, 1) * frequencies for place in (columns, rows)]
    return torch.cat([part for angle in parts for part in (angle.sin(), angle.cos())], dim=1).float().unsqueeze(0)


MODELS = {"DiT": DiT, "SiT": SiT, "REPA": Repa, "LightningDiT": LightningDiT, "DDT": DDT, "RAE": RaeDDT}


def make_model(name: str, seed: int = 0, **settings) -> nn.Module:
    torch.manual_seed(seed)
    return MODELS[name](**settings).eval()


def inputs_of(name: str, batch: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x, t, y)."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 8 if name == "RAE" else 4, 8, 8, generator=generator)
    return x, torch.rand(batch, generator=generator), torch.arange(batch) % 3


def output_of(model: nn.Module, inputs) -> torch.Tensor:
    out = model(*inputs)
    return out[0] if isinstance(out, tuple) else out
