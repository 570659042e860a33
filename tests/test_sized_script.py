"""train_text_to_image.py and sample.py on a base of which prompts are encoded for a size, and another model guides."""

import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from rounding import rounding_of_images
from safetensors.torch import load_file
from tiny_models import make_pipeline

from onelora_diffusion import OneLoRALoaderMixin
from onelora_diffusion.cli import sample
from onelora_diffusion.cli.train_text_to_image import main
from onelora_diffusion.training.prompt_settings import PromptSettings

pytestmark = pytest.mark.usefixtures("fresh_accelerate")
SIDE, LENGTH = 16, 96


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "ideogram4"
    make_pipeline("ideogram4").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def shapes(tmp_path_factory):
    """Pictures of two shapes with their captions."""
    folder = tmp_path_factory.mktemp("shapes")
    for name, size in {"red": (20, 20), "green": (20, 20), "a blue one": (48, 12), "grey": (48, 12)}.items():
        Image.new("RGB", size, name.split()[-2] if " " in name else name).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(name)
    return folder


def run(base, shapes, output, **changes):
    own = dict(base=str(base), base_precision="fp32", images=str(shapes), output_dir=output, resolution=SIDE)
    own |= dict(max_sequence_length=LENGTH, max_steps=4, batch_size=2, log_every=1, checkpoint_every=2)
    own |= dict(aspect_buckets=True, prior_weight=0.5, validation_prompt=("red",), sample_every=4, sample_steps=2)
    assert main(PromptSettings(**own | dict(learning_rate=0.05) | changes)) == 0
    return output


def losses_of(output):
    return [json.loads(line)["loss"] for line in (output / "metrics.jsonl").read_text().splitlines()]


def draw(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    asked = dict(height=SIDE, width=SIDE, num_inference_steps=3, output_type="pt", max_sequence_length=LENGTH)
    return pipeline("red", guidance_scale=3.0, guidance_schedule=None, generator=generator, **asked).images


def test_shapes_are_learned_resumed_bit_for_bit_and_drawn_by_the_stock_pipeline(base, shapes, tmp_path):
    whole = run(base, shapes, tmp_path / "whole", export_lora=())
    halves = run(base, shapes, tmp_path / "halves", max_steps=2)
    assert halves == run(base, shapes, tmp_path / "halves")
    assert losses_of(whole) == losses_of(halves)
    adapter = load_file(whole / "onelora_weights.safetensors")
    assert adapter and all(tensor.any() for tensor in adapter.values())
    for key, tensor in load_file(halves / "onelora_weights.safetensors").items():
        assert torch.equal(tensor, adapter[key]), key
    assert list((whole / "samples").glob("*.png"))

    pipeline = OneLoRALoaderMixin.from_pipe(DiffusionPipeline.from_pretrained(base))
    by_base = draw(pipeline)
    pipeline.load_lora_weights(whole)
    adapted = draw(pipeline)
    assert (adapted - by_base).abs().mean() > 1e-3
    stock = DiffusionPipeline.from_pretrained(base)
    stock.load_lora_weights(whole / "lora")
    torch.testing.assert_close(draw(stock), adapted, rtol=0, atol=3 * rounding_of_images(pipeline, 3))

    asked = ["--adapter", str(whole), "--prompts", "red", "--mixed-precision", "no", "--guidance-scale", "3"]
    sample.run([*asked, "--num-inference-steps", "3", "--output", str(tmp_path / "drawn")])
    drawn = [np.array(Image.open(path)) for path in (tmp_path / "drawn").glob("*.png")]
    assert drawn and all(pixels.shape == (SIDE, SIDE, 3) for pixels in drawn)


def test_dropped_captions_have_nothing_to_train(base, shapes, tmp_path):
    with pytest.raises(
        SystemExit, match="Ideogram4 is guided by another model, which is not trained: leave --caption"
    ):
        run(base, shapes, tmp_path / "run", caption_drop=0.1)
    assert not (tmp_path / "run").exists()
