"""Check that what leaves this library needs nothing of it: load both exports in an environment without it.

    python -m tools.check_exports                      # makes a fresh virtual environment first (a few minutes)
    python -m tools.check_exports --diffusers 0.36.0   # with another release of diffusers in it
    python -m tools.check_exports --python PATH        # the interpreter of an environment without onelora-diffusion

Exports (a) the miniature with an adapter merged into it, class table and class names included, and (b) adapters as
LoRA files, for that and for a small SD3 transformer. There, with diffusers and PEFT alone, the images must be those
that we drew here from the same noise, classifier-free guidance on. Exits with 1 if any is not.
"""

import json
import subprocess
import tempfile
import venv
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro
from diffusers import SD3Transformer2DModel
from safetensors.torch import save_file

from benchmarks.rounding import rounding
from benchmarks.tiny_dit import randomize
from onelora_diffusion import AdapterConfig, OneLoRADiTPipeline, export_lora, inject_adapter, save_adapter
from onelora_diffusion.pipelines.base import load_base

COMPANIONS = ("torch", "accelerate", "peft", "transformers")
STEPS, GUIDANCE_SCALE = 10, 4.0  # the stock pipeline's own scale


@dataclass
class Settings:
    """Export, load elsewhere, compare."""

    python: Path | None = None
    """Interpreter of an environment with diffusers and PEFT, without onelora-diffusion; None: make one."""
    diffusers: str = version("diffusers")
    """Release of diffusers in the environment that is made."""
    scale: float = 0.05
    """Standard deviation of the adapters' random values."""


def main(settings: Settings) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "exports"
        export(folder, settings.scale)
        python = settings.python or fresh_environment(Path(scratch) / "env", settings.diffusers)
        # -I: no current folder, no PYTHONPATH, no packages of the user
        subprocess.run([python, "-I", Path(__file__).with_name("load_exports.py"), folder], check=True, cwd=scratch)
        differences = json.loads((folder / "found.json").read_text())
    raise SystemExit(report(differences))


def export(folder: Path, scale: float) -> None:
    """Write both exports, the stock bases, and what we compute with the same adapters unmerged."""
    call = {"class_names": ["six", "nine"], "num_inference_steps": STEPS, "seed": 0}
    id2label = dict(enumerate(["five", "six", "seven", "eight", "nine"]))
    expected = {}
    for name, own_scale in (("base", 0.0), ("merged", scale)):  # the base has the class table and the names as well
        pipe = OneLoRADiTPipeline.from_pipe(load_base())
        randomize(inject_adapter(pipe.transformer, AdapterConfig(num_classes=5)), own_scale)
        save_adapter(pipe.transformer, folder / "adapter", id2label=id2label)
        pipe.unload_lora_weights()
        pipe.load_lora_weights(folder / "adapter")
        expected[name] = images(pipe, call)
        pipe.fuse_lora()
        pipe.save_pretrained(folder / name)

    pipe = OneLoRADiTPipeline.from_pretrained(folder / "base")
    randomize(inject_adapter(pipe.transformer, AdapterConfig()), scale)
    expected["lora"] = images(pipe, call)
    export_lora(pipe.transformer, folder / "lora")

    torch.manual_seed(0)
    model = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        joint_attention_dim=16,
        caption_projection_dim=32,
        pooled_projection_dim=8,
        out_channels=4,
    ).eval()
    model.save_pretrained(folder / "sd3")
    inputs = {
        "hidden_states": torch.randn(2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(2, 5, 16),
        "pooled_projections": torch.randn(2, 8),
        "timestep": torch.tensor([10, 700]),
    }
    randomize(inject_adapter(model, AdapterConfig()), scale)
    with torch.no_grad():
        expected["sd3 lora"] = model(**inputs).sample
    export_lora(model, folder / "sd3_lora")
    expected |= {f"sd3_input.{name}": tensor for name, tensor in inputs.items()}
    save_file({name: tensor.contiguous() for name, tensor in expected.items()}, folder / "expected.safetensors")
    (folder / "call.json").write_text(json.dumps(call))


def images(pipe: OneLoRADiTPipeline, call: dict) -> torch.Tensor:
    """(images, height, width, 3) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generator, steps = torch.Generator().manual_seed(call["seed"]), call["num_inference_steps"]
    output = pipe(call["class_names"], generator=generator, num_inference_steps=steps, output_type="np")
    return torch.as_tensor(output.images)


def fresh_environment(folder: Path, diffusers: str) -> Path:
    """A virtual environment with a release of diffusers, its companions as they are here, and nothing of ours."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    wanted = [f"diffusers=={diffusers}", *(f"{name}=={version(name)}" for name in COMPANIONS)]
    print(f"installing {' '.join(wanted)}", flush=True)
    subprocess.run([python, "-m", "pip", "install", "-qq", *wanted], check=True)
    return python


def report(differences: dict[str, float]) -> int:
    """Print the table; 0 if all is as it was here, else 1."""
    rows = [
        ("merged pipeline, DiTPipeline.from_pretrained", "merged - merged", "base - merged"),
        ("LoRA on a DiT, PeftModel.from_pretrained", "lora - lora", "base - lora"),
        ("LoRA on an SD3, load_lora_adapter", "sd3 lora - sd3 lora", "sd3 base - sd3 lora"),
    ]
    failed = False
    print("| largest difference from ours                 | export  | base alone |      |")
    print("|----------------------------------------------|--------:|-----------:|------|")
    tolerance = image_rounding()
    for name, exported, base in rows:
        # A base that is as near as the export would show that nothing was tested.
        passed = differences[exported] <= tolerance < differences[base] / 10
        failed |= not passed
        mark = "ok" if passed else "FAIL"
        print(f"| {name:44} | {differences[exported]:.1e} | {differences[base]:10.1e} | {mark:4} |")
    print(f"tolerance {tolerance:.0e}")
    return int(failed)


def image_rounding() -> float:
    """What the order of sums may change in an image in [0, 1]; the output of a single SD3 is well within it."""
    pipe = load_base()
    # Guidance of w adds w times the rounding of one prediction, w - 1 times the other's.
    return STEPS * (2 * GUIDANCE_SCALE - 1) * rounding(pipe.transformer) + rounding(pipe.vae.decoder)


if __name__ == "__main__":
    main(tyro.cli(Settings, description=__doc__))
