import json

import pytest
import torch

from benchmarks.generate import PAPER_IMAGES, STOCK, GenerateSettings, generate, make_vae, our_call, paper, stock_call
from benchmarks.peers import make_base
from onelora_diffusion.sampling import IMAGES_AT_ONCE

SMALL = {"width": 32, "heads": 2, "layers": 2, "sample_size": 8, "vae_channels": (8, 8), "num_inference_steps": 2}


def test_both_calls_draw_the_same_images():
    from diffusers import DDIMScheduler, DiTPipeline

    settings = GenerateSettings(**SMALL)
    base = make_base(settings.width, settings.heads, settings.layers, settings.sample_size)
    pipeline = DiTPipeline(base.eval(), make_vae(settings.vae_channels), DDIMScheduler(clip_sample=False))
    pipeline.set_progress_bar_config(disable=True)
    stock = torch.from_numpy(stock_call(pipeline, 2, settings)().images).permute(0, 3, 1, 2)
    ours = torch.cat(our_call(pipeline, 2, None, settings)())
    assert ours.shape == (2, 3, 16, 16) and ours.float().std() > 1
    torch.testing.assert_close(ours / 255, stock, rtol=0, atol=0.6 / 255)  # rounded to a grey level


def test_every_way_is_timed_and_told(tmp_path):
    settings = GenerateSettings(**SMALL, images=(1, 2), images_at_once=3, rounds=1, output_dir=tmp_path)
    results = generate(settings)
    ways = [(row["precision"], row["model"], row["images"], row["at_once"]) for row in results["measured"]]
    assert ways == [
        (precision, model, images, at_once)
        for precision in ("no", "bf16")
        for images in (1, 2)
        for model, at_once in (
            (STOCK, images),
            ("1LoRA, unmerged", images),
            ("1LoRA, merged", images),
            ("1LoRA, merged", 3),
        )
    ]
    for row in results["measured"]:
        assert row["images_per_second"] == pytest.approx(row["images"] / row["seconds"])
    assert json.loads((tmp_path / "generate.json").read_text())["paper"] == results["paper"]
    assert (tmp_path / "generate.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, (tmp_path / "generate.md").read_text().splitlines())) <= 100


def test_on_paper_what_is_bound_by_arithmetic_is_as_fast_as_the_rate():
    """At DiT-XL/2's width, in two layers that stand for 28: a guided step of 64 images is all matrix products."""
    rows = paper(GenerateSettings(sample_size=8))
    seconds = {(row["device"], row["rate"], row["images"]): row["seconds"] for row in rows}
    assert set(PAPER_IMAGES) >= {1, IMAGES_AT_ONCE}
    for device in ("A100", "H100"):
        assert seconds[device, "fp32", 64] == pytest.approx(4 * seconds[device, "fp32", 16], rel=0.1)
        assert seconds[device, "fp32", 64] > seconds[device, "tf32", 64] > seconds[device, "bf16", 64]
        assert 1 < seconds[device, "bf16", 4] / seconds[device, "bf16", 1] < 4  # the weights are read once
