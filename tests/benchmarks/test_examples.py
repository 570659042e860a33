"""Training beside the loops of diffusers' examples, at a small width."""

import json

import torch

from benchmarks.examples import Example, ExamplesSettings, examples, loops_of, make_base
from onelora_diffusion.denoisers import denoiser_of

SMALL = {"size": 0.125, "images": 2, "resolution": 32, "rounds": 1, "precision": "fp32", "ranks": (4,)}


def test_the_tables_say_what_each_loop_costs(tmp_path, capsys):
    settings = ExamplesSettings(bases=("sd3", "sdxl"), output_dir=tmp_path, threads=torch.get_num_threads(), **SMALL)
    rows = {(row["base"], row["loop"]): row for row in examples(settings)["rows"]}
    assert [loop for base, loop in rows if base == "sdxl"] == ["1LoRA", "example, LoRA r=4"]
    assert [loop for base, loop in rows if base == "sd3"][2] == "example, LoRA r=4, --cache_latents"
    ours, plain, cached = (row for (base, _), row in rows.items() if base == "sd3")
    assert plain["saved_bytes"] == cached["saved_bytes"] > 0 and ours["saved_bytes"] > 0
    # joint attention of two blocks: q, k, v and an output of both streams, but for the last one's context
    width = 4 * 64
    assert plain["num_trainable_params"] == 4 * (2 * width) * (8 + 7)
    kept = sum(p.numel() for p in make_base("sd3", torch.float32, SMALL["size"]).vae.parameters()) * 4
    moments = 2 * 32 * 4 * 4 * 4  # of two images, mean and deviation of 16 channels in float32
    assert plain["resident_bytes"] - cached["resident_bytes"] == kept - moments
    assert "### SD3.5" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "examples.json").read_text())["rows"]) == 5


def test_the_examples_predict_what_the_stock_pipeline_does(tmp_path):
    """An example's own way of calling FLUX.1 is that of its pipeline."""
    pipeline = make_base("flux", torch.float32, SMALL["size"])
    loop = loops_of("flux", pipeline, ExamplesSettings(**SMALL))["example, LoRA r=4"]
    assert isinstance(loop, Example)
    loop.prepare()
    calls = []
    hook = denoiser_of(pipeline).register_forward_hook(
        lambda module, args, kwargs, output: calls.append((kwargs, output[0])), with_kwargs=True
    )
    prompt = {"prompt_embeds": loop.encoded[0], "pooled_prompt_embeds": loop.encoded[1]}
    pipeline(**prompt, height=32, width=32, num_inference_steps=1, output_type="latent")
    hook.remove()
    (given, output), scale = calls[0], pipeline.vae_scale_factor
    noisy = pipeline._unpack_latents(given["hidden_states"], 32, 32, scale)
    expected = pipeline._unpack_latents(output, 32, 32, scale)
    with torch.no_grad():
        found = loop.predict(noisy, given["timestep"] * 1000, loop.encoded)
    assert torch.allclose(found, expected, atol=1e-4 * float(expected.abs().max()))
