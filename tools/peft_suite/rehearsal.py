"""The comparison of images, from written files to two numbers, on a random pipeline of the same classes.

The order is the comparison's: its adapter by PEFT, flow matching at uniform times on a few pictures of one subject,
the cosine similarity of pictures drawn of held-out prompts with held-out pictures, and drift, (1 - cosine similarity)
/ 2 of pictures with and without the adapter from the same noise. Similarities are of class tokens of a small random
Dinov2Model, which is not DINOv2.
"""

import json
import sys
from pathlib import Path

import torch
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import normalize

from onelora_diffusion import list_adapters, load_adapter
from onelora_diffusion.data.digits import Digits
from onelora_diffusion.diffusion import add_noise, model_timesteps, training_losses
from onelora_diffusion.families.recorded import Recorded

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))  # where the small pipelines are made
from tiny_models import make_pipeline

SIDE, PICTURES, HELD_OUT, STEPS, BATCH = 32, 6, 2, 750, 2
PROMPTS = [f"sks digit, picture {number}" for number in range(PICTURES + HELD_OUT)]
UNRELATED = ["a photo of the Eiffel tower", "an astronaut riding a horse"]


def rehearse(experiment: Path, output: Path, steps: int = STEPS) -> dict[str, float]:
    """Train with an experiment's files, save the adapter in a folder, and return what was found, by name."""
    images = torch.stack([Digits(resolution=SIDE, classes=(3,))[number][0] for number in range(len(PROMPTS))])
    pipeline, features = make_pipeline("flux2_klein"), random_features()
    found = train(pipeline, images[:PICTURES], experiment, steps)
    pipeline.transformer.save_pretrained(output)

    held_out, unrelated = draw(pipeline, PROMPTS[PICTURES:]), draw(pipeline, UNRELATED)
    with pipeline.transformer.disable_adapter():
        base = draw(pipeline, UNRELATED)
    similarity = (features(held_out) * features((images[PICTURES:] + 1) / 2)).sum(-1).mean()
    found["similarity by random features"] = float(similarity)
    found["largest change of pictures"] = float((unrelated - base).abs().max())
    found["drift by random features"] = float(1 - (features(unrelated) * features(base)).sum(-1).mean()) / 2

    here = make_pipeline("flux2_klein")
    load_adapter(here.transformer, output)
    (row,) = list_adapters(here.transformer)
    difference = (draw(here, PROMPTS[PICTURES:]) - held_out).abs().max()
    return found | {f"difference of pictures, read here as {row.method}": float(difference)}


def train(pipeline, images: Tensor, experiment: Path, steps: int) -> dict[str, float]:
    """Put the experiment's adapter into a pipeline and train it on pictures (n, 3, SIDE, SIDE) from -1 to 1.

    Returns the number of trained numbers, and the loss before and after over the same times and noise.
    """
    params = json.loads((experiment / "training_params.json").read_text())
    family, scheduler = Recorded(pipeline), pipeline.scheduler
    prompts = family.encode_conditions(pipeline, PROMPTS[: len(images)])
    latents = family.encode_images(pipeline.vae, images)[:, 0]
    model = pipeline.transformer = get_peft_model(pipeline.transformer, PeftConfig.from_pretrained(experiment))
    optimizer = torch.optim.AdamW(model.parameters(), **params["optimizer_kwargs"])

    def loss(rows: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(latents[rows].shape, generator=generator)
        times = torch.randint(scheduler.config.num_train_timesteps, (len(rows),), generator=generator)
        noisy, given = (
            add_noise(latents[rows], noise, times, scheduler),
            {name: p[rows] for name, p in prompts.items()},
        )
        output = family.predict(model, noisy, model_timesteps(times, scheduler), given)
        return training_losses(output, latents[rows], noise, times, scheduler)["loss"].mean()

    def measured() -> float:
        with torch.no_grad():
            return float(loss(torch.arange(16 * len(images)) % len(images), torch.Generator().manual_seed(1)))

    before, generator = measured(), torch.Generator().manual_seed(0)
    for _ in range(steps):
        loss(torch.randperm(len(images), generator=generator)[:BATCH], generator).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return {
        "trained numbers": model.get_nb_trainable_parameters()[0],
        "loss before": before,
        "loss after": measured(),
    }


@torch.no_grad()
def draw(pipeline, prompts: list[str]) -> Tensor:
    """Pictures of prompts from seed 0, (len(prompts), 3, SIDE, SIDE), from 0 to 1."""
    settings = {"height": SIDE, "width": SIDE, "num_inference_steps": 4, "guidance_scale": 3.5}
    generator = torch.Generator().manual_seed(0)
    return pipeline(prompt=prompts, generator=generator, output_type="pt", **settings).images


def random_features():
    """A function from pictures (n, 3, SIDE, SIDE) to normalised class tokens of a random network, (n, 16)."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    sizes = {"image_size": SIDE, "patch_size": 8, "hidden_size": 16, "initializer_range": 1.0}
    network = Dinov2Model(Dinov2Config(**sizes, num_hidden_layers=2, num_attention_heads=2)).eval()

    @torch.no_grad()
    def features(pictures: Tensor) -> Tensor:
        return normalize(network(pictures).last_hidden_state[:, 0], dim=-1)

    return features
