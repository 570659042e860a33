"""What guidance that is trained in is worth beside guidance that is sampled with, on digits."""

import io
import json
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import Accelerator

from benchmarks.measure import table
from onelora_diffusion.cli import eval_fid, train_dit
from onelora_diffusion.evaluation.settings import Generate
from onelora_diffusion.training.settings import parse_command_line


@dataclass
class GuidanceSettings:
    """Distance and recognition of digits without guidance, with it, and with guidance that is trained in."""

    strength: float = 1.5
    """w of guidance that is trained in; the others are drawn with what it becomes, 1 / (2 - w)."""
    steps: int = 400
    """Updates of each adapter."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Seeds of training and of the images' noise."""
    num_images: int = 500
    """Images that are measured."""
    num_inference_steps: int = 12
    """DDIM steps."""
    output_dir: Path = Path("runs/guidance")
    """Where runs and reports go; what is finished is not made again."""


def guidance(settings: GuidanceSettings) -> dict[str, list[tuple[float, float]]]:
    """Print a table, and return (distance, recognition in percent) of each seed by the kind of guidance."""
    w, trained = 1 / (2 - settings.strength), ["--trained-guidance", str(settings.strength), "--label-drop", "0"]
    late = [*trained, "--guidance-start", str(settings.steps // 2), "--guidance-cutoff", "0.5"]
    # The kind -> flags of training, strength and kind of the guidance that is drawn with.
    kinds = {
        "none": ([], 1.0, "cfg"),
        "classifier-free": ([], w, "cfg"),
        "domain": ([], w, "domain"),
        "trained in": (trained, 1.0, "cfg"),
        "trained in, late, below half the noise": (late, 1.0, "cfg"),
    }
    found = {kind: [measured(settings, seed, *how) for seed in settings.seeds] for kind, how in kinds.items()}
    rows = []
    for kind, values in found.items():
        passes = settings.num_inference_steps * (2 if kinds[kind][1] > 1 else 1)
        cells = [f"{np.mean(each):.2f} ± {np.std(each, ddof=1):.2f}" for each in zip(*values, strict=True)]
        rows.append([kind, str(passes), *cells])
    print(*table([f"guidance {w:g}", "passes a picture", "FD(pixels)", "recognition, %"], rows), sep="\n")
    return found


def measured(settings: GuidanceSettings, seed: int, flags: list[str], scale: float, kind: str) -> tuple[float, float]:
    """(distance, recognition in percent) of an adapter that is trained with flags, and draws with this guidance."""
    name = "-".join([*(flag.strip("-") for flag in flags), "seed", str(seed)])
    run = settings.output_dir / name.replace(".", "_")  # an adapter has the name of its folder, without dots
    common = f"--output-dir {run} --max-steps {settings.steps} --seed {seed} --sample-every 0 --max-train-time None"
    report = run / f"{kind}-{scale:g}.json"
    count = {"num_images": settings.num_images, "num_inference_steps": settings.num_inference_steps, "seed": seed}
    drawn = Generate(adapter=(run,), guidance=kind, guidance_scale=scale, compare_base=False, output=report, **count)
    if not report.exists():
        with redirect_stdout(io.StringIO()):
            train_dit.main(parse_command_line([*common.split(), *flags], train_dit.RECIPES))
            eval_fid.generate(drawn, Accelerator())
    values = json.loads(report.read_text())["results"]["adapted"]
    return values["distance"], 100 * values["recognition"]
