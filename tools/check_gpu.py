"""Check on a GPU what a CPU cannot show, in about ten minutes and without a download: a table, a row for each figure.

    python -m tools.check_gpu                        # on the GPU that is here
    python -m tools.check_gpu --output gpu.json      # and the same as JSON
    python -m tools.check_gpu --rehearse             # small, on the CPU: it shows that the checks run

The GPU's numbers are compared with the CPU's in float32, by products without TF32, and may differ by rounding. What
is timed is a random DiT-XL/2. The exit code is 1 if a row fails, or if there is no GPU.
"""

import copy
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import tyro
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.utils import collect_env
from tqdm import tqdm

from benchmarks import generate, speed
from benchmarks.measure import reset_peak_memory, resident_bytes
from benchmarks.measure import table as markdown_table
from benchmarks.peers import make_base, make_peer
from benchmarks.rounding import rounding
from benchmarks.sampled import sample_latents
from benchmarks.update import Update
from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter, save_adapter
from onelora_diffusion.config import METHODS
from onelora_diffusion.devices import DTYPES, peak_memory_bytes
from onelora_diffusion.evaluation.report import write_json
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.pipelines.dit import OneLoRADiTPipeline
from onelora_diffusion.sampling import SamplerSettings, generate_images, image_generators
from onelora_diffusion.sampling.schedulers import SAMPLERS

ROOT, CPU, WIDTH = Path(__file__).parents[1], torch.device("cpu"), 100
FLOW = FlowMatchEulerDiscreteScheduler().config
SMALL = {"width": 32, "heads": 2, "layers": 2, "sample_size": 8}
BATCH = 32  # of a timed step: an H100 then works for longer than its host needs to start the operators
STEPS, GUIDANCE_SCALE = 10, 2.0  # of samples that are compared
GUIDED = 2 * GUIDANCE_SCALE - 1  # guidance of w adds w times the rounding of one prediction, w - 1 times the other's
# 1LoRA's step over a rival's: 1.14 of BitFit's on paper, the others' at most; and 3 % for what a clock scatters.
STEP_LIMITS = {"BitFit": 1.17, "PEFT MiSS r=1": 1.03, "PEFT LoRA r=1": 1.03}


@dataclass
class Settings:
    """Compare a GPU with the CPU, time it, and say what holds."""

    rehearse: bool = False
    """Run on the CPU with small random models."""
    only: tuple[str, ...] = ("",)
    """Run the checks whose names begin like one of these."""
    compile: bool = True
    """Also time compiled steps, which takes some minutes."""
    output: Path | None = None
    """Write the rows there, as JSON."""


@dataclass
class Row:
    """A figure and the largest that it may be: without a limit only measured, without a figure not here."""

    name: str
    figure: float | None = None
    limit: float | None = None
    note: str = ""
    failed: bool = False

    @property
    def is_ok(self) -> bool:
        return not self.failed and (None in (self.figure, self.limit) or self.figure <= self.limit)

    def cells(self) -> list[str]:
        holds = "not here" if self.figure is None else "measured" if self.limit is None else "ok"
        numbers = ["" if number is None else f"{number:.3g}" for number in (self.figure, self.limit)]
        verdict = ": ".join(filter(None, [holds if self.is_ok else "FAIL", self.note]))
        return [self.name, *numbers, verdict]


@dataclass(frozen=True)
class Place:
    """Where the checks run, and how large."""

    device: torch.device
    is_rehearsal: bool
    compile: bool

    def base(self, layers: int = 28) -> nn.Module:
        """A random DiT-XL/2 of so many layers, on the CPU; in a rehearsal a small DiT."""
        return make_base(**SMALL) if self.is_rehearsal else make_base(1152, 16, layers)

    def time_limit(self, limit: float) -> float | None:
        """None in a rehearsal: times of a small model on a CPU say nothing."""
        return None if self.is_rehearsal else limit

    def precisions(self) -> list[str]:
        return [name for name in DTYPES if name != "fp16" or self.device.type != "cpu"]  # which has no arithmetic

    def refuse_waiting(self, refuse: bool) -> None:
        """Let PyTorch raise where it would wait for the GPU, or no longer."""
        if self.device.type == "cuda":
            torch.cuda.set_sync_debug_mode("error" if refuse else "default")


