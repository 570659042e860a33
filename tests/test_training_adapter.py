"""A frozen adapter that serves in training alone: by value the same as training on a base that it is merged into."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_models import make_pipeline

from onelora_diffusion import read_adapter
from onelora_diffusion.cli import sample
from onelora_diffusion.cli.train_text_to_image import main
from onelora_diffusion.training.prompt_settings import PromptSettings

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


def lora_of(name, folder, seed=0):
    """Write a random LoRA of rank 2 of a pipeline's transformer as diffusers does; return the transformer with it."""
    model, generator, tensors = make_pipeline(name).transformer, torch.Generator().manual_seed(seed), {}
    for path, layer in model.named_modules():
        if path.endswith(("attn.to_q", "attn.to_v")):
            up = torch.randn(layer.out_features, 2, generator=generator) * 0.6
            down = torch.randn(2, layer.in_features, generator=generator) * 0.6
            tensors |= {f"transformer.{path}.lora_B.weight": up, f"transformer.{path}.lora_A.weight": down}
            layer.weight.data += up @ down
    folder.mkdir()
    save_file(tensors, folder / "pytorch_lora_weights.safetensors")
    return model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A base, the same with a LoRA merged into it, LoRAs, and pictures."""
    folder = tmp_path_factory.mktemp("files")
    base = make_pipeline("sd3")
    base.save_pretrained(folder / "base")
    base.register_modules(transformer=lora_of("sd3", folder / "lora"))
    base.save_pretrained(folder / "fused")
    lora_of("sd3", folder / "other", seed=1)
    lora_of("flux", folder / "foreign")
    (folder / "signs").mkdir()
    for name, colour in {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (20, 40, 230)}.items():
        Image.new("RGB", (16, 16), colour).save(folder / "signs" / f"{name}.png")
        (folder / "signs" / f"{name}.txt").write_text(f"a {name} sign")
    return folder


def settings_of(files, output, base="base", **changes):
    own = dict(base=str(files / base), base_precision="fp32", images=str(files / "signs"), output_dir=output)
    own |= dict(resolution=16, max_sequence_length=24, max_steps=4, batch_size=2, log_every=1, checkpoint_every=2)
    own |= dict(sample_every=4, validation_prompt=("a red sign",), sample_steps=2)
    return PromptSettings(**own | dict(validation_images=1, validate_every=4) | changes)


def losses_of(run):
    """The losses by name and step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {(name, line["step"]): value for line in lines for name, value in line.items() if name.endswith("loss")}


def pictures_of(run):
    """The base's picture and the adapter's, in the last grid."""
    grid = np.array(Image.open(run / "samples" / "step-00000004.png")).astype(int)
    return grid[2:18, 2:18], grid[20:36, 2:18]


def test_training_beside_it_is_training_on_the_base_that_it_is_merged_into(files, tmp_path, capsys):
    lora, copy = files / "lora", tmp_path / "copy"
    beside, fused, bare = (tmp_path / name for name in ("beside", "fused", "bare"))
    assert main(settings_of(files, beside, training_adapter=str(lora), max_steps=2)) == 0
    assert f"{lora} serves in training; samples are drawn without it" in capsys.readouterr().out
    shutil.copytree(lora, copy)
    assert main(settings_of(files, beside, training_adapter=str(copy))) == 0  # resumed, from another place
    assert main(settings_of(files, fused, base="fused")) == main(settings_of(files, bare)) == 0

    own, of_fused, of_bare = (load_file(run / "onelora_weights.safetensors") for run in (beside, fused, bare))
    assert own.keys() == of_fused.keys() and not any("lora_A" in name for name in own)
    torch.testing.assert_close(own, of_fused, rtol=0, atol=2e-4)  # of steps of 1e-3, whose signs are Adam's
    assert max((own[name] - of_bare[name]).abs().max() for name in own) > 1e-3
    losses, expected = losses_of(beside), losses_of(fused)
    assert len(expected) == 4 + 2 and {name: losses[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert losses != pytest.approx(losses_of(bare), rel=1e-2)
    assert read_adapter(beside).training["training_adapter"] == "copy"

    base, adapted = pictures_of(beside)
    assert np.array_equal(base, pictures_of(bare)[0]) and np.abs(base - pictures_of(fused)[0]).max() > 2
    asked = ["--adapter", str(beside), "--prompts", "a red sign", "--num-inference-steps", "2", "--num-images", "1"]
    sample.run([*asked, "--output", str(tmp_path / "drawn.npz")])  # on the bare base, where the file loads
    assert np.abs(np.load(tmp_path / "drawn.npz")["arr_0"][0].astype(int) - adapted).max() <= 1


def test_another_training_adapter_is_refused_in_one_line(files, tmp_path):
    def refused(message, output="new", **changes):
        with pytest.raises(SystemExit) as ended:
            main(settings_of(files, tmp_path / output, **changes))
        assert message in ended.value.code and "\n" not in ended.value.code
        left = [path.name for path in (tmp_path / "new").rglob("*")]
        assert not [name for name in left if not name.startswith("clock")], left

    refused("foreign", training_adapter=str(files / "foreign"))
    refused("gone", training_adapter=str(files / "gone"))
    for flag, changes in {
        "--prior-weight": {"prior_weight": 1.0},
        "--subjects": {"subjects": files, "images": None},
        "--denoisers both": {"denoisers": "both"},
    }.items():
        refused(f"{flag} does not go with --training-adapter", training_adapter=str(files / "lora"), **changes)
    own = dict(output="run", sample_every=0, validation_images=0)
    of_run = {key: value for key, value in own.items() if key != "output"}
    assert main(settings_of(files, tmp_path / "run", training_adapter=str(files / "lora"), max_steps=2, **of_run)) == 0
    refused("was trained with another --training-adapter", training_adapter=str(files / "other"), **own)
    refused("was trained with one, and --training-adapter is none", **own)
