"""Measure how close images are to real ones: FID, or a Fréchet distance on other features, named with the number.

    python eval_fid.py                                     # runs/digits beside its base; writes evaluation.json
    python eval_fid.py gen --adapter runs/food101 --num-images 10000 --reference food101.safetensors
    python eval_fid.py ref --dataset food101 --data-root data --split test --output food101.safetensors
    python eval_fid.py calc --images samples.npz --reference food101.safetensors
    accelerate launch --num_processes 2 eval_fid.py gen --num-images 2000

`gen` (also without its name) generates and measures on the fly, nothing on disk; `ref` writes statistics of real
images; `calc` measures a folder of PNG files, an .npz or statistics. Image i depends on --seed and i alone, not on the
number of processes; another batch size may round a matrix product differently, and so move a pixel by one level.
"""

import resource
import sys
import time
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from onelora_diffusion import count_trainable, disable_adapter, load_adapter, read_adapter
from onelora_diffusion.data import load_dataset
from onelora_diffusion.evaluation.companions import (
    extrapolate,
    inception_score,
    kernel_distance,
    precision_recall,
)
from onelora_diffusion.evaluation.features import load_features
from onelora_diffusion.evaluation.frechet import frechet_distance
from onelora_diffusion.evaluation.images import DatasetImages, open_images, share
from onelora_diffusion.evaluation.recognition import DigitClassifier
from onelora_diffusion.evaluation.report import format_bytes, format_note, format_table, write_json
from onelora_diffusion.evaluation.statistics import (
    FeatureStatistics,
    Origin,
    RunningStatistics,
    load_statistics,
    save_statistics,
    shortage,
)
from onelora_diffusion.pipeline import load_base
from onelora_diffusion.sampling import generate_images
from onelora_diffusion.saving import WEIGHTS_NAME

Metric = Literal["kid", "precision-recall", "inception-score", "limit"]


@dataclass(kw_only=True)
class FeatureSettings:
    features: Literal["pixels", "inception", "dinov2"] | None = None
    """What is compared. Only inception gives FID. None: pixels for digits, else inception."""
    inception_weights: Path | None = None
    """torch-fidelity's weights-inception-2015-12-05-6726825d.pth. None: torch's cache, or a download."""
    dinov2_weights: Path | None = None
    """Folder with config.json and model.safetensors, such as a copy of facebook/dinov2-large."""
    batch_size: int = 64
    """Images at a time in each process."""


@dataclass(kw_only=True)
class DatasetSettings:
    dataset: Literal["digits", "food101", "imagefolder"] | None = None
    """Real images. None: what the adapter was trained on, else digits."""
    data_root: Path | None = None
    """Where the data set lies."""
    split: str = "train"
    """Which part of it: train or test."""


@dataclass(kw_only=True)
class Generate(FeatureSettings, DatasetSettings):
    """Generate images from an adapter and its base, and measure them against real ones."""

    adapter: Path | None = Path("runs/digits")
    """Adapter file, or the folder of a training run. None: the base alone."""
    base: str | None = None
    """Base model: a folder or a hub id. None: the one the adapter was trained on."""
    compare_base: bool | None = None
    """True or False: also measure the base without the adapter, from the same noise. None: for digits only."""
    reference: Path | None = None
    """Statistics that `ref` wrote. None: computed from the data set."""
    metrics: tuple[Metric, ...] = ()
    """Further metrics; they keep all features in memory. `limit` is the distance at several numbers of images and
    its extrapolation to infinitely many."""
    num_images: int = 1000
    """Images to generate, the classes taking turns."""
    sampler: Literal["ddim", "dpm-solver++", "ddpm"] = "ddim"
    """ddpm is the ancestral sampler with the learned variance, ADM's and DiT's own (250 steps there)."""
    num_inference_steps: int = 50
    """Steps of the sampler."""
    guidance_scale: float = 1.5
    """Classifier-free guidance; 1 is none. Pictures like more of it (4) than distances do."""
    guidance_channels: int | None = None
    """Guide only the first so many latent channels (3 in DiT's own code). None: all."""
    seed: int = 0
    """Of all noise."""
    output: Path | None = None
    """JSON file. None: evaluation.json beside the adapter, or here."""


