"""What precision and merging change in images of the miniature: grey levels, distance, recognition.

python train_dit.py && python tools/measure_precision.py
python tools/measure_precision.py runs/digits 500

With torchao, also what int8 weights change: those of the base before the adapter is loaded, so that directions of W0
are computed anew from rounded weights, and after it, so that they stay.
"""

import importlib.util
import sys
from pathlib import Path

import torch

from onelora_diffusion import load_adapter
from onelora_diffusion.data import load_dataset
from onelora_diffusion.devices import ComputeSettings
from onelora_diffusion.evaluation.evaluator import measure_images
from onelora_diffusion.evaluation.features import load_features
from onelora_diffusion.evaluation.formulas import frechet_distance
from onelora_diffusion.evaluation.images import DatasetImages, Source
from onelora_diffusion.evaluation.recognition import recognition_of
from onelora_diffusion.evaluation.report import format_table
from onelora_diffusion.injection.layers import target_layers
from onelora_diffusion.injection.merging import merge_adapter
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling import SamplerSettings, generate_images

DIGITS = [str(digit) for digit in range(10)]
WAYS = {  # name -> precision of the transformer and of the VAE, merged, when the base is packed into int8
    "float32": ("no", "no", False, None),
    "merged": ("no", "no", True, None),
    "bf16": ("bf16", "bf16", False, None),
    "bf16, merged": ("bf16", "bf16", True, None),
    "VAE in float32": ("bf16", "no", True, None),
}
if importlib.util.find_spec("torchao"):
    WAYS |= {"int8": ("no", "no", False, "before"), "int8 later": ("no", "no", False, "after")}


def main(adapter: Path, num_images: int) -> None:
    features = load_features("pixels", 16)
    real = DatasetImages(load_dataset("digits", resolution=16), 16)
    reference = measure_images(real.batches(range(len(real)), 64), real, [features]).measured[0].statistics
    recognition = recognition_of("digits", DIGITS, features, 16)
    images = {name: make(adapter, num_images, *way) for name, way in WAYS.items()}
    rows = {name: [] for name in ("FD(pixels)", "recognition", "values changed", "mean change", "largest change")}
    for made in images.values():
        batches = [(list(range(num_images)), made)]
        found = measure_images(batches, Source("made", 16), [features], recognition=recognition)
        change = (made.float() - images["float32"].float()).abs()
        rows["FD(pixels)"].append(f"{frechet_distance(found.measured[0].statistics, reference):.4f}")
        rows["recognition"].append(f"{found.recognition:.1%}")
        rows["values changed"].append(f"{(change > 0).float().mean():.2%}")
        rows["mean change"].append(f"{change.mean():.3f}")
        rows["largest change"].append(f"{change.max():.0f}")
    print(format_table(f"{num_images} digits, DDIM, 25 steps; changes in grey levels", list(images), rows))


def make(
    adapter: Path, num_images: int, precision: str, vae_precision: str, merge: bool, packed: str | None
) -> torch.Tensor:
    pipeline = load_base()
    if packed == "before":
        pack(pipeline.transformer)
    load_adapter(pipeline.transformer, adapter)
    if packed == "after":
        pack(pipeline.transformer)
    ComputeSettings(mixed_precision=precision).place(pipeline, torch.device("cpu"))
    if vae_precision == "no":
        pipeline.vae.float()
    if merge:
        merge_adapter(pipeline.transformer)
    settings = SamplerSettings(num_inference_steps=25, guidance_scale=2.0)
    labels = [index % len(DIGITS) for index in range(num_images)]
    return torch.cat([made for _, made in generate_images(pipeline, labels, 0, range(num_images), settings)])


def pack(transformer: torch.nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    layers = set(target_layers(transformer, None).values())
    quantize_(transformer, Int8WeightOnlyConfig(), filter_fn=lambda module, path: module in layers)


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "runs/digits"), int(sys.argv[2]) if len(sys.argv) > 2 else 500)
