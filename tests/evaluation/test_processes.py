"""Generated images and their metrics, by one, two and three processes, batch by batch of any size."""

import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_dit, make_dit_pipeline
from torch import distributed, multiprocessing

from onelora_diffusion.evaluation.features.pixels import PixelFeatures
from onelora_diffusion.evaluation.formulas import frechet_distance, kernel_distance
from onelora_diffusion.evaluation.images import share
from onelora_diffusion.evaluation.statistics import RunningStatistics
from onelora_diffusion.sampling import SamplerSettings, generate_images

NUM_IMAGES = 37  # a prime: no number of processes or batch size divides it
PROCESSES, BATCH_SIZES = (1, 2, 3), (1, 7, 64)


def evaluate(pipeline, indices, batch_size):
    """The images of one process, and what all processes together find of theirs."""
    running = RunningStatistics(PixelFeatures(16), keep=True)
    labels = [index % 5 for index in indices]
    made = {}
    settings = SamplerSettings(num_inference_steps=2, guidance_scale=1.5)
    for batch, images in generate_images(pipeline, labels, 0, indices, settings, batch_size=batch_size):
        running.update(batch, images)
        made |= dict(zip(batch, images, strict=True))
    return made, running.reduce(), running.gather_kept()


def _process(rank, folder):
    """One of three processes; the first also works alone, the first two as a pair."""
    torch.set_num_threads(1)
    pipeline = make_dit_pipeline(make_dit(num_classes=5))
    generator = torch.Generator().manual_seed(1)
    real = RunningStatistics(PixelFeatures(16), keep=True)
    real.update(list(range(50)), torch.randint(0, 256, (50, 3, 16, 16), dtype=torch.uint8, generator=generator))
    reference, kept_reference = real.reduce(), real.gather_kept()
    for world_size in PROCESSES:
        if rank >= world_size:
            continue
        rendezvous = f"file://{folder}/rendezvous-{world_size}"
        distributed.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=world_size)
        for batch_size in BATCH_SIZES:
            made, found, kept = evaluate(pipeline, share(NUM_IMAGES, rank, world_size), batch_size)
            everyone = [None] * world_size
            distributed.all_gather_object(everyone, made)
            if rank == 0:
                images = [image for each in everyone for image in sorted(each.items())]
                metrics = [frechet_distance(found, reference), *kernel_distance(kept, kept_reference)]
                tensors = {
                    "indices": torch.tensor([index for index, _ in images]),
                    "images": torch.stack([image for _, image in sorted(images)]),
                    "metrics": torch.tensor(metrics, dtype=torch.float64),
                    "count": torch.tensor(found.count),
                }
                save_file(tensors, f"{folder}/{world_size}-{batch_size}.safetensors")
        distributed.destroy_process_group()


def test_processes_and_batch_sizes_change_no_image_and_no_metric(tmp_path):
    multiprocessing.spawn(_process, (str(tmp_path),), nprocs=max(PROCESSES))
    names = [f"{world_size}-{batch_size}" for world_size, batch_size in itertools.product(PROCESSES, BATCH_SIZES)]
    first, *others = [load_file(tmp_path / f"{name}.safetensors") for name in names]
    assert first["images"].float().std() > 5 and len(first["images"].unique(dim=0)) == NUM_IMAGES
    for found in (first, *others):
        assert sorted(found["indices"].tolist()) == list(range(NUM_IMAGES)) and found["count"] == NUM_IMAGES
        assert torch.equal(found["images"], first["images"])
        assert found["metrics"].tolist() == pytest.approx(first["metrics"].tolist(), rel=1e-6)