@dataclass(kw_only=True)
class Calculate(FeatureSettings, DatasetSettings):
    """Measure images on disk: a folder of PNG files, an .npz (arr_0, uint8 NHWC), or statistics."""

    images: Path
    """What to measure."""
    reference: Path | None = None
    """What to compare it with, any of the three. None: the data set."""
    metrics: tuple[Metric, ...] = ()
    """Further metrics; they keep all features in memory."""
    output: Path | None = None
    """JSON file. None: the table only."""


@dataclass(kw_only=True)
class Reference(FeatureSettings, DatasetSettings):
    """Write the statistics of real images to a file, for --reference."""

    output: Path
    """The file, *.safetensors."""
    images: Path | None = None
    """A folder of PNG files or an .npz. None: the data set, with the crop that training uses."""
    resolution: int | None = None
    """To which a data set is cropped and resized. None: 16 for digits, 256 for others."""


@dataclass(frozen=True)
class Measured:
    """A set of images, as the metrics see it; `kept` are its features one by one, if a metric needs them."""

    statistics: FeatureStatistics
    origin: Origin
    kept: Tensor | None = None


@contextmanager
def errors_in_one_line(accelerator: Accelerator):
    try:
        yield
    except (ValueError, OSError) as error:
        raise SystemExit(f"eval_fid.py: {error}" if accelerator.is_main_process else 1) from error


def main(settings: Generate | Calculate | Reference) -> None:
    accelerator = Accelerator()
    if isinstance(settings, Generate):
        generate(settings, accelerator)
    elif isinstance(settings, Calculate):
        calculate(settings, accelerator)
    else:
        write_reference(settings, accelerator)


