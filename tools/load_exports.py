"""Load both exports with diffusers and PEFT alone, and compare with what `check_exports.py` left beside them.

Runs in an environment without onelora-diffusion, started by check_exports.py; writes `found.json` into the folder.
"""

import importlib.util
import json
import sys
from pathlib import Path

import torch
from diffusers import DiTPipeline, SD3Transformer2DModel
from peft import PeftModel
from safetensors.torch import load_file


def main(folder: Path) -> None:
    if importlib.util.find_spec("onelora_diffusion") is not None:
        raise SystemExit(f"load_exports.py: {sys.executable} has onelora-diffusion, and is no test of doing without")
    expected, call = load_file(folder / "expected.safetensors"), json.loads((folder / "call.json").read_text())
    found = {}

    # (a) the merged pipeline, which knows the adapter's classes by name
    pipe = DiTPipeline.from_pretrained(folder / "merged")
    found["merged"] = images(pipe, call)

    # (b) the exported LoRA, by PEFT on the stock DiT, which diffusers gives no LoRA verbs
    pipe = DiTPipeline.from_pretrained(folder / "base")
    found["base"] = images(pipe, call)
    pipe.register_modules(transformer=PeftModel.from_pretrained(pipe.transformer, folder / "lora").get_base_model())
    found["lora"] = images(pipe, call)

    # and by diffusers' own verb on a stock SD3 transformer
    model = SD3Transformer2DModel.from_pretrained(folder / "sd3").eval()
    inputs = {name.removeprefix("sd3_input."): t for name, t in expected.items() if name.startswith("sd3_input.")}
    with torch.no_grad():
        found["sd3 base"] = model(**inputs).sample
        model.load_lora_adapter(folder / "sd3_lora", weight_name="pytorch_lora_weights.safetensors")
        found["sd3 lora"] = model(**inputs).sample

    differences = {
        f"{name} - {reference}": (found[name] - expected[reference]).abs().max().item()
        for name, reference in [("merged", "merged"), ("base", "merged"), ("lora", "lora"), ("base", "lora")]
        + [("sd3 lora", "sd3 lora"), ("sd3 base", "sd3 lora")]
    }
    (folder / "found.json").write_text(json.dumps(differences))


def images(pipe: DiTPipeline, call: dict) -> torch.Tensor:
    """(images, height, width, 3) in [0, 1]."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(call["seed"])
    steps = call["num_inference_steps"]
    class_labels = pipe.get_label_ids(call["class_names"])
    output = pipe(class_labels, generator=generator, num_inference_steps=steps, output_type="np")
    return torch.as_tensor(output.images)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
