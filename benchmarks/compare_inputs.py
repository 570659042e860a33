"""What all runs of `benchmark.py compare` share, made once: a base, latents, features, statistics of real images."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import nn

from benchmarks.folders import folder_written_beside
from onelora_diffusion.data import load_dataset
from onelora_diffusion.data.latent_cache import LatentCache, build_cache
from onelora_diffusion.data.latents import sample_moments
from onelora_diffusion.evaluation.evaluator import Batches, measure_images
from onelora_diffusion.evaluation.features import load_features, name_of
from onelora_diffusion.evaluation.formulas import frechet_distance
from onelora_diffusion.evaluation.images import DatasetImages
from onelora_diffusion.evaluation.report import write_json
from onelora_diffusion.evaluation.statistics_file import save_statistics
from onelora_diffusion.families import family_of
from onelora_diffusion.families.autoencoder import decode_latents
from onelora_diffusion.pipelines.base import load_base, miniature_path
from onelora_diffusion.sampling import as_uint8
from tools.from_scratch import BaseRecipe, draw_samples, train_base, write_base

CLOTHES_AND_BAGS = (0, 1, 2, 3, 4, 6, 8)  # the classes of Fashion-MNIST that are no shoes: its base knows these
FASHION_VAE_CHANNELS = (16, 32, 32)


@dataclass(frozen=True)
class Inputs:
    """Paths for the runs, and what the report says of them."""

    base: str | None
    id2label: dict[str, str]
    identity: str
    """Hash of what `latents` and `reference` were made of."""
    latents: str
    num_train_images: int
    reference: str
    features_weights: str | None
    distance_name: str
    reference_count: int
    autoencoder_distance: float
    """Distance of real images after the autoencoder: what no adapter can be expected to go below."""
    notes: list[str]


def prepare(settings) -> Inputs:
    """Make, or find in `settings.cache_dir`, the inputs of a `CompareSettings`."""
    cache, notes = settings.cache_dir, []
    base, weights = settings.base, settings.features_weights
    if settings.dataset == "fashion-mnist" and base is None:
        recipe = BaseRecipe(steps=settings.base_steps, vae_steps=settings.base_vae_steps)
        base = made_once(
            cache / "fashion-base",
            {**asdict(recipe), "classes": CLOTHES_AND_BAGS, "vae_channels": FASHION_VAE_CHANNELS},
            lambda folder: make_fashion_base(folder / "pipeline", settings.data_root, recipe),
        )
        base = base / "pipeline"
        notes.append(
            f"Base: trained here on the seven classes of clothes and bags, {recipe.vae_steps:,} steps of its "
            f"autoencoder and {recipe.steps:,} of its transformer, seed {recipe.seed}."
        )
    if settings.features == "fashion-mnist" and weights is None:
        from benchmarks.fashion_classifier import train_fashion_classifier

        classifier = {"epochs": settings.classifier_epochs, "seed": 0}
        folder = made_once(
            cache / "fashion-classifier",
            classifier,
            lambda folder: train_fashion_classifier(folder / "weights.safetensors", settings.data_root, **classifier),
        )
        weights = folder / "weights.safetensors"

    pipeline = load_base(base)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    resolution = family_of(pipeline).resolution(pipeline)
    features = load_features(settings.features, resolution, weights)
    if hasattr(features, "describe"):
        notes.append(
            f"Features: {features.num_features} of a {features.describe()}, weights {features.extractor[:12]}."
        )
    train, real = (
        load_dataset(settings.dataset, settings.data_root, split, resolution)
        for split in ("train", settings.reference_split)
    )
    latents = build_cache(
        cache / "latents", train, pipeline.vae.to(device), settings.flip, num_workers=settings.num_workers
    )
    made_of = {
        "base": identity(base),
        "latents": latents.name,
        "reference_split": settings.reference_split,
        "num_images": settings.num_images,
        "extractor": features.extractor,
    }
    folder = made_once(
        cache / f"{settings.dataset}-reference",
        made_of,
        lambda folder: measure_real_images(
            folder, LatentCache(latents, len(train)), pipeline.vae, real, features.to(device), settings
        ),
    )
    return Inputs(
        base=None if base is None else str(base),
        id2label={str(label): name for label, name in train.id2label.items()},
        identity=hashlib.sha256((folder / "recipe.json").read_bytes()).hexdigest(),
        latents=str(latents),
        num_train_images=len(train),
        reference=str(folder / "statistics.safetensors"),
        features_weights=None if weights is None else str(weights),
        distance_name=name_of("FD", features.name, features.extractor),
        notes=notes,
        **json.loads((folder / "facts.json").read_text()),
    )


def made_once(folder: Path, recipe: dict, make: Callable[[Path], None]) -> Path:
    """`folder`, made by `make` unless the same recipe has made it before; whole, or not there."""
    recipe = json.loads(json.dumps(recipe))
    note = folder / "recipe.json"
    if note.is_file() and json.loads(note.read_text()) == recipe:
        return folder
    with folder_written_beside(folder) as beside:
        make(beside)
        write_json(beside / "recipe.json", recipe)
    return folder


def make_fashion_base(folder: Path, data_root: Path | None, recipe: BaseRecipe) -> None:
    clothes = load_dataset("fashion-mnist", data_root, "train", resolution=32, classes=CLOTHES_AND_BAGS)
    pipeline = train_base(clothes.images, torch.tensor(clothes.labels), FASHION_VAE_CHANNELS, recipe)
    write_base(pipeline, clothes.id2label, folder)
    draw_samples(folder, folder.with_name("samples.png"))


def measure_real_images(
    folder: Path, latents: LatentCache, vae: nn.Module, real, features: nn.Module, settings
) -> None:
    """Write the statistics of the real images, and the distance of training images that the autoencoder has passed."""
    images = DatasetImages(real, real[0][0].shape[-1])
    batches = images.batches(range(len(images)), 64)
    (reference,) = measure_images(batches, images, [features], device=vae.device).measured
    save_statistics(folder / "statistics.safetensors", reference)

    passed = passed_batches(latents, vae, settings.num_images)
    (after,) = measure_images(passed, images, [features], device=vae.device).measured
    facts = {
        "reference_count": reference.statistics.count,
        "autoencoder_distance": frechet_distance(after.statistics, reference.statistics),
    }
    write_json(folder / "facts.json", facts)


@torch.no_grad()
def passed_batches(latents: LatentCache, vae: nn.Module, num_images: int) -> Batches:
    """Training images, evenly chosen, encoded and decoded."""
    chosen = torch.linspace(0, len(latents) - 1, min(num_images, len(latents))).long()
    generator = torch.Generator().manual_seed(0)
    for indices in chosen.split(64):
        moments = torch.stack([latents[index, False][0] for index in indices.tolist()])
        noise = torch.randn(moments[:, 0].shape, generator=generator)
        yield indices.tolist(), as_uint8(decode_latents(vae, sample_moments(moments, noise).to(vae.device)))


def identity(base: str | Path | None) -> str:
    """A hash of the weights of a folder (None: the miniature); a hub id as it is."""
    folder = miniature_path() if base is None else Path(base)
    if not folder.is_dir():
        return str(base)
    digest = hashlib.sha256()
    for file in sorted(folder.rglob("*.safetensors")):
        digest.update(file.read_bytes())
    return digest.hexdigest()