def checks(place: Place) -> dict[str, Callable[[Place], Iterator[Row]]]:
    """Each check by its name; it gives one row or several."""
    methods = [name for name in METHODS if not name.startswith("peft:")]
    return {
        **{f"DiT-XL/2 in {name}": partial(full_size, precision=name) for name in place.precisions()},
        **{f"gradients of {name}": partial(small_gradients, method=name) for name in methods},
        **{f"samples of {name}": partial(samples, sampler=name) for name in SAMPLERS},
        "samples of domain guidance": partial(samples, guidance="domain"),
        **{f"no waiting in an update of {name}": partial(no_waiting_in_training, method=name) for name in methods},
        **{f"no waiting in {name}": partial(no_waiting_in_sampling, sampler=name) for name in SAMPLERS},
        "no waiting in domain guidance": partial(no_waiting_in_sampling, guidance="domain"),
        "step": step_times,
        "memory": memory,
        **{f"generation in {name}": partial(generation, precision=name) for name in place.precisions()},
        "equal images": equal_images,
        **{f"{name} offload": partial(offload, kind=name) for name in ("model", "sequential")},
        "two processes": two_processes,
    }


def main(settings: Settings) -> int:
    if not (settings.rehearse or torch.cuda.is_available()):
        print("check_gpu.py: no CUDA device here; --rehearse runs the checks on the CPU, small")
        return 1
    place = Place(CPU if settings.rehearse else torch.device("cuda"), settings.rehearse, settings.compile)
    chosen = {name: check for name, check in checks(place).items() if name.startswith(settings.only)}
    rows = []
    for name, check in (progress := tqdm(chosen.items(), unit="check", leave=False)):
        progress.set_description(name)
        rows += run(name, check, place)
    about = machine(place)
    print("\n".join([", ".join(f"{key} {value}" for key, value in about.items()), "", *table(rows)]))
    if settings.output:
        write_json(settings.output, about | {"rows": [dataclasses.asdict(row) for row in rows]})
    return 0 if all(row.is_ok for row in rows) else 1


def run(name: str, check: Callable[[Place], Iterator[Row]], place: Place) -> list[Row]:
    """The rows of a check, as far as it comes: an exception is a row that fails, and ends no other check."""
    rows = []
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    try:
        rows.extend(check(place))
    except Exception as error:
        traceback.print_exc()
        rows.append(Row(name, note=f"{type(error).__name__}: {error}", failed=True))
    finally:
        place.refuse_waiting(False)
        torch.cuda.empty_cache()
    return rows


def machine(place: Place) -> dict:
    if place.is_rehearsal:
        return {"device": "CPU, a rehearsal", "torch": torch.__version__}
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    versions = {"torch": torch.__version__, "CUDA": torch.version.cuda, "driver": driver}
    return {"device": torch.cuda.get_device_name(place.device)} | versions


def table(rows: list[Row]) -> list[str]:
    cells = [row.cells() for row in rows]
    taken = sum(max(map(len, column)) for column in list(zip(*cells, ("", "figure", "limit", ""), strict=True))[:3])
    cells = [[*row[:3], textwrap.shorten(row[3], WIDTH - taken - 13, placeholder=" ...")] for row in cells]
    return markdown_table(["", "figure", "limit", ""], cells)


# ---------------------------------------------------------------------------------------------------
# The same numbers as on the CPU


def compared(name: str, found: Tensor, expected: Tensor, allowed: float) -> Row:
    """The largest difference, relative to the largest value, beside the rounding that is allowed."""
    expected = expected.double()
    return Row(name, float((found.double().cpu() - expected).abs().max() / expected.abs().max()), allowed)


def full_size(place: Place, precision: str) -> Iterator[Row]:
    peer = make_peer("1LoRA", place.base(), True)
    model = nn.Module.to(copy.deepcopy(peer), place.device, DTYPES[precision])
    for what, found, expected in zip(("output", "gradients"), derive(model), derive(peer), strict=True):
        yield compared(f"{what} of DiT-XL/2, {precision}", found, expected, rounding(model))


def small_gradients(place: Place, method: str) -> Iterator[Row]:
    model = small_model(method)
    expected, found = derive(model)[1], derive(small_model(method).to(place.device))[1]
    yield compared(f"gradients of {method}, small", found, expected, rounding(model))


def derive(model: nn.Module) -> tuple[Tensor, Tensor]:
    """A model's output, and in one row the gradients of all that trains, with the loss scaled as fp16 needs it."""
    latents, timesteps, labels, target = speed.make_batch(1, model.config.sample_size, model.device)
    output = model(latents.to(model.dtype), timesteps, labels).sample.float()
    (1024 * (output - target).square().mean()).backward()
    return output.detach(), torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def small_model(method: str) -> nn.Module:
    return moved(inject_adapter(make_base(**SMALL), AdapterConfig(method, num_classes=3))).train()


