"""The full size: a randomly initialised stand-in for facebook/DiT-XL-2-256, with equal embeddings as it has."""

import pytest
import torch
from tiny_models import randomize

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    count_trainable,
    inject_adapter,
    load_adapter,
    read_adapter,
    save_adapter,
    unload_adapter,
)
from onelora_diffusion.diffusion import training_losses


@pytest.fixture(scope="module")
def dit_xl_2():
    from diffusers import DiTTransformer2DModel

    with torch.device("meta"):
        model = DiTTransformer2DModel(out_channels=8)
    model = model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(1 << 20, generator=generator).mul_(0.02)
    with torch.no_grad():
        for parameter in model.parameters():
            flat = parameter.view(-1)
            flat.copy_(noise.repeat(-(-flat.numel() // noise.numel()))[: flat.numel()])
        model.pos_embed.pos_embed.copy_(noise[: 256 * 1152].view(1, 256, 1152))
        first = model.transformer_blocks[0].norm1.emb.state_dict()
        for block in model.transformer_blocks[1:]:
            block.norm1.emb.load_state_dict(first)
    return model.eval()


def test_one_training_step_and_the_file_of_603_680_weights(dit_xl_2, tmp_path):
    from diffusers import DDIMScheduler

    generator = torch.Generator().manual_seed(1)
    x_start, noise = torch.randn(2, 1, 4, 32, 32, generator=generator)
    timesteps, class_labels = torch.tensor([500]), torch.tensor([42])
    scheduler = DDIMScheduler(clip_sample=False)
    model = randomize(inject_adapter(dit_xl_2, AdapterConfig(num_classes=101)), scale=0.01)
    assert count_trainable(model) == 603_680

    model.enable_gradient_checkpointing()
    noisy = scheduler.add_noise(x_start, noise, timesteps)
    output = model(noisy, timesteps, class_labels).sample
    training_losses(output, x_start, noise, timesteps, scheduler)["loss"].mean().backward()
    trained = adapter_state_dict(model)
    assert all(torch.isfinite(p.grad).all() and p.grad.any() for p in trained.values())
    torch.optim.AdamW(trained.values(), lr=1e-3).step()

    path = save_adapter(model, tmp_path)
    assert sum(tensor.numel() for tensor in read_adapter(path).tensors.values()) == 603_680
    with torch.no_grad():
        expected = model(noisy, timesteps, class_labels).sample
        base = unload_adapter(model)
        assert not torch.equal(base(noisy, timesteps, class_labels).sample, expected)
        assert torch.equal(load_adapter(base, path)(noisy, timesteps, class_labels).sample, expected)