def generate(settings: Generate, accelerator: Accelerator) -> None:
    start = time.monotonic()

    # Everything that can be wrong, before any work: the models, the real images, the classifier of them.
    with errors_in_one_line(accelerator):
        if settings.num_images < 2:
            raise ValueError(f"--num-images {settings.num_images}: a distance between sets needs two or more")
        pipeline, adapter, names = load_models(settings)
        pipeline.to(accelerator.device)
        dataset = settings.dataset or (adapter and adapter.training.get("dataset")) or "digits"
        compare_base = settings.compare_base if settings.compare_base is not None else dataset == "digits"
        models = (["base"] if compare_base or not adapter else []) + (["adapted"] if adapter else [])
        indices = share(settings.num_images, accelerator.process_index, accelerator.num_processes)
        labels = {
            "base": [index % len(names) % num_base_classes(pipeline) for index in indices],
            "adapted": [index % len(names) for index in indices],
        }
        images_of = {
            model: generate_images(
                pipeline,
                labels[model],
                settings.seed,
                indices,
                sampler=settings.sampler,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
                guidance_channels=settings.guidance_channels,
                batch_size=settings.batch_size,
            )
            for model in models
        }
        resolution = resolution_of(pipeline)
        features = features_of(settings, dataset, resolution, accelerator)
        digits = digits_of(names) if dataset == "digits" else None
        reference = reference_of(settings, dataset, features, resolution, digits, accelerator)
        check_metrics(settings.metrics, features, reference)
        classifier = DigitClassifier(resolution) if digits else None

    # Base and adapted, from the same noise; the images are made here, batch by batch.
    results = {}
    for model in models:
        running = RunningStatistics(features, accelerator.device, keep=bool(settings.metrics))
        recognised = torch.zeros((), dtype=torch.int64, device=accelerator.device)
        with (
            disable_adapter(pipeline.transformer) if adapter and model == "base" else nullcontext(),
            accelerator.autocast(),
            tqdm(total=len(indices), desc=model, unit="image", disable=not accelerator.is_main_process) as progress,
        ):
            for batch, images in images_of[model]:
                running.update(batch, images)
                if classifier:
                    asked = torch.tensor([digits[index % len(digits)] for index in batch])
                    recognised += int((classifier.predict(images) == asked).sum())
                progress.update(len(batch))
        measured = finish(running, Origin.of(features, resolution, model), bool(settings.metrics))
        recognised = accelerator.reduce(recognised)
        if accelerator.is_main_process:
            results[model] = compare(measured, reference, settings.metrics, features)
            if classifier:
                results[model]["recognition"] = int(recognised) / measured.statistics.count
    accelerator.wait_for_everyone()

    if accelerator.is_main_process:
        report = {
            **head_of_report(measured, reference),
            "adapter": str(settings.adapter) if adapter else None,
            "base": settings.base or (adapter and adapter.base) or "miniature",
            "num_classes": len(names),
            "num_base_classes": num_base_classes(pipeline),
            "num_images": settings.num_images,
            "seed": settings.seed,
            "sampler": settings.sampler,
            "num_inference_steps": settings.num_inference_steps,
            "guidance_scale": settings.guidance_scale,
            "guidance_channels": settings.guidance_channels,
            "num_trainable_params": count_trainable(pipeline.transformer) if adapter else None,
            "adapter_bytes": adapter_file(settings.adapter).stat().st_size if adapter else None,
            "classifier": classifier and {"description": classifier.describe(), "accuracy": classifier.accuracy},
            "results": results,
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        print_report(report)
        folder = adapter_file(settings.adapter).parent if adapter else Path()
        output = settings.output or folder / "evaluation.json"
        write_json(output, report)
        print(output)


def calculate(settings: Calculate, accelerator: Accelerator) -> None:
    start = time.monotonic()
    with errors_in_one_line(accelerator):
        dataset = settings.dataset or "digits"
        filed = Measured(*load_statistics(settings.images)) if is_statistics(settings.images) else None
        images = None if filed else open_images(settings.images)
        resolution = filed.origin.resolution if filed else images.resolution
        both_filed = filed and is_statistics(settings.reference)
        features = None if both_filed else features_of(settings, dataset, resolution, accelerator)
        reference = reference_of(settings, dataset, features, resolution, None, accelerator)
        if filed:
            measured = filed
            measured.origin.check_comparable(reference.origin)
            check_metrics(settings.metrics, features, reference, measured)
        else:
            check_metrics(settings.metrics, features, reference)
            origin = Origin.of(features, resolution, images.name)
            measured = measure(images, features, origin, settings, accelerator, keep=bool(settings.metrics))

    if accelerator.is_main_process:
        report = {
            **head_of_report(measured, reference),
            "num_images": measured.statistics.count,
            "results": {Path(measured.origin.dataset).name: compare(measured, reference, settings.metrics, features)},
            "seconds": time.monotonic() - start,
            "peak_memory_bytes": peak_memory_bytes(),
        }
        print_report(report)
        if settings.output:
            write_json(settings.output, report)
            print(settings.output)
    accelerator.wait_for_everyone()


def write_reference(settings: Reference, accelerator: Accelerator) -> None:
    with errors_in_one_line(accelerator):
        if not is_statistics(settings.output):
            raise ValueError(f"--output {settings.output}: statistics are a .safetensors file")
        dataset = settings.dataset or "digits"
        if settings.images:
            images, split = open_images(settings.images), ""
        else:
            resolution = settings.resolution or (16 if dataset == "digits" else 256)
            real = load_dataset(dataset, settings.data_root, settings.split, resolution)
            images, split = DatasetImages(real, resolution), settings.split
        features = features_of(settings, dataset, images.resolution, accelerator)
        origin = Origin.of(features, images.resolution, images.name, split, images.crop)
        measured = measure(images, features, origin, settings, accelerator, keep=False)
    if accelerator.is_main_process:
        save_statistics(settings.output, measured.statistics, origin)
        print(format_note(f"{settings.output}: {describe(origin, measured.statistics.count)}"))
    accelerator.wait_for_everyone()


# ---------------------------------------------------------------------------------------------------
# What goes in


def load_models(settings: Generate):
    """The base with its adapter attached, the adapter's file (None without one), and the names of the classes."""
    adapter = read_adapter(settings.adapter) if settings.adapter else None
    pipeline = load_base(settings.base or (adapter and adapter.base))
    if adapter:
        load_adapter(pipeline.transformer, settings.adapter)
    names = {label: name for name, label in pipeline.labels.items()}
    if adapter and adapter.config.num_classes:
        names = adapter.id2label
    num_classes = (adapter and adapter.config.num_classes) or num_base_classes(pipeline)
    return pipeline, adapter, [names.get(label, str(label)) for label in range(num_classes)]


def num_base_classes(pipeline) -> int:
    return pipeline.transformer.config.num_embeds_ada_norm


def resolution_of(pipeline) -> int:
    return pipeline.transformer.config.sample_size * 2 ** (len(pipeline.vae.config.block_out_channels) - 1)


def adapter_file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / WEIGHTS_NAME


def digits_of(names: list[str]) -> tuple[int, ...]:
    """Which digit each class is."""
    if not all(name in map(str, range(10)) for name in names):
        raise ValueError(f"--dataset digits: the model's classes are {', '.join(names[:5])}, … and not all digits")
    return tuple(map(int, names))


def features_of(settings: FeatureSettings, dataset: str, resolution: int, accelerator: Accelerator) -> nn.Module:
    """The feature module; the main process goes first, since it may download."""
    name = settings.features or ("pixels" if dataset == "digits" else "inception")
    weights = settings.inception_weights if name == "inception" else settings.dinov2_weights
    with accelerator.main_process_first():
        return load_features(name, resolution, weights)


def reference_of(settings, dataset, features, resolution, classes, accelerator) -> Measured:
    """What to compare with: a file of statistics, images on disk, or the data set (some classes of it)."""
    keep = bool(settings.metrics)
    if is_statistics(settings.reference):
        reference = Measured(*load_statistics(settings.reference))
        if features:
            Origin.of(features, resolution, "these images").check_comparable(reference.origin)
        return reference
    if settings.reference:
        images, split = open_images(settings.reference), ""
    else:
        real = load_dataset(dataset, settings.data_root, settings.split, resolution, classes=classes)
        images, split = DatasetImages(real, resolution), settings.split
    if features.name == "pixels" and images.resolution != resolution:
        raise ValueError(f"pixels compare at one resolution only, not {resolution} with {images.resolution}")
    origin = Origin.of(features, images.resolution, images.name, split, images.crop)
    return measure(images, features, origin, settings, accelerator, keep)


def is_statistics(path: Path | None) -> bool:
    return path is not None and path.suffix == ".safetensors"


# ---------------------------------------------------------------------------------------------------
# Measuring


def measure(images, features, origin: Origin, settings, accelerator: Accelerator, keep: bool) -> Measured:
    """Statistics of images on disk; each process reads its share."""
    indices = share(len(images), accelerator.process_index, accelerator.num_processes)
    running = RunningStatistics(features, accelerator.device, keep)
    name = Path(origin.dataset).name
    with tqdm(total=len(indices), desc=name, unit="image", disable=not accelerator.is_main_process) as progress:
        for batch, pixels in images.batches(indices, settings.batch_size):
            running.update(batch, pixels)
            progress.update(len(batch))
    return finish(running, origin, keep)


def finish(running: RunningStatistics, origin: Origin, keep: bool) -> Measured:
    return Measured(running.reduce(), origin, running.gather_kept() if keep else None)


def check_metrics(metrics: tuple[str, ...], features: nn.Module | None, *sets: Measured) -> None:
    """ValueError if a metric needs images where there are statistics only, or other features."""
    for each in sets:
        if metrics and metrics != ("limit",) and each.kept is None:
            raise ValueError(
                f"'{each.origin.dataset}' is given as statistics: --metrics {metrics[0]} needs the images"
            )
    if "inception-score" in metrics and not features.name.startswith("inception"):
        raise ValueError(f"--metrics inception-score needs --features inception, not {features.name}")


def compare(measured: Measured, reference: Measured, metrics: tuple[str, ...], features: nn.Module | None) -> dict:
    """All metrics of one set of images, by name."""
    results = {"distance": frechet_distance(measured.statistics, reference.statistics)}
    if "kid" in metrics:
        results["kid"], results["kid_spread"] = kernel_distance(measured.kept, reference.kept)
    if "precision-recall" in metrics:
        results["precision"], results["recall"] = precision_recall(measured.kept, reference.kept)
    if "inception-score" in metrics:
        score = inception_score(features.logits(measured.kept))
        results["inception_score"], results["inception_score_spread"] = score
    if "limit" in metrics:
        results["limit"] = asdict(extrapolate(measured.kept, reference.statistics))
    return results


def peak_memory_bytes() -> int:
    """Of the device where there is one, else the largest resident set of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


# ---------------------------------------------------------------------------------------------------
# What comes out


def head_of_report(measured: Measured, reference: Measured) -> dict:
    origin, statistics = measured.origin, measured.statistics
    sets = (("generated", statistics), ("reference", reference.statistics))
    return {
        "distance_name": origin.distance_name,
        "features": {
            "name": origin.features,
            "num_features": statistics.num_features,
            "extractor": origin.extractor,
            "resize": origin.resize,
            "antialias": False,
        },
        "resolution": origin.resolution,
        "reference": {**asdict(reference.origin), "count": reference.statistics.count},
        "notes": [note for name, each in sets if (note := shortage(each, name))],
    }


def describe(origin: Origin, count: int) -> str:
    split = f", {origin.split} split" if origin.split else ""
    return f"{origin.dataset}{split}, {count:,} images of {origin.resolution}x{origin.resolution}, crop: {origin.crop}"


def print_report(report: dict) -> None:
    """The table and what one must know to believe it."""
    results, reference, features = report["results"], report["reference"], report["features"]
    title = f"{report['num_images']:,} images"
    if "sampler" in report:
        title += f" each, {report['sampler']}, {report['num_inference_steps']} steps"
        title += f", guidance {report['guidance_scale']:g}, seed {report['seed']}"
    rows = result_rows(report["distance_name"], features["name"], list(results.values()))
    if report.get("adapter"):
        blank = [""] * (len(results) - 1)
        rows["num_trainable_params"] = [*blank, f"{report['num_trainable_params']:,}"]
        rows["adapter file"] = [*blank, format_bytes(report["adapter_bytes"])]

    origin = Origin(**{name: value for name, value in reference.items() if name != "count"})
    notes = [
        f"Reference: {describe(origin, reference['count'])}.",
        f"Features: {features['name']}, {features['num_features']} of them, resize: {features['resize']}.",
    ]
    if report.get("classifier"):
        notes.append(
            f"Recognition: the share read as the digit asked for, by a {report['classifier']['description']}."
        )
    if len(results) == 2:
        base_classes = report["num_base_classes"]
        notes.append(
            f"The base knows its own {base_classes} classes: asked for class i, it draws i mod {base_classes}."
        )
    print(f"\n{format_table(title, list(results), rows)}")
    for note in notes + report["notes"]:
        print(format_note(note))
    print(f"{report['seconds']:.0f} s, {format_bytes(report['peak_memory_bytes'])} of memory at most.")


def result_rows(distance_name: str, features: str, results: list[dict]) -> dict[str, list[str]]:
    """Rows of the table, a column for each set of images; every metric carries the name of its features."""
    own = "" if distance_name == "FID" else f"({features})"
    rows = {distance_name: [f"{result['distance']:.4f}" for result in results]}
    if "limit" in results[0]:
        for k, count in enumerate(results[0]["limit"]["counts"]):
            rows[f"  N = {count:,}"] = [f"{result['limit']['distances'][k]:.4f}" for result in results]
        rows["  N -> infinity"] = [f"{result['limit']['limit']:.4f}" for result in results]
        rows["  R2 of its fit"] = [f"{result['limit']['r_squared']:.4f}" for result in results]
    if "kid" in results[0]:
        rows[f"KID{own}"] = [f"{result['kid']:.5f} ± {result['kid_spread']:.5f}" for result in results]
    if "precision" in results[0]:
        rows[f"precision{own}"] = [f"{result['precision']:.3f}" for result in results]
        rows[f"recall{own}"] = [f"{result['recall']:.3f}" for result in results]
    if "inception_score" in results[0]:
        scores = [(result["inception_score"], result["inception_score_spread"]) for result in results]
        rows[f"Inception Score{own}"] = [f"{score:.3f} ± {spread:.3f}" for score, spread in scores]
    if "recognition" in results[0]:
        rows["recognition"] = [f"{result['recognition']:.1%}" for result in results]
    return rows


def parse(arguments: list[str]) -> Generate | Calculate | Reference:
    """`ref`, `calc` or `gen`; `gen` where none is named."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help")):
        arguments = ["gen", *arguments]
    commands = (
        Annotated[Generate, tyro.conf.subcommand("gen")]
        | Annotated[Calculate, tyro.conf.subcommand("calc")]
        | Annotated[Reference, tyro.conf.subcommand("ref")]
    )
    return tyro.cli(commands, args=arguments, description=__doc__, config=(tyro.conf.OmitSubcommandPrefixes,))


if __name__ == "__main__":
    main(parse(sys.argv[1:]))