def miniature(device: torch.device) -> OneLoRADiTPipeline:
    """The embedded pipeline, whose latents stay as large as latents are, with a random adapter."""
    pipeline = OneLoRADiTPipeline.from_pipe(load_base())
    pipeline.set_progress_bar_config(disable=True)
    moved(inject_adapter(pipeline.transformer, AdapterConfig()))
    return pipeline.to(device)


@torch.no_grad()
def moved(model: nn.Module) -> nn.Module:
    """A model whose trained values are moved off their start."""
    generator = torch.Generator().manual_seed(0)
    for parameter in adapter_state_dict(model).values():
        parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    return model


def samples(place: Place, sampler: str = "ddim", guidance: str = "cfg") -> Iterator[Row]:
    expected, found = (sampled(device, sampler, guidance) for device in (CPU, place.device))
    allowed = GUIDED * STEPS * rounding(load_base().transformer)
    yield compared(f"samples of {sampler}, {guidance} guidance", found, expected, allowed)


def sampled(device: torch.device, sampler: str, guidance: str, on_step: Callable = lambda share: None) -> Tensor:
    pipeline, labels, generators = miniature(device), torch.arange(4), image_generators(0, range(4))
    options = {"num_inference_steps": STEPS, "guidance": guidance, "guidance_scale": GUIDANCE_SCALE}
    settings = SamplerSettings(sampler=sampler, **options)
    config = pipeline.scheduler.config if SAMPLERS[sampler].of_noise else FLOW
    return sample_latents(pipeline.transformer, config, labels, generators, settings, on_step=on_step)


# ---------------------------------------------------------------------------------------------------
# No step waits for the device: a wait is an exception, and so a row that fails


def no_waiting_in_training(place: Place, method: str) -> Iterator[Row]:
    update = Update(small_model(method).to(place.device), place.device)
    for autocast in (False, True):
        with torch.autocast(place.device.type, torch.bfloat16, enabled=autocast):
            update()  # the first copies tables to the device
            place.refuse_waiting(True)
            update()
            place.refuse_waiting(False)
    yield nothing_waited(f"no waiting in an update of {method}", place)


def no_waiting_in_sampling(place: Place, sampler: str = "ddim", guidance: str = "cfg") -> Iterator[Row]:
    name = f"no waiting in {sampler}, {guidance} guidance"
    if sampler == "ddpm":
        yield Row(name, note="its noise is drawn on the CPU")
        return
    sampled(
        place.device, sampler, guidance, on_step=lambda share: place.refuse_waiting(True)
    )  # so from the second step on
    yield nothing_waited(name, place)


def nothing_waited(name: str, place: Place) -> Row:
    note = "the meta device stands in"
    return Row(name, note=note) if place.is_rehearsal else Row(name, 0, 0)


# ---------------------------------------------------------------------------------------------------
# Time and memory


def step_times(place: Place) -> Iterator[Row]:
    """1LoRA's step over its rivals', bf16 over a base in bf16: of 28 layers, and of 4 compiled."""
    sizes = {"batch": 2, "rounds": 2} if place.is_rehearsal else {"batch": BATCH, "rounds": 10}
    settings = speed.SpeedSettings(conditioning=("stock",), roofline=False, device=place.device.type, **sizes)
    settings.peers = tuple(STEP_LIMITS)
    for layers, compiled in ((28, False), (4, True)) if place.compile else ((28, False),):
        base = place.base(layers).to(place.device, torch.bfloat16)
        for row in speed.measure_training(base, "bf16-base", compiled, settings):
            name = f"step{', compiled' * compiled}: 1LoRA"
            note = f"{1e3 * row['seconds']:.1f} ms, {len(base.transformer_blocks)} layers"
            if row["peer"] in STEP_LIMITS:
                limit = place.time_limit(STEP_LIMITS[row["peer"]])
                yield Row(f"{name} / {row['peer']}", row["ours_over_it"]["1LoRA"][0], limit, note)
            elif row["peer"] == "1LoRA":
                yield Row(f"{name}, seconds", row["seconds"], None, note)


