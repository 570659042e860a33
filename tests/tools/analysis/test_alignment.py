import copy
import math

import pytest
import torch
from rounding import assert_rounded
from tiny_models import make_dit, randomize
from torch import nn

from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter
from tools.analysis import alignment_by_kind, layer_kind, learned_compressions, plot_alignment
from tools.analysis.alignment import component_alignment


def test_cosines_by_hand():
    """The components of diag(3, 2, 1) are the axes: the sum meets each at 1/√3, the second axis only itself."""
    update = torch.diag(torch.tensor([3.0, 2.0, 1.0]))
    compressions = torch.tensor([[5.0, 5.0, 5.0], [0.0, -4.0, 0.0]])
    singular_values, cosines = component_alignment(update, compressions)
    assert singular_values.tolist() == [3, 2, 1]
    assert_rounded(cosines, torch.tensor([[3**-0.5] * 3, [0.0, 1.0, 0.0]]), terms=3)


def test_squared_cosines_to_a_whole_basis_add_to_one():
    torch.manual_seed(0)
    _, cosines = component_alignment(torch.randn(9, 6), torch.randn(4, 6))
    assert_rounded(cosines.square().sum(1), torch.ones(4), terms=9 * 6)


@pytest.mark.parametrize("method, winner", [("1lora", "summation"), ("1lora-random", "random"), ("lora", "learned")])
@pytest.mark.parametrize("fuse_qkv", [False, True])
def test_an_update_made_of_one_compression_is_aligned_with_it_alone(method, winner, fuse_qkv):
    from onelora_diffusion import merge_adapter

    settings = {"method": "1lora", "compression": "random"} if method == "1lora-random" else {"method": method}
    finetuned = randomize(inject_adapter(make_dit(), AdapterConfig(**settings, fuse_qkv=fuse_qkv, seed=5)))
    lora = inject_adapter(make_dit(), AdapterConfig("lora", fuse_qkv=fuse_qkv)) if method != "lora" else finetuned
    learned = {path: a.clone() for path, a in learned_compressions(adapter_state_dict(lora)).items()}
    for alignment in alignment_by_kind(make_dit(), merge_adapter(finetuned), learned, seed=5):
        # Updates of 0.05 are differences of weights of size 1, which were rounded.
        assert_rounded(alignment.energy[:, 0], torch.ones(len(alignment.energy)), make_dit(), size=1 / 0.05)
        for name, cosines in alignment.cosines.items():
            first = cosines[:, 0]
            assert (first > 0.999).all() if name == winner else (first < 0.7).all()


def test_kinds_of_layers():
    finetuned = randomize(inject_adapter(make_dit(), AdapterConfig("full")))
    alignments = alignment_by_kind(make_dit(), finetuned, num_components=4)
    layers = {alignment.kind: len(alignment.energy) for alignment in alignments}
    attention = {f"attn1.{name}": 2 for name in ("to_q", "to_k", "to_v", "to_out.0")}
    assert layers == {
        "norm1.linear": 2, "ff.net.0.proj": 2, "ff.net.2": 2, "proj_out_1": 1, "proj_out_2": 1, **attention
    }  # fmt: skip
    assert all(alignment.cosines["random"].shape[1] == 4 for alignment in alignments)
    assert layer_kind("model.layers.17.mlp.down_proj") == "mlp.down_proj"


def test_chance_is_what_random_directions_reach():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        for parameter in finetuned.parameters():
            parameter += torch.randn_like(parameter)
    for alignment in alignment_by_kind(base, finetuned, num_components=64):
        assert alignment.chance == math.sqrt(2 / math.pi / 64)
        assert alignment.cosines["summation"].mean().item() == pytest.approx(alignment.chance, rel=0.2)


def test_plot_shows_the_means():
    finetuned = randomize(inject_adapter(make_dit(), AdapterConfig("full")))
    alignments = alignment_by_kind(make_dit(), finetuned)
    panels = plot_alignment(alignments).axes
    assert [panel.get_title() for panel in panels][:1] == ["norm1.linear (× 2)"] and len(panels) == 9
    for panel, alignment in zip(panels, alignments, strict=True):
        lines = {line.get_label(): line.get_ydata() for line in panel.lines}
        assert lines.keys() == {"summation", "random", "by chance"}
        assert_rounded(torch.as_tensor(lines["summation"]), alignment.cosines["summation"].mean(0), terms=2)


def test_errors():
    with pytest.raises(ValueError, match="there is no update to look at"):
        alignment_by_kind(make_dit(), make_dit())
    with pytest.raises(ValueError, match="those of a LoRA adapter of rank 1, and this is none"):
        learned_compressions(adapter_state_dict(inject_adapter(make_dit(), AdapterConfig("lora", rank=2))))
    finetuned = randomize(inject_adapter(make_dit(), AdapterConfig("full")))
    with pytest.raises(ValueError, match="the learned compressions have none for"):
        alignment_by_kind(make_dit(), finetuned, {})
