"""The evaluation loop inside training: the distance of generated images to real ones, and the best adapter so far."""

import io
import json
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from onelora_diffusion.evaluation.features import default_features, load_features
from onelora_diffusion.evaluation.frechet import frechet_distance
from onelora_diffusion.evaluation.images import DatasetImages, share
from onelora_diffusion.evaluation.recognition import recognition_of
from onelora_diffusion.evaluation.statistics import FeatureStatistics, Origin, RunningStatistics, load_statistics
from onelora_diffusion.files import write_bytes
from onelora_diffusion.pipelines.base import resolution_of
from onelora_diffusion.sampling import SamplerSettings, generate_images
from onelora_diffusion.training.settings import Settings


class Evaluation:
    """Generates images with the values that the model has, the same noise every time, and measures them.

    Attributes:
        best: the line of metrics of the smallest distance, None before the first.
        best_values: the adapter's values of that line, by name.

    Raises:
        ValueError, FileNotFoundError: features, their weights or the reference are not what they should be.
    """

    def __init__(self, settings: Settings, accelerator: Accelerator, pipeline, dataset):
        self.settings, self.accelerator, self.pipeline = settings, accelerator, pipeline
        self.num_classes = dataset.num_classes
        self.best: dict | None = None
        self.best_values: dict[str, Tensor] = {}

        resolution = resolution_of(pipeline)
        name = settings.eval_features or default_features(settings.dataset)
        with accelerator.main_process_first():  # it may download
            self.features = load_features(name, resolution, settings.eval_weights)
        origin = Origin.of(self.features, resolution, settings.dataset)
        self.distance_name = origin.distance_name
        if settings.eval_reference:
            self.reference, found = load_statistics(settings.eval_reference)
            origin.check_comparable(found)
        else:
            self.reference = self._statistics_of(DatasetImages(dataset, resolution))
        names = [dataset.id2label[label] for label in range(self.num_classes)]
        self.recognition = recognition_of(settings.dataset, names, self.features, resolution)

    def measure(self, stop) -> dict | None:
        """`{"distance": ..., "recognition": ...}` of images made by all processes, or None if stopped midway."""
        settings, accelerator = self.settings, self.accelerator
        # As many images on each process, so that all of them meet at every batch; the rest are not counted.
        padded = -(-settings.eval_images // accelerator.num_processes) * accelerator.num_processes
        indices = share(padded, accelerator.process_index, accelerator.num_processes)
        running = RunningStatistics(self.features, accelerator.device)
        recognised = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        batches = generate_images(
            self.pipeline,
            [index % self.num_classes for index in indices],
            settings.seed,
            indices,
            SamplerSettings(num_inference_steps=settings.eval_steps, guidance_scale=settings.eval_guidance_scale),
            batch_size=max(1, settings.batch_size // accelerator.num_processes),
        )
        is_quiet = not accelerator.is_main_process
        with tqdm(total=len(indices), desc="evaluate", unit="image", leave=False, disable=is_quiet) as progress:
            for batch, images in batches:
                if stop.agreed():
                    return None
                counted = [index for index in batch if index < settings.eval_images]
                if counted:
                    images = images[: len(counted)]
                    running.update(counted, images)
                    if self.recognition:
                        recognised += self.recognition.count(images, [index % self.num_classes for index in counted])
                progress.update(len(batch))
        measured = {"distance": frechet_distance(running.reduce(), self.reference)}
        if self.recognition:
            measured["recognition"] = int(accelerator.reduce(recognised)) / settings.eval_images
        return measured

    def keep_if_best(self, line: dict, values: dict[str, Tensor]) -> bool:
        """Whether the line's distance is smaller than all before it; then its values are kept."""
        if self.best is not None and line["distance"] >= self.best["distance"]:
            return False
        self.best, self.best_values = line, {name: value.clone() for name, value in values.items()}
        return True

    def plot(self, metrics: Path, picture: Path) -> None:
        plot_distances(metrics, picture, self.distance_name)

    def _statistics_of(self, images: DatasetImages) -> FeatureStatistics:
        accelerator = self.accelerator
        indices = share(len(images), accelerator.process_index, accelerator.num_processes)
        running = RunningStatistics(self.features, accelerator.device)
        bar = tqdm(total=len(indices), desc="reference", unit="image", disable=not accelerator.is_main_process)
        with bar:
            for batch, pixels in images.batches(indices, 64):
                running.update(batch, pixels)
                bar.update(len(batch))
        return running.reduce()


def plot_distances(metrics: Path, picture: Path, distance_name: str) -> None:
    """The distances in metrics.jsonl over steps and over wall-clock time, as a PNG."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in metrics.read_text().splitlines()]
    lines = [line for line in lines if "distance" in line]
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    by_step, by_time = figure.subplots(1, 2, sharey=True)
    distances = [line["distance"] for line in lines]
    by_step.plot([line["step"] for line in lines], distances, marker="o")
    by_step.set(xlabel="updates", ylabel=distance_name, ylim=(0, 1.1 * max(distances)))
    by_time.plot([line["seconds"] / 60 for line in lines], distances, marker="o")
    by_time.set(xlabel="wall-clock time [minutes]")
    for axes in (by_step, by_time):
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
    png = io.BytesIO()
    figure.savefig(png, format="png", dpi=120)
    write_bytes(picture, png.getvalue())
