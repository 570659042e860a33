"""sample.py on a tiny pipeline: what it writes, whom it asks for, and how it fails."""

import errno
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_models import make_dit, make_dit_pipeline, randomize

from onelora_diffusion import AdapterConfig, inject_adapter, save_adapter
from onelora_diffusion.cli import sample
from onelora_diffusion.evaluation.sheets import HEADER
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.sampling import SamplerSettings, adapted, generate_images

FOODS = {0: "apple pie", 1: "pizza", 2: "sushi"}
REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A finished training run: an adapter that names its base."""
    folder = tmp_path_factory.mktemp("run")
    transformer = make_dit()
    make_dit_pipeline(transformer).save_pretrained(folder / "base")
    randomize(inject_adapter(transformer, AdapterConfig(num_classes=3)), scale=0.3)
    save_adapter(transformer, folder / "adapter", id2label=FOODS, base=str(folder / "base"))
    return folder / "adapter"


def settings_for(run_folder, output=None, **values):
    return sample.Settings(adapter=run_folder, output=output, num_inference_steps=2, **values)


def read_folder(folder):
    return np.stack([np.array(Image.open(file)) for file in sorted(folder.iterdir())])


def test_grid_has_a_row_for_each_class(run_folder, tmp_path):
    sample.main(settings_for(run_folder, tmp_path / "pngs", num_images=8))
    images = read_folder(tmp_path / "pngs")
    assert images.shape == (8, 16, 16, 3) and images.std() > 10

    sample.main(settings_for(run_folder, num_images=8, batch_size=8))
    assert sorted(file.name for file in run_folder.iterdir()) == ["onelora_weights.safetensors", "sample.png"]
    grid = np.array(Image.open(run_folder / "sample.png"))[:, -(3 * 66 + 2) :]  # without the names
    assert grid.shape[0] == 3 * 66 + 2
    for index in range(9):
        row, column = index % 3, index // 3
        tile = grid[2 + 66 * row :, 2 + 66 * column :][:64, :64]
        expected = images[index].repeat(4, 0).repeat(4, 1) if index < 8 else np.full((64, 64, 3), 255)
        assert np.array_equal(tile, expected)


def test_the_base_draws_beside_the_adapter_from_the_same_noise(run_folder, tmp_path):
    sample.main(settings_for(run_folder, tmp_path / "both.png", per_class=2, beside_base=True, guidance="domain"))
    sample.main(settings_for(run_folder, tmp_path / "adapter.png", per_class=2, guidance="domain"))
    base = load_base(str(run_folder.parent / "base"))
    settings = SamplerSettings(num_inference_steps=2, guidance_scale=4.0)
    drawn = generate_images(base, [0, 1, 2] * 2, 0, range(6), settings)
    images = torch.cat([images for _, images in drawn]).permute(0, 2, 3, 1).numpy()

    both, adapter = (np.array(Image.open(tmp_path / name)) for name in ("both.png", "adapter.png"))
    width, top = 2 * 66 + 2, 2 * HEADER  # the longer title is in two lines
    assert both.shape == (adapter.shape[0] + top, adapter.shape[1] + width, 3)
    assert np.array_equal(both[top:, width:][:, -width:], adapter[:, -width:])
    for index in range(6):
        row, column = index % 3, index // 3
        tile = both[top + 2 + 66 * row :, 2 + 66 * column :][:64, :64]
        # In a batch of its own: a value next to a half may round to the other byte.
        assert np.abs(tile.astype(int) - images[index].repeat(4, 0).repeat(4, 1)).max() <= 1


def test_npz_is_adms_and_holds_the_folders_images(run_folder, tmp_path):
    values = {"classes": ("Pizza", "apple_pie"), "num_images": 5, "sampler": "ddpm"}
    sample.main(settings_for(run_folder, tmp_path / "samples.npz", **values))
    sample.main(settings_for(run_folder, tmp_path / "pngs", **values))
    samples = np.load(tmp_path / "samples.npz")
    assert samples["arr_0"].dtype == np.uint8
    assert np.array_equal(samples["arr_0"], read_folder(tmp_path / "pngs"))
    assert samples["arr_1"].tolist() == [1, 0, 1, 0, 1]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["pngs", "samples.npz"]


def test_two_processes_write_what_one_writes(run_folder, tmp_path):
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    flags = ["--adapter", run_folder, "--output", tmp_path / "two.npz", "--num-inference-steps", "2"]
    flags += ["--num-images", "7", "--batch-size", "3", "--images-at-once", "4"]
    subprocess.run([*launch, "sample.py", *map(str, flags)], cwd=REPOSITORY, check=True)
    sample.main(settings_for(run_folder, tmp_path / "one.npz", num_images=7, images_at_once=4))
    one, two = np.load(tmp_path / "one.npz"), np.load(tmp_path / "two.npz")
    assert np.array_equal(one["arr_1"], two["arr_1"])
    assert np.array_equal(one["arr_0"], two["arr_0"])


def ctrl_c():
    signal.raise_signal(signal.SIGINT)


def sigterm():
    signal.raise_signal(signal.SIGTERM)


def full_disk():
    raise OSError(errno.ENOSPC, "No space left on device", "samples.npz")


def test_a_disk_that_is_full_is_said_with_the_file_and_leaves_no_half(run_folder, tmp_path, monkeypatch):
    def cut(part, frames, frame_rate):
        part.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")  # as writing says it, without a name

    monkeypatch.setattr(sample, "write_frames", cut)
    with pytest.raises(SystemExit, match="sample.py: .*pngs/000000.png: No space left on device"):
        sample.main(settings_for(run_folder, tmp_path / "pngs", num_images=2))
    assert not [*tmp_path.rglob("*.part")]


@pytest.fixture
def breaks_off(monkeypatch):
    """Lets runs draw their first images, and then something happen; returns the list of what they draw from now on."""

    def breaking_off(happens, number=None):
        drawn = []

        def some_images(pipeline, labels, seed, indices, *args, **settings):
            drawn.extend(indices[:number])
            yield from generate_images(pipeline, labels[:number], seed, indices[:number], *args, **settings)
            happens()

        monkeypatch.setattr(adapted, "generate_images", some_images)
        return drawn

    return breaking_off


@pytest.mark.parametrize(
    "happens, code, line",
    [
        (ctrl_c, 130, "sample.py: stopped by Ctrl-C"),
        (sigterm, 143, "sample.py: stopped by SIGTERM"),
        (full_disk, "sample.py: samples.npz: No space left on device", ""),
    ],
)
def test_a_run_that_breaks_off_keeps_its_images_and_goes_on(
    run_folder, tmp_path, breaks_off, capsys, happens, code, line
):
    settings = settings_for(run_folder, tmp_path / "samples.npz", num_images=3, images_at_once=1)
    (tmp_path / "samples.npz").write_bytes(b"an earlier run's")
    breaks_off(happens, number=2)
    with pytest.raises(SystemExit) as ended:
        sample.main(settings)
    said = capsys.readouterr().err
    assert ended.value.code == code and line in said
    kept = tmp_path / ".samples.npz.part"
    assert f"2 images are in '{kept}'; the same command goes on from there" in said
    assert (tmp_path / "samples.npz").read_bytes() == b"an earlier run's"
    with pytest.raises(SystemExit, match="keeps images of a run that ended early, with another seed: repeat its"):
        sample.main(replace(settings, seed=1))

    (kept / "000001.png").write_bytes(b"half written")
    drawn = breaks_off(lambda: None)
    sample.main(settings)
    assert drawn == [1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["samples.npz"]
    sample.main(replace(settings, output=tmp_path / "whole.npz"))
    one, other = (np.load(tmp_path / name)["arr_0"] for name in ("samples.npz", "whole.npz"))
    assert np.array_equal(one, other)


def test_images_are_written_where_they_stay(run_folder, tmp_path, monkeypatch, breaks_off):
    """Into a link, the current folder, and a folder that may not be moved, as a mount point; never into one twice."""
    for name in ("linked", "here", "mounted"):
        (tmp_path / "disk" / name).mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "disk" / "linked")
    (tmp_path / "disk" / "mounted" / "lost+found").mkdir()
    places = {"link": tmp_path / "link", "here": Path("."), "mounted": tmp_path / "disk" / "mounted"}
    monkeypatch.chdir(tmp_path / "disk" / "here")
    for place in places.values():
        sample.main(settings_for(run_folder, place, num_images=2))
        assert [path.name for path in sorted(place.glob("*.png"))] == ["000000.png", "000001.png"]
        with pytest.raises(SystemExit, match=f"--output '{place}' exists already; give a new folder"):
            sample.main(settings_for(run_folder, place, num_images=2))
    assert {path.name for path in (tmp_path / "disk").rglob("*")} == {
        *("linked", "here", "mounted", "lost+found", "000000.png", "000001.png")
    }

    breaks_off(ctrl_c, number=1)
    with pytest.raises(SystemExit):
        sample.main(settings_for(run_folder, tmp_path / "new", num_images=2))
    assert [path.name for path in (tmp_path / "new").glob("*.png")] == ["000000.png"]
    breaks_off(ctrl_c, number=0)
    with pytest.raises(SystemExit):
        sample.main(settings_for(run_folder, tmp_path / "deep" / "new", num_images=2))
    assert not (tmp_path / "deep").exists()


def test_a_second_run_with_one_output_is_refused_and_the_first_goes_on(run_folder, tmp_path, breaks_off):
    for name in ("samples.png", "samples.npz", "samples"):
        settings = settings_for(run_folder, tmp_path / name, num_images=2)

        def start_another(settings=settings):
            with pytest.raises(SystemExit, match="is being written by another process"):
                sample.main(replace(settings, seed=1))

        breaks_off(start_another, number=2)
        sample.main(settings)
    assert {file.name for file in tmp_path.iterdir()} == {"samples.png", "samples.npz", "samples"}


def test_a_picture_in_bf16_is_near_the_one_in_float32(run_folder, tmp_path, capsys):
    images = {}
    for precision in ("no", "bf16"):
        output = tmp_path / precision
        sample.main(settings_for(run_folder, output, num_images=3, mixed_precision=precision))
        images[precision] = read_folder(output).astype(float)
    said = capsys.readouterr().out
    assert "float32 on cpu, " in said and "bf16 on cpu, " in said and "(TF32" not in said
    apart = np.abs(images["bf16"] - images["no"])
    assert 0 < apart.mean() < 0.05 * images["no"].std() + 1  # bf16 keeps eight bits, and two steps add little


def test_compiles_the_blocks_and_draws_the_same(run_folder, tmp_path, monkeypatch):
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compiled.append(type(module).__name__))
    sample.main(settings_for(run_folder, tmp_path / "pngs", num_images=1, compile=True))
    assert compiled == ["BasicTransformerBlock"] * 2


@pytest.mark.parametrize(
    "values, message",
    [
        ({"classes": ("soup",)}, "no class 'soup'"),
        ({"num_inference_steps": 2000}, "takes 1 to 1000"),
        ({"guidance_interval": (900, 100)}, "guidance interval 900 to 100: give two timesteps from 0 to 999"),
        ({"mixed_precision": "fp16"}, "--mixed-precision fp16 needs a GPU: choose bf16 or no"),
        ({"images_at_once": 0}, "--images-at-once is 0; it must be at least 1"),
        ({"batch_size": 0}, "--batch-size is 0; it must be at least 1"),
        ({"adapter": Path("no-run")}, "no adapter at 'no-run': run train_dit.py first"),
        ({"base": "no-base"}, "base model 'no-base': no such folder"),
        ({"output": Path("samples.jpg")}, r"'samples.jpg': give a .png \(a grid\), an .npz or a folder"),
        ({"beside_base": True}, "'pngs': --beside-base makes a grid, a .png"),
        ({"output": Path("onelora_diffusion")}, "'onelora_diffusion' exists already; give a new folder"),
    ],
)
def test_wrong_flags_are_one_line(run_folder, values, message, monkeypatch):
    monkeypatch.chdir(REPOSITORY)
    with pytest.raises(SystemExit, match=f"^sample.py: .*{message}.*$"):
        sample.main(sample.Settings(**{"adapter": run_folder, "output": Path("pngs")} | values))
    assert not list(REPOSITORY.glob("*pngs*"))
