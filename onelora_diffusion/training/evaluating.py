"""The evaluation loop inside training: the distance of generated images to real ones, and the best adapter so far."""

import json
from pathlib import Path

from accelerate import Accelerator

from onelora_diffusion.data.table import defaults_of
from onelora_diffusion.evaluation.evaluator import Batches, Evaluator
from onelora_diffusion.evaluation.features import load_features
from onelora_diffusion.evaluation.images import DatasetImages, Source, share
from onelora_diffusion.evaluation.measuring import measure
from onelora_diffusion.evaluation.recognition import recognition_of
from onelora_diffusion.evaluation.report import write_figure
from onelora_diffusion.evaluation.statistics import Origin
from onelora_diffusion.evaluation.statistics_file import load_statistics
from onelora_diffusion.families import family_of
from onelora_diffusion.processes import first_on_each_machine
from onelora_diffusion.sampling import SamplerSettings, adapters_merged, generate_images, progress_bar
from onelora_diffusion.training.settings import Settings


class Evaluation:
    """Measures images of the model's current values, from the same noise each time."""

    def __init__(self, settings: Settings, accelerator: Accelerator, pipeline, dataset):
        self.settings, self.accelerator, self.pipeline = settings, accelerator, pipeline
        self.num_classes = dataset.num_classes

        resolution = family_of(pipeline).resolution(pipeline)
        name = settings.eval_features or defaults_of(settings.dataset).features
        with first_on_each_machine(accelerator):  # this may download weights
            features = load_features(name, resolution, settings.eval_weights)
        self.source = Source(settings.dataset, resolution)
        origin = Origin.of(features, self.source)
        self.distance_name = origin.distance_name
        if settings.eval_reference:
            reference = load_statistics(settings.eval_reference)
            origin.check_comparable(reference.origin)
        else:
            (reference,) = measure(DatasetImages(dataset, resolution), [features], 64, accelerator)
        names = [dataset.id2label[label] for label in range(self.num_classes)]
        recognition = recognition_of(settings.dataset, names, features, resolution)
        self.evaluator = Evaluator([features], [reference], recognition=recognition, device=accelerator.device)

    def measure(self, stop) -> dict | None:
        """`{"distance": ..., "recognition": ...}` of images made by all processes, or None if stopped midway."""
        settings, accelerator = self.settings, self.accelerator
        # All processes generate equally many images, so that they meet at every batch; surplus images are not counted.
        padded = -(-settings.eval_images // accelerator.num_processes) * accelerator.num_processes
        indices = share(padded, accelerator.process_index, accelerator.num_processes)
        scale = settings.drawn_at(settings.eval_guidance_scale)
        sampler = SamplerSettings(num_inference_steps=settings.eval_steps, guidance_scale=scale)
        with (
            adapters_merged(self.pipeline, sampler),
            progress_bar(len(indices), "evaluate", leave=False, disable=not accelerator.is_main_process) as progress,
        ):
            batches = generate_images(
                self.pipeline,
                [index % self.num_classes for index in indices],
                settings.seed,
                indices,
                sampler,
                batch_size=max(1, settings.batch_size // accelerator.num_processes),
                progress=progress.update,
            )
            try:
                found = self.evaluator.measure(counted(batches, settings.eval_images, stop), self.source)
            except Stopped:
                return None
        return self.evaluator.compare(found)[0]

    def plot(self, metrics: Path, picture: Path) -> None:
        """Plot the distances in metrics.jsonl over steps and over wall-clock time, as a PNG."""
        from matplotlib.figure import Figure

        lines = [json.loads(line) for line in metrics.read_text().splitlines()]
        lines = [line for line in lines if "distance" in line]
        figure = Figure(figsize=(9, 3.5), layout="constrained")
        by_step, by_time = figure.subplots(1, 2, sharey=True)
        distances = [line["distance"] for line in lines]
        by_step.plot([line["step"] for line in lines], distances, marker="o")
        by_step.set(xlabel="updates", ylabel=self.distance_name, ylim=(0, 1.1 * max(distances)))
        by_time.plot([line["seconds"] / 60 for line in lines], distances, marker="o")
        by_time.set(xlabel="wall-clock time [minutes]")
        for axes in (by_step, by_time):
            axes.set_xlim(left=0)
            axes.grid(alpha=0.3)
        write_figure(picture, figure)


class Stopped(Exception):
    """The run was told to stop during an evaluation."""


def counted(batches: Batches, num_images: int, stop) -> Batches:
    """Yield the first `num_images` images of the batches; Stopped as soon as all processes agree to stop."""
    for indices, images in batches:
        if stop.agreed():
            raise Stopped
        indices = [index for index in indices if index < num_images]
        if indices:
            yield indices, images[: len(indices)]
