"""Train an adapter on a frozen text-to-image transformer: PixArt-Σ, Stable Diffusion 3, FLUX.1 or SANA.

    python train_text_to_image.py                          # the embedded job: minutes on two cores, no network
    python train_text_to_image.py --base stabilityai/stable-diffusion-3.5-medium --images dog --prompt "a sks dog"
    python train_text_to_image.py --base black-forest-labs/FLUX.1-dev --base-precision nf4 --gradient-checkpointing \\
        --images signs --resolution 512 --validation-prompt "a bold Q" "a violet triangle"
    python train_text_to_image.py --config signs.yaml --learning-rate 2e-3   # flags override the recipe
    accelerate launch --num_processes 2 train_text_to_image.py --base ... --images hf:NAME --caption-column text

Images and captions are encoded once, to disk; then the text encoders leave memory, and the autoencoder leaves the
GPU. The same command again resumes a run that was interrupted.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from onelora_diffusion import adapter_state_dict, disable_adapter, export_lora, inject_adapter
from onelora_diffusion.command_line import one_line_errors, quieten
from onelora_diffusion.data.captions import load_captioned
from onelora_diffusion.data.identity import data_identity
from onelora_diffusion.data.latent_cache import LatentCache, build_cache
from onelora_diffusion.data.listing import describe
from onelora_diffusion.data.prompt_cache import PromptCache, build_prompt_cache, identity_of
from onelora_diffusion.families import Prompts, family_named, family_of
from onelora_diffusion.launch import start_all_processes, started
from onelora_diffusion.pipelines.base import load_text_to_image
from onelora_diffusion.processes import among_sharers
from onelora_diffusion.sampling import draw_prompt, image_generators
from onelora_diffusion.storage.lora import lora_pairs
from onelora_diffusion.training.loop import start
from onelora_diffusion.training.prompt_settings import PromptSettings, parse_command_line
from onelora_diffusion.training.samples import png_of
from onelora_diffusion.training.stopping import Stop

EMBEDDED = Path(__file__).parent / "configs" / "digit_words.yaml"


class PromptTask:
    """A text-to-image transformer that learns images by their captions."""

    id2label = None

    def __init__(self, settings: PromptSettings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.pipeline = load_text_to_image(settings.base, settings.base_precision, family_named)
        self.family = family_of(self.pipeline)
        self.resolution = settings.resolution or self.family.resolution(self.pipeline)
        self.family.check_resolution(self.pipeline, self.resolution)
        self.captioned = load_captioned(
            settings.images,
            settings.prompt,
            settings.image_column,
            settings.caption_column,
            self.resolution,
            settings.aspect_buckets,
            multiple=self.family.multiple(self.pipeline),
            broken=settings.broken_images,
        )
        self.dataset = self.captioned.dataset
        accelerator.print(describe(self.dataset))
        self.data = data_identity(self.dataset, self.captioned.captions)
        inject_adapter(self.pipeline.transformer, settings.adapter_config(targets=self.family.targets))
        for tensor in adapter_state_dict(self.pipeline.transformer).values():
            tensor.data = tensor.to(accelerator.device)  # the base follows when the encoders have left
        if settings.export_lora:
            lora_pairs(self.pipeline.transformer, "default")  # an error now, where it cannot be one

        self.described = f"{self.dataset.name}: {len(self.dataset):,} images"
        self.facts = {
            "dataset": self.dataset.name,
            "family": self.family.name,
            "prompt": settings.prompt,
            "base_precision": settings.base_precision,
            "resolution": self.resolution,
            "max_sequence_length": settings.max_sequence_length,
        }
        default = 0.1 if self.family.is_guided else 0.0
        self.label_drop = default if settings.caption_drop is None else settings.caption_drop
        self.base_pictures: Tensor | None = None

    def examples(self, stop: Stop) -> tuple[Dataset, bool, np.ndarray]:
        """`[index, flip] -> (moments, number of the caption)`, encoded once. What encodes them leaves memory then."""
        settings, pipeline, device = self.settings, self.pipeline, self.accelerator.device
        parent = settings.latent_cache or settings.output_dir.parent / "latents"
        number, sharers = among_sharers(parent, self.accelerator)
        share = {
            "process_index": number,
            "num_processes": sharers,
            "is_stopped": stop.asked,
            "report": tqdm.write,
        }
        encoders = {name: part for name, part in pipeline.components.items() if name.startswith("text_encoder")}
        tokenizers = {name: part for name, part in pipeline.components.items() if name.startswith("tokenizer")}
        identity = identity_of(encoders | tokenizers)
        for encoder in encoders.values():
            if encoder is not None:
                encoder.to(device)
        # Other prompts to look at leave what is learned where it is.
        all_prompts = (self.captioned.captions, list(settings.validation_prompt))
        folders = [
            build_prompt_cache(
                parent,
                prompts,
                lambda prompts: self.family.encode_prompts(pipeline, prompts, settings.max_sequence_length),
                identity,
                f"{self.family.name}, {settings.max_sequence_length or 'all'} tokens",
                **share,
            )
            for prompts in all_prompts
        ]
        pipeline.register_modules(**dict.fromkeys(encoders))
        dtype = pipeline.vae.dtype
        pipeline.vae.to(device, torch.float32)  # once, and for all steps
        latents = build_cache(
            parent, self.dataset, pipeline.vae, settings.flip, num_workers=settings.num_workers, **share
        )
        pipeline.vae.to("cpu", dtype)
        pipeline.transformer.to(device)
        buckets = self.captioned.buckets
        if stop.agreed():  # the caches may be half done, and there is no step to come
            return self.captioned, False, buckets.of_image
        self.learned, self.looked_at = map(PromptCache, folders, all_prompts)
        return LatentCache(latents, len(self.dataset), buckets), True, buckets.of_image

    def prompts(self, captions: Tensor, drops: Tensor) -> Prompts:
        return self.learned.embeddings(captions, drops)

    def evaluation(self) -> None:
        return None

    def sample_grid(self, is_stopped) -> bytes | None:
        """The base's pictures of --validation-prompt, and the adapter's of the same noise below them."""
        settings, pipeline, device = self.settings, self.pipeline, self.accelerator.device
        count = len(settings.validation_prompt)
        kept, dropped = torch.tensor([False]), torch.tensor([True])
        if not count:
            return None

        def draw() -> Tensor | None:
            pictures = []
            empty = send_to_device(self.looked_at.embeddings(torch.tensor([0]), dropped), device)
            for number in range(count):
                prompt = send_to_device(self.looked_at.embeddings(torch.tensor([number]), kept), device)
                (generator,) = image_generators(settings.seed, [number])
                picture = draw_prompt(
                    pipeline,
                    self.family,
                    prompt,
                    empty,
                    generator,
                    self.resolution,
                    num_inference_steps=settings.sample_steps,
                    guidance_scale=settings.guidance_scale,
                )
                pictures.append(picture.cpu())
                if is_stopped():
                    return None
            return torch.stack(pictures)

        pipeline.set_progress_bar_config(disable=True)
        pipeline.vae.to(device)
        try:
            if self.base_pictures is None:
                with disable_adapter(pipeline.transformer):
                    self.base_pictures = draw()
            pictures = None if self.base_pictures is None else draw()
        finally:
            pipeline.vae.to("cpu")
        return (
            None if pictures is None else png_of(torch.cat([self.base_pictures, pictures]), settings.validation_prompt)
        )

    def export(self, folder: Path) -> None:
        if self.settings.export_lora:
            export_lora(self.pipeline.transformer, folder / "lora")


def main(settings: PromptSettings, since: float | None = None) -> int:
    """Trains, or says in one line why not; returns the exit code. The budget counts since that `time.monotonic()`."""
    return start(settings, PromptTask, since)


if __name__ == "__main__":
    start_all_processes()
    quieten()
    with one_line_errors("train_text_to_image.py", same_everywhere=True):
        chosen = parse_command_line(sys.argv[1:], EMBEDDED)
    sys.exit(main(chosen, started()))
