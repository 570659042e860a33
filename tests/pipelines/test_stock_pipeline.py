"""diffusers' own DiTPipeline around an adapted transformer."""

import torch
from tiny_models import make_dit, make_dit_pipeline, randomize

from onelora_diffusion import AdapterConfig, disable_adapter, inject_adapter


def run(pipeline, class_labels):
    generator = torch.Generator().manual_seed(0)
    settings = {"guidance_scale": 4.0, "num_inference_steps": 3, "output_type": "np"}
    return torch.from_numpy(pipeline(class_labels, generator=generator, **settings).images)


def test_guidance_on_a_101_class_adapter():
    """The pipeline's own null label, 1000, lies far past the 101 classes; guidance must reach the null row."""
    model = randomize(inject_adapter(make_dit(num_classes=1000), AdapterConfig(num_classes=101)))
    pipeline = make_dit_pipeline(model)
    images = run(pipeline, [0, 100])
    assert images.shape == (2, 16, 16, 3) and torch.isfinite(images).all()

    table = model._onelora.adapters["default"]["class_embedding"].weight
    with torch.no_grad():
        table[-1] += 1  # guidance reads the adapter's null row
    assert not torch.allclose(run(pipeline, [0, 100]), images)


def test_without_the_adapter_it_is_the_base():
    expected = run(make_dit_pipeline(make_dit(num_classes=1000)), [0, 999])
    model = randomize(inject_adapter(make_dit(num_classes=1000), AdapterConfig(num_classes=101)))
    with disable_adapter(model):
        assert torch.equal(run(make_dit_pipeline(model), [0, 999]), expected)


def test_a_pipeline_saved_with_an_adapter_attached_is_the_clean_base(tmp_path):
    from diffusers import DiTPipeline

    expected = run(make_dit_pipeline(make_dit(num_classes=1000)), [0, 999])
    model = randomize(inject_adapter(make_dit(num_classes=1000), AdapterConfig(num_classes=101)))
    make_dit_pipeline(model).save_pretrained(tmp_path)
    loaded = DiTPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, [0, 999]), expected)
