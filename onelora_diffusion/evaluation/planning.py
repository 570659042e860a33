"""What `eval_fid.py gen` and `sweep` generate and how they measure it: a plan, checked before anything is drawn."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from onelora_diffusion.data.caption_texts import filled_by
from onelora_diffusion.data.digits import CAPTIONED, UNRELATED
from onelora_diffusion.data.prompts import PromptFile, files_of, read_prompts
from onelora_diffusion.data.table import EMBEDDED, classes_of, defaults_of
from onelora_diffusion.evaluation import measuring
from onelora_diffusion.evaluation.evaluator import Evaluator, measure_images
from onelora_diffusion.evaluation.images import CroppedImages, ImageSet, Source, open_images, share
from onelora_diffusion.evaluation.labels import class_frequencies, draw_labels
from onelora_diffusion.evaluation.metrics import SHEET_ROWS
from onelora_diffusion.evaluation.recognition import class_numbers, recognition_of
from onelora_diffusion.evaluation.settings import Generate, Sweep
from onelora_diffusion.evaluation.statistics import Measured, Origin
from onelora_diffusion.sampling import progress_bar
from onelora_diffusion.sampling.adapted import AdaptedPipeline, load_adapted


@dataclass(frozen=True)
class Plan:
    """What is generated and how it is measured."""

    settings: Generate  # with their defaults
    drawn: AdaptedPipeline  # on its device
    # The name of each set of images in the report -> its adapter (None is the base) and its settings.
    columns: dict[str, tuple[str | None, Generate]]
    labels: list[int]  # for each image of all processes, the number of its condition
    unrelated: Sequence[str]  # the prompts by which drift is measured
    source: Source  # describes the generated images
    real: ImageSet | None  # unless the real images are given as statistics, or not at all
    evaluator: Evaluator


@dataclass(frozen=True)
class Found:
    """What was found for each column of a plan, on the main process."""

    results: dict[str, list[dict]]  # the numbers by each kind of features
    measured: list[Measured]  # the statistics of the last column's images, by each kind of features
    shown: dict[str, list[Tensor]]  # the first images of each column, uint8 (3, R, R)


def make_plan(settings: Generate, accelerator: Accelerator) -> Plan:
    """Load the models, the real images and the classifier of them; ValueError or FileNotFoundError if any is wrong."""
    if settings.num_images is not None and settings.num_images < 2:
        raise ValueError(f"--num-images {settings.num_images}: a distance between sets needs two or more")
    if settings.images_at_once is not None and settings.images_at_once < 1:
        raise ValueError(f"--images-at-once is {settings.images_at_once}; it must be at least 1")
    asked = dict(settings.asked)
    prompts = read_prompts(settings.prompts) if settings.prompts else None
    unrelated = read_prompts(settings.unrelated_prompts).prompts if settings.unrelated_prompts else ()
    drawn = load_adapted(
        settings.base,
        settings.adapter_files,
        prompts=prompts.prompts if prompts else (),
        resolution=settings.resolution,
        mixed_precision=settings.mixed_precision,
    )
    if unrelated and drawn.kind != "prompts":
        raise ValueError(
            f"--unrelated-prompts {settings.unrelated_prompts}: {', '.join(drawn.adapters)} draws classes"
        )
    is_embedded = drawn.dataset == CAPTIONED and prompts is None
    triggers = [file.training.get("trigger") for file in drawn.adapters.values()]
    unrelated = filled_by(unrelated, triggers) or (UNRELATED if is_embedded else ())
    if "drift" in asked and not unrelated:
        raise ValueError("--metrics drift needs prompts that have nothing to do with training: --unrelated-prompts")

    named = settings.dataset or (drawn.dataset if drawn.kind == "classes" or is_embedded else None)
    dataset = named or (EMBEDDED if drawn.kind == "classes" else None)
    if settings.labels == "dataset" and dataset is None:
        raise ValueError("--labels dataset draws the classes of a --dataset: choose turns or random for prompts")
    own = defaults_of(dataset, drawn.kind)
    has_real = bool(settings.reference or dataset or (prompts and prompts.images))
    settings = settings.with_defaults(own, drawn, has_real, bool(unrelated))
    columns = columns_of(settings, list(drawn.adapters))
    for _, sampler in columns.values():
        sampler.check_family(drawn.family)
        sampler.check(drawn.denoiser, drawn.family.training_scheduler(drawn.pipeline).config)
    drawn.place(settings, accelerator.device)

    default = measuring.default_for(own, settings.reference)
    features = measuring.features_of(settings, default, drawn.resolution, accelerator)
    numbers = class_numbers(dataset, drawn.names)
    if classes_of(dataset) and drawn.kind == "classes" and not (numbers or settings.reference):
        raise ValueError(f"'{drawn.names[-1]}' is no class of --dataset {dataset}: give a --reference")
    frequencies = None
    if settings.labels == "dataset":
        frequencies = class_frequencies(settings.load(dataset, drawn.resolution, numbers), drawn.names)
    labels = draw_labels(settings.labels, settings.num_images, len(drawn.names), settings.seed, frequencies)
    source = source_of(drawn, labels, prompts)
    real = real_images_of(settings, drawn, prompts, dataset, numbers)
    origins = [Origin.of(each, source) for each in features]
    references = measuring.references_of(settings, real, origins, features, accelerator)
    reader = next((each for each in features if each.name == dataset), features[0])
    recognition = recognition_of(dataset, drawn.names, reader, drawn.resolution)
    evaluator = Evaluator(features, references, settings, recognition, accelerator.device)
    return Plan(settings, drawn, columns, labels, unrelated, source, real, evaluator)


def columns_of(settings: Generate, names: Sequence[str]) -> dict[str, tuple[str | None, Generate]]:
    """The base and its adapters, or one strength of guidance after the other, all from the same noise."""
    if isinstance(settings, Sweep):
        if len(names) > 1:
            raise ValueError(f"a sweep is of one adapter, not of {' and '.join(names)}")
        return {
            f"{scale:g}": (names[0] if names else None, replace(settings, guidance_scale=scale))
            for scale in sorted(set(settings.guidance_scales))
        }
    columns = {"base": (None, settings)} if settings.compare_base or not names else {}
    return columns | {name if len(names) > 1 else "adapted": (name, settings) for name in names}


def source_of(drawn: AdaptedPipeline, labels: Sequence[int], prompts: PromptFile | None) -> Source:
    groups = prompts.groups if prompts else drawn.names
    texts = [drawn.conditions[label] for label in labels] if drawn.kind == "prompts" else None
    name = "adapted" if drawn.adapters else "base"
    return Source(name, drawn.resolution, groups=[groups[label] for label in labels], prompts=texts)


def real_images_of(
    settings: Generate,
    drawn: AdaptedPipeline,
    prompts: PromptFile | None,
    dataset: str | None,
    classes: tuple[int, ...] | None,
) -> ImageSet | None:
    """The real images, unless they are given as statistics, or not at all."""
    path = measuring.reference_images(settings)
    if settings.reference and path is None:
        return None
    if path and drawn.kind == "prompts":
        # Image files of any kind and size are cropped.
        return CroppedImages(str(path), files_of(path), drawn.resolution) if path.is_dir() else open_images(path)
    if prompts and prompts.images and path is None:
        files, groups = zip(*prompts.images, strict=True)
        return CroppedImages(str(settings.prompts), files, drawn.resolution, groups)
    return measuring.real_images(settings, path, dataset, drawn.resolution, classes) if path or dataset else None


def draw_and_measure(plan: Plan, accelerator: Accelerator) -> Found:
    """Generate and measure the images of each column; each process draws its share, batch by batch."""
    results, shown, of_base = {}, {}, {}
    evaluator, conditions = plan.evaluator, [plan.drawn.conditions[label] for label in plan.labels]
    for name, (adapter, sampler) in plan.columns.items():
        if adapter:
            plan.drawn.choose(adapter)
        first: dict[int, Tensor] = {}
        batches = drawn_images(plan, conditions, sampler, name, adapter is None, accelerator)
        found = evaluator.measure(keeping(first, batches), replace(plan.source, name=name), plan.labels)
        first = dict(gather_object(list(first.items())))
        shown[name] = [first[index] for index in sorted(first)]

        def unrelated(model: str, is_base: bool, sampler: Generate = sampler) -> list[Measured]:
            images = drawn_images(plan, plan.unrelated, sampler, f"{model}, unrelated", is_base, accelerator)
            return measure_images(images, plan.source, evaluator.features, keep=True, device=evaluator.device).measured

        drifted = None, None
        if plan.unrelated:
            scale = sampler.guidance_scale
            if scale not in of_base:
                of_base[scale] = unrelated("base", True)
            drifted = (unrelated(name, False) if adapter else of_base[scale]), of_base[scale]
        if accelerator.is_main_process:
            results[name] = evaluator.compare(found, *drifted)
    return Found(results, found.measured, shown)


def drawn_images(
    plan: Plan, conditions: Sequence, sampler: Generate, name: str, of_base: bool, accelerator: Accelerator
) -> Iterator[tuple[list[int], Tensor]]:
    """This process's share of one image for each condition, batch by batch, with a progress bar."""
    indices = share(len(conditions), accelerator.process_index, accelerator.num_processes)
    own = [conditions[index] for index in indices]
    options = {"of_base": of_base, "images_at_once": sampler.images_at_once, "batch_size": sampler.batch_size}
    with progress_bar(len(indices), name, disable=not accelerator.is_main_process) as progress:
        yield from plan.drawn.draw(own, sampler.seed, indices, sampler, progress=progress.update, **options)


def keeping(first: dict[int, Tensor], batches) -> Iterator[tuple[list[int], Tensor]]:
    """Yield the batches, and put the images that a sheet shows into `first`, by their indices."""
    for indices, images in batches:
        first |= {index: image.cpu() for index, image in zip(indices, images, strict=True) if index < SHEET_ROWS}
        yield indices, images
