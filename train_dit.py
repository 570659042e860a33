"""Train an adapter on a frozen diffusion transformer (DiT).

    python train_dit.py                                    # the embedded job: minutes on two cores, no network
    python train_dit.py --dataset food101 --data-root data --download
    python train_dit.py --dataset imagefolder --data-root photos --max-train-time 2h
    python train_dit.py --config configs/food101.yaml --learning-rate 3e-3   # flags override the recipe
    accelerate launch --num_processes 2 train_dit.py --dataset food101       # two GPUs
    accelerate launch --num_processes 2 --cpu train_dit.py                   # two processes on CPUs

The same command again resumes a run that was interrupted. `--dataset NAME --help` shows that data set's recipe.
"""

import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from onelora_diffusion import inject_adapter
from onelora_diffusion.command_line import one_line_errors, quieten
from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.identity import data_identity
from onelora_diffusion.data.latent_cache import LatentCache, build_cache, cache_size
from onelora_diffusion.data.latents import FlippableImages
from onelora_diffusion.data.listing import describe
from onelora_diffusion.families.dit import DiT
from onelora_diffusion.families.family import Prompts
from onelora_diffusion.launch import start_all_processes, started
from onelora_diffusion.pipelines.base import load_base, resolution_of
from onelora_diffusion.processes import among_sharers, first_on_each_machine
from onelora_diffusion.training.loop import start
from onelora_diffusion.training.samples import sample_grid
from onelora_diffusion.training.settings import Settings, parse_command_line
from onelora_diffusion.training.stopping import Stop

RECIPES = Path(__file__).parent / "configs"


class ClassTask:
    """A DiT that learns the classes of a data set."""

    def __init__(self, settings: Settings, accelerator: Accelerator):
        self.settings, self.accelerator = settings, accelerator
        self.pipeline = load_base(settings.base)
        transformer = self.pipeline.transformer
        with first_on_each_machine(accelerator) if settings.download else nullcontext():
            self.dataset = load_dataset(
                settings.dataset,
                settings.data_root,
                "train",
                resolution_of(self.pipeline),
                download=settings.download,
                broken=settings.broken_images,
                image_column=settings.image_column,
                label_column=settings.label_column,
            )
        accelerator.print(describe(self.dataset))
        self.data = data_identity(self.dataset)
        if settings.method != "full" and settings.mixed_precision != "no":
            # The frozen base is kept in the precision it computes in: autocast would cast it anew at every product.
            transformer.to(torch.float16 if settings.mixed_precision == "fp16" else torch.bfloat16)
        inject_adapter(transformer, settings.adapter_config(self.dataset.num_classes))
        self.pipeline.to(accelerator.device)

        self.described = f"{settings.dataset}: {len(self.dataset):,} images of {self.dataset.num_classes} classes"
        self.facts, self.id2label = {"dataset": settings.dataset}, self.dataset.id2label
        self.family, self.label_drop = DiT(), settings.label_drop

    def examples(self, stop: Stop) -> tuple[Dataset, bool, None]:
        """`[index, flip] -> (image, label)`, or moments for the image, encoded once if they fit; and which it is."""
        settings, config = self.settings, self.pipeline.transformer.config
        images = FlippableImages(self.dataset)
        size = cache_size(len(self.dataset), settings.flip, (config.in_channels, *[config.sample_size] * 2))
        if size > settings.latent_cache_gb * 1e9:
            return images, False, None
        parent = settings.latent_cache or settings.output_dir.parent / "latents"
        number, sharers = among_sharers(parent, self.accelerator)
        folder = build_cache(
            parent,
            self.dataset,
            self.pipeline.vae,
            settings.flip,
            process_index=number,
            num_processes=sharers,
            num_workers=settings.num_workers,
            is_stopped=stop.asked,
            report=tqdm.write,
        )
        if stop.agreed():  # the cache may be half done, and there is no step to come
            return images, False, None
        return LatentCache(folder, len(self.dataset)), True, None

    def prompts(self, labels: Tensor, drops: Tensor) -> Prompts:
        return {"class_labels": torch.where(drops, self.dataset.num_classes, labels)}  # the null label is the last

    def evaluation(self):
        if not self.settings.eval_every:
            return None
        from onelora_diffusion.training.evaluating import Evaluation

        return Evaluation(self.settings, self.accelerator, self.pipeline, self.dataset)

    def sample_grid(self, is_stopped) -> bytes | None:
        return sample_grid(self.pipeline, self.dataset.id2label, self.settings, is_stopped)

    def export(self, folder: Path) -> None:
        pass


def main(settings: Settings, since: float | None = None) -> int:
    """Trains, or says in one line why not; returns the exit code. The budget counts since that `time.monotonic()`."""
    return start(settings, ClassTask, since)


if __name__ == "__main__":
    start_all_processes()
    quieten()
    with one_line_errors("train_dit.py", same_everywhere=True):
        chosen = parse_command_line(sys.argv[1:], RECIPES)
    sys.exit(main(chosen, started()))