def memory(place: Place) -> Iterator[Row]:
    """What the allocator gives, beside the bytes that are counted tensor by tensor."""
    base = place.base().to(place.device, torch.bfloat16)
    step = speed.Step(make_peer("1LoRA", base, True), "bf16-base", 2 if place.is_rehearsal else BATCH)
    step.train()  # from here on the optimiser's state is there, and the products' workspaces
    counted = step.saved_bytes()
    before = reset_peak_memory(place.device)
    if place.device.type == "cuda":
        loss = step.loss()
        kept = torch.cuda.memory_allocated() - before
        del loss
        yield Row("memory kept for backward, off the count", abs(kept / counted - 1), 0.05, f"{kept / 1e6:.1f} MB")
    else:
        yield Row("memory kept for backward", note="a CPU does not say it")
    step.train()
    note = f"kept {counted / 1e6:.1f}, resident {resident_bytes(step.model) / 1e6:.1f}"
    yield Row("memory of a step at its peak, MB more", (peak_memory_bytes(place.device) - before) / 1e6, None, note)


def generation(place: Place, precision: str) -> Iterator[Row]:
    small = SMALL | {"vae_channels": (8, 8), "images": (1, 2), "num_inference_steps": 2, "rounds": 1}
    sizes = small if place.is_rehearsal else {"images": (1, 16), "num_inference_steps": 10}
    settings = generate.GenerateSettings(padded=False, device=place.device.type, **sizes)
    for row in generate.measure(precision, False, settings)[0]:
        limit = place.time_limit(1.1) if row["model"] == "1LoRA, merged" else None
        name = f"{row['images']} in {precision}: {row['model']}, x stock"
        yield Row(name, row["over_stock"][0], limit, f"{row['images_per_second']:.2f} images/s")


# ---------------------------------------------------------------------------------------------------
# The same images and losses, however the work is laid out


def equal_images(place: Place) -> Iterator[Row]:
    """To the bit, where the networks always run on as many images (`--images-at-once`)."""
    pipeline, settings = miniature(place.device), SamplerSettings(num_inference_steps=STEPS)
    made = {}
    for size in (6, 3, 1):
        batches = generate_images(pipeline, [0] * 6, 0, range(6), settings, images_at_once=4, batch_size=size)
        made[size] = torch.cat([images for _, images in batches])
    for size in (3, 1):
        yield Row(f"values that differ in batches of {size}", int((made[size] != made[6]).sum()), 0, "4 at once")


def offload(place: Place, kind: str) -> Iterator[Row]:
    if kind == "sequential" and place.is_rehearsal:
        yield Row("images with sequential CPU offload", note="none from a CPU to itself")
        return
    original, pipeline = miniature(place.device), OneLoRADiTPipeline.from_pipe(load_base())
    pipeline.set_progress_bar_config(disable=True)
    allowed = GUIDED * STEPS * rounding(pipeline.transformer) + rounding(pipeline.vae.decoder)
    getattr(pipeline, f"enable_{kind}_cpu_offload")(device=place.device)
    with tempfile.TemporaryDirectory() as folder:
        pipeline.load_lora_weights(save_adapter(original.transformer, folder))
    yield compared(f"images with {kind} CPU offload", drawn(pipeline), drawn(original), allowed)


def drawn(pipeline: OneLoRADiTPipeline) -> Tensor:
    options = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE_SCALE, "output_type": "np"}
    return torch.from_numpy(pipeline([0, 1, 2, 3], generator=image_generators(0, range(4)), **options).images)


def two_processes(place: Place) -> Iterator[Row]:
    if not place.is_rehearsal and torch.cuda.device_count() < 2:
        yield Row("two processes", note="there is one card")
        return
    one, two = (losses_of(number, place) for number in (1, 2))
    yield compared("losses of two processes", two, one, len(one) * rounding(load_base().transformer))


def losses_of(num_processes: int, place: Place) -> Tensor:
    """Losses of the first updates of train_dit.py, started as its users do."""
    launch = f"-m accelerate.commands.launch --num_processes {num_processes} --num_machines 1 --mixed_precision no"
    launch += f" --dynamo_backend no {'--cpu' * place.is_rehearsal} train_dit.py --max-steps 5 --log-every 1"
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [sys.executable, *launch.split(), "--sample-every", "0", "--output-dir", str(run)]
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"train_dit.py ended with {done.returncode}: {done.stderr.strip().splitlines()[-1]}")
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return torch.tensor([line["loss"] for line in lines if "loss" in line])


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Settings, description=__doc__)))
