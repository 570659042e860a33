"""The other architectures of the paper, small and random: no DiT code stands in their way."""

import pytest
import torch
from rounding import assert_rounded
from tiny_models import randomize, unet

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    combine_adapters,
    count_trainable,
    inject_adapter,
    load_adapter,
    merge_adapter,
    save_adapter,
    unload_adapter,
    unmerge_adapter,
)
from onelora_diffusion.injection import layers
from onelora_diffusion.injection.layers import target_layers


def llama():
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=50)).eval(), {"input_ids": torch.arange(12).view(2, 6)}


def vit():
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = ViTForImageClassification(ViTConfig(**sizes, image_size=8, patch_size=4, num_labels=3)).eval()
    return model, {"pixel_values": torch.randn(2, 3, 8, 8)}


def depth_anything():
    from transformers import DepthAnythingConfig, DepthAnythingForDepthEstimation, Dinov2Config

    torch.manual_seed(0)
    backbone = Dinov2Config(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=28,
        patch_size=14,
        out_features=["stage1", "stage2", "stage3", "stage4"],
        reshape_hidden_states=False,
    )
    config = DepthAnythingConfig(
        backbone_config=backbone,
        reassemble_hidden_size=32,
        neck_hidden_sizes=[8, 8, 8, 8],
        fusion_hidden_size=8,
        head_hidden_size=8,
        patch_size=14,
    )
    model = DepthAnythingForDepthEstimation(config).eval()
    for parameter in model.parameters():  # its own start gives depths of 1e-9
        torch.nn.init.normal_(parameter.data, std=0.2)
    return model, {"pixel_values": torch.randn(2, 3, 28, 28)}


MODELS = {"llama": llama, "vit": vit, "depth_anything": depth_anything}


def output(model, inputs):
    out = model(**inputs)
    return out.predicted_depth if hasattr(out, "predicted_depth") else out.logits


@pytest.mark.parametrize("method", ["1lora", "difffit", "mora6", "dora", "full"])
@pytest.mark.parametrize("name", MODELS)
def test_inject_train_save_load_merge_unmerge(name, method, tmp_path):
    model, inputs = MODELS[name]()
    base = output(model, inputs)
    names = [name for name, _ in model.named_parameters()]
    inject_adapter(model, AdapterConfig(method))
    assert_rounded(output(model, inputs), base, model)

    own = adapter_state_dict(model)
    assert {id(p) for p in own.values()} == {id(p) for p in model.parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(own.values(), lr=0.01)
    output(model, inputs).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        trained = output(model, inputs)
        assert not torch.allclose(trained, base)
        path = save_adapter(model, tmp_path)
        assert torch.equal(output(load_adapter(MODELS[name]()[0], path), inputs), trained)
        merge_adapter(model)
        assert_rounded(output(model, inputs), trained, model)
        unmerge_adapter(model)
        assert torch.equal(output(model, inputs), trained)
        unload_adapter(model)
        assert torch.equal(output(model, inputs), base)
    assert [name for name, _ in model.named_parameters()] == names


def test_the_output_head_is_no_target():
    """LLaMA: q, k, v, o of 32, two of 48, one of 32, twice; ViT: q, k, v, out of 32, 48 and 32, twice."""
    model, _ = llama()
    assert count_trainable(inject_adapter(model, AdapterConfig())) == 2 * (5 * 32 + 2 * 48)
    model, _ = vit()
    assert count_trainable(inject_adapter(model, AdapterConfig())) == 2 * (5 * 32 + 48)
    assert not [name for name in adapter_state_dict(model) if "classifier" in name]


def test_targets_are_the_linear_layers_of_repeated_blocks_and_old_files_keep_their_own(tmp_path, monkeypatch):
    """Of a UNet with a transformer block at each of four places: q, k, v, out, twice, and a gated MLP of two."""
    model, _ = unet()
    inside = set(target_layers(model, None))
    assert len(inside) == 4 * (2 * 4 + 2) and all(".transformer_blocks.0." in path for path in inside)
    with monkeypatch.context() as before:
        before.setattr(layers, "repeated_blocks", lambda model: ())  # all but the head, as in old files
        path = save_adapter(randomize(inject_adapter(model, AdapterConfig())), tmp_path)
    other = load_adapter(unet()[0], path)
    loaded = adapter_state_dict(other)
    assert len(loaded) > len(inside)
    combine_adapters(other, ["default"], [-1.0], adapter_name="negated")
    for key, tensor in adapter_state_dict(other, "negated").items():
        assert torch.equal(tensor, -loaded[key])
    assert adapter_state_dict(other, "negated").keys() == loaded.keys()
    for key, tensor in adapter_state_dict(model).items():
        assert torch.equal(loaded[key], tensor), key


def test_targets_of_a_model_that_is_not_of_diffusers_are_all_but_its_head():
    model = torch.nn.Module()
    model.embed, model.head = torch.nn.Linear(2, 3), torch.nn.Linear(3, 2)
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)])
    assert set(target_layers(model, None)) == {"embed", "blocks.0", "blocks.1"}


def test_norms_of_llama():
    model, inputs = llama()
    inject_adapter(model, AdapterConfig(norms=True))
    norms = [name for name in adapter_state_dict(model) if "norm" in name]
    assert len(norms) == 2 * 2 + 1
    output(randomize(model), inputs).sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter_state_dict(model).values())


def test_full_keeps_tied_weights_tied(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    def tied():
        torch.manual_seed(0)
        sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
        return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=20, tie_word_embeddings=True)).eval()

    model = randomize(inject_adapter(tied(), AdapterConfig("full")))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert count_trainable(model) == sum(p.numel() for p in tied().parameters())
    inputs = {"input_ids": torch.arange(5).unsqueeze(0)}
    loaded = load_adapter(tied(), save_adapter(model, tmp_path))
    assert torch.equal(output(loaded, inputs), output(model, inputs))
    unload_adapter(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_what_only_a_dit_has():
    with pytest.raises(ValueError, match="LlamaForCausalLM has no class .* its tables are model.embed_tokens"):
        inject_adapter(llama()[0], AdapterConfig(num_classes=3))
    with pytest.raises(ValueError, match="fuse_qkv goes with DiTTransformer2DModel, not with LlamaForCausalLM"):
        inject_adapter(llama()[0], AdapterConfig(fuse_qkv=True))
