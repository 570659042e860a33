"""train_text_to_image.py and sample.py on a base that edits reference images."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from edit_pipelines import make_edit
from PIL import Image
from reading import load_captioned
from safetensors.torch import load_file

from onelora_diffusion import read_adapter
from onelora_diffusion.cli import sample
from onelora_diffusion.cli.train_text_to_image import main
from onelora_diffusion.serving.library import AdapterLibrary
from onelora_diffusion.training.prompt_settings import PromptSettings

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 40), "blue": (20, 40, 230)}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bases") / "kontext"
    make_edit("kontext").save_pretrained(folder)
    return folder


@pytest.fixture
def pairs(tmp_path):
    """Pictures and what they are edits of, of two shapes."""
    folder = tmp_path / "pairs"
    (folder / "before").mkdir(parents=True)
    rows = []
    for number, (name, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40, 40), colour).save(folder / f"{name}.png")
        before = f"before/{name}.png"
        Image.linear_gradient("L").resize((40 + 40 * (number == 1), 40)).save(folder / before)
        rows.append({"file_name": f"{name}.png", "text": f"make it {name}", "before": before})
    write(folder, rows)
    return folder


def write(folder, rows):
    (folder / "metadata.jsonl").write_text("\n".join(json.dumps(row) for row in rows))


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def settings_of(base, pairs, output, **changes):
    own = dict(base=str(base), base_precision="fp32", images=str(pairs), output_dir=output)
    own |= dict(
        reference_column=("before",),
        resolution=16,
        max_steps=4,
        batch_size=3,
        log_every=1,
        sample_every=0,
        checkpoint_every=2,
    )
    return PromptSettings(**own | changes)


def adapter_of(run):
    return load_file(run / "onelora_weights.safetensors")


def test_an_edit_is_learnt_resumed_bit_for_bit_and_drawn(base, pairs, tmp_path, capsys):
    shown = dict(sample_every=2, validation_prompt=("make it red", "make it blue"), sample_steps=2)
    shown |= dict(validation_reference=(pairs / "before" / "red.png",))
    run, other = tmp_path / "run", tmp_path / "other"
    assert main(settings_of(base, pairs, run, **shown)) == 0
    assert "of reference images: hidden_states" in capsys.readouterr().out
    assert main(settings_of(base, pairs, other, max_steps=2)) == main(settings_of(base, pairs, other)) == 0
    own, resumed = adapter_of(run), adapter_of(other)
    assert all(torch.equal(own[name], resumed[name]) for name in own) and any(own[name].any() for name in own)
    assert len(list((run / "samples").glob("*.png"))) == 2
    assert read_adapter(run).training["references"] == 1
    served = AdapterLibrary([tmp_path], read_adapter(run).fingerprint).entries()[0]
    assert served.problem == "edits reference images, which requests do not have"

    capsys.readouterr()
    asked = ["--adapter", str(run), "--prompts", "make it red", "make it blue", "--per-class", "1"]
    asked += ["--num-inference-steps", "2"]
    pictures = []
    for name in ("red", "green"):
        output = tmp_path / f"{name}.npz"
        reference = ["--reference", str(pairs / "before" / "red.png"), str(pairs / "before" / f"{name}.png")]
        sample.run([*asked, *reference, "--output", str(output)])
        pictures.append(torch.from_numpy(np.load(output)["arr_0"]))
    assert torch.equal(pictures[0][0], pictures[1][0]) and not torch.equal(pictures[0][1], pictures[1][1])
    for words, message in (
        ([], "edits 1 reference images of a prompt: give --reference"),
        (["--reference", *["a.png"] * 3], "--reference has 3 files: give 1 for all prompts, or 1 for each of the 2"),
        (["--reference", "a.png"], "--reference is a.png, and there is no such file"),
    ):
        with pytest.raises(SystemExit) as ended:
            sample.run([*asked, *words, "--output", str(tmp_path / "new.png")])
        assert message in ended.value.code and not (tmp_path / "new.png").exists()


def test_pictures_of_a_reference_that_was_changed_since_are_not_gone_on_with(tmp_path):
    reference, adapter = tmp_path / "house.png", SimpleNamespace(tensors={}, base=None)
    settings = sample.Settings(prompts=("make it red",), reference=(reference,))

    def begun(colour):
        Image.new("RGB", (40, 40), colour).save(reference)
        return sample.Pictures(tmp_path / "drawn.npz", settings, adapter, Accelerator())

    for _ in range(2):
        with begun("red") as pictures:
            pictures.keep("000000", np.zeros((4, 4, 3), np.uint8))
    with pytest.raises(ValueError, match="keeps images of a run that ended early, with another reference: repeat its"):
        begun("blue")


def test_what_references_cannot_be_is_one_line(base, pairs, tmp_path):
    rows, run = rows_of(pairs), tmp_path / "run"

    def refused(message, **changes):
        with pytest.raises(SystemExit) as ended:
            main(settings_of(base, pairs, run, **changes))
        assert message in ended.value.code and "\n" not in ended.value.code
        assert not run.exists() or not [*run.glob("*.safetensors"), *run.glob("metrics*")]
        assert not (tmp_path / "latents").exists()

    refused("line 1 of", reference_column=("after",))
    refused("--flip does not go with --reference-column", flip=True)
    refused("--prior-weight does not go with --reference-column", prior_weight=1.0)
    refused("FluxKontext draws images, and no clips of 5 frames: leave --frames out", frames=5)
    refused("--validation-reference is not used", validation_reference=(Path("a.png"),))
    refused("--validation-reference has 0 files: give 1", validation_prompt=("a bold Q",))
    refused("a resolution of 18 is no multiple of 4, which the model needs: give 16 or 20", resolution=18)
    refused("a resolution of 3 is no multiple of 4, which the model needs: give 4", resolution=3)
    refused("--resolution must be at least 1, not 0", resolution=0)
    write(pairs, [*rows[:2], rows[2] | {"before": "gone.png"}])
    refused("line 3 of")
    write(pairs, [*rows[:2], rows[2] | {"before": ""}])
    refused("has no reference image: name one in 'before', or take the image out")
    (pairs / "before" / "red.png").write_text("no picture")
    write(pairs, rows)
    refused("is not a readable image")
    (pairs / "metadata.jsonl").unlink()
    refused("'before' is a column of a table, metadata.jsonl or metadata.csv, and", prompt="make it red")


def test_references_are_no_pictures_without_captions_and_are_told_apart_by_content(pairs):
    first = load_captioned(pairs, resolution=16, reference_column=["before"])
    assert first.captions == ["make it blue", "make it green", "make it red"]
    assert [own[0].path.name for own in first.references] == ["blue.png", "green.png", "red.png"]
    of_one = load_captioned(pairs, "make it so", resolution=16, reference_column=["before"])
    assert of_one.captions == ["make it so"] * 3 and of_one.references == first.references
    Image.new("RGB", (40, 40)).save(pairs / "before" / "red.png")
    changed = load_captioned(pairs, resolution=16, reference_column=["before"]).references
    assert changed[:2] == first.references[:2] and changed[2] != first.references[2]
