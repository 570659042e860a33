"""Choose the features and the real images for a command line of eval_fid.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from accelerate import Accelerator
from tqdm import tqdm

from onelora_diffusion.data.table import Defaults
from onelora_diffusion.evaluation.evaluator import Batches, measure_images
from onelora_diffusion.evaluation.features import FEATURES, kind_of, load_features
from onelora_diffusion.evaluation.features.base import Features
from onelora_diffusion.evaluation.images import DatasetImages, ImageSet, NpzImages, open_images, share
from onelora_diffusion.evaluation.metrics import REAL, SPATIAL
from onelora_diffusion.evaluation.npz import read_headers
from onelora_diffusion.evaluation.settings import FeatureSettings
from onelora_diffusion.evaluation.statistics import Measured, Origin
from onelora_diffusion.evaluation.statistics_file import is_statistics, load_statistics
from onelora_diffusion.processes import first_on_each_machine


def features_of(settings: FeatureSettings, default: str, resolution: int, accelerator: Accelerator) -> list[Features]:
    """Load the chosen features, or the default where any will do for a metric, and those of published metrics."""
    asked = getattr(settings, "asked", [])
    own = [kind for _, kind in asked if kind]
    takes_default = not own or any(metric == "fd" and kind is None for metric, kind in asked)
    names = dict.fromkeys([*(settings.features or ([default] if takes_default else [])), *own])
    fields = {name: FEATURES[name].weights for name in names if name in FEATURES}
    weights = {name: getattr(settings, field) for name, field in fields.items() if field}
    with first_on_each_machine(accelerator):  # this may download weights
        return [load_features(name, resolution, weights.get(name)) for name in names]


def default_for(defaults: Defaults, files: Sequence[Path]) -> str:
    """The default features: those of the given statistics, or else those of the data set."""
    for path in filter(is_statistics, files):
        features = load_statistics(path).origin.features
        return max((name for name in FEATURES if features.startswith(name)), key=len, default=features)
    return defaults.features


def reference_images(settings) -> Path | None:
    """The path of the images that --reference gives; None if it gives statistics, or nothing. ValueError for two."""
    if not settings.reference or any(map(is_statistics, settings.reference)):
        return None
    if len(settings.reference) > 1:
        raise ValueError(f"--reference {settings.reference[1]}: several files are statistics; images are one set")
    return settings.reference[0]


def real_images(
    settings, images: Path | None, dataset: str, resolution: int, classes: tuple[int, ...] | None = None
) -> ImageSet:
    """The images at a path if one is given, else those of the data set, possibly of some classes only."""
    return open_images(images) if images else DatasetImages(settings.load(dataset, resolution, classes), resolution)


def references_of(
    settings,
    images: ImageSet | None,
    origins: Sequence[Origin],
    features: Sequence[Features],
    accelerator: Accelerator,
) -> list[Measured | None]:
    """Load the references for images of these origins: statistics, or images, which are measured; or None.

    ValueError or FileNotFoundError if a reference is missing, or cannot be compared with the images.
    """
    if any(map(is_statistics, settings.reference)):
        filed = [statistics_in(path, features, settings, accelerator, REAL) for path in settings.reference]
        kinds = [kind_of(each.origin.features) for each in filed]
        found = [filed[kinds.index(kind) if (kind := kind_of(each.features)) in kinds else 0] for each in origins]
    elif images is None:
        return [None] * len(origins)
    else:
        resolution = origins[0].resolution
        if images.resolution != resolution and any(each.name == "pixels" for each in features):
            raise ValueError(f"pixels compare at one resolution only, not {resolution} with {images.resolution}")
        needs = settings.needs
        found = measure(images, features, settings.batch_size, accelerator, REAL in needs, SPATIAL in needs)
    for origin, reference in zip(origins, found, strict=True):
        origin.check_comparable(reference.origin)
    return found


def statistics_in(
    path: Path, features: Sequence[Features | None], settings, accelerator: Accelerator, one_by_one: str
) -> Measured:
    """Load statistics; if a metric needs images `one_by_one`, GENERATED or REAL, those in the .npz are measured."""
    keep = one_by_one in settings.needs
    filed = load_statistics(path, keep)
    fitting = [each for each in features if each and kind_of(each.name) == kind_of(filed.origin.features)]
    if keep and filed.kept is None and fitting and path.suffix == ".npz" and "arr_0" in read_headers(path):
        (found,) = measure(NpzImages(path), fitting, settings.batch_size, accelerator, keep=True)
        return replace(filed, kept=found.kept)
    return filed


def measure(
    images: ImageSet,
    features: Sequence[Features],
    batch_size: int,
    accelerator: Accelerator,
    keep: bool = False,
    spatial: bool = False,
) -> list[Measured]:
    """Measure existing images by each kind of features; each process reads its share."""
    indices = share(len(images), accelerator.process_index, accelerator.num_processes)

    def counted() -> Batches:
        for batch, pixels in images.batches(indices, batch_size):
            yield batch, pixels
            progress.update(len(batch))

    options = {"keep": keep, "spatial": spatial, "device": accelerator.device}
    name, is_quiet = Path(images.name).name, not accelerator.is_main_process
    with tqdm(total=len(indices), desc=name, unit="image", disable=is_quiet) as progress:
        return measure_images(counted(), images, features, **options).measured
