"""--subjects: an adapter for each subject from common batches, as from a run of its own; ends, joins and bad input."""

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_dit_pipeline, make_pipeline

from onelora_diffusion import read_adapter
from onelora_diffusion.cli import train_dit, train_text_to_image
from onelora_diffusion.training import task
from onelora_diffusion.training.prompt_settings import PromptSettings
from onelora_diffusion.training.settings import Settings
from onelora_diffusion.training.subjects import subjects_of

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

# AdamW divides a gradient by its own size, of which rounding is a large share where a sum nearly cancels. The input of
# PixArt's output layer is a layer norm's, whose sum does; so that layer is left out. Other draws differ by all that
# values move, four times the rate.
RATE, ROUNDED = 1e-3, 1e-5
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    make_pipeline("pixart").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """A folder of pictures for each of three subjects."""
    folder, random = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    for number, name in enumerate(("cat", "dog", "old car")):
        (folder / name).mkdir()
        for picture in range(2 + number):
            pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{picture}.png")
    return folder


@pytest.fixture
def settings(base, tmp_path):
    """The settings of a short run, changed as asked."""

    def of(folder, **changes):
        short = dict(base=str(base), base_precision="fp32", resolution=16, max_sequence_length=24, max_steps=4)
        short |= dict(
            batch_size=2, log_every=1, sample_every=0, checkpoint_every=2, learning_rate=RATE, targets=TARGETS
        )
        return PromptSettings(**short | dict(output_dir=tmp_path / folder, prompt="a {subject}") | changes)

    return of


def adapter_of(run):
    return load_file(run / "onelora_weights.safetensors")


def losses_of(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same_run(one, other, tolerance=0.0):
    assert losses_of(one) == pytest.approx(losses_of(other), rel=0, abs=tolerance)
    for name, tensor in adapter_of(one).items():
        assert torch.allclose(tensor, adapter_of(other)[name], rtol=0, atol=tolerance), name


@pytest.mark.parametrize(
    "changes",
    [
        dict(rates_by_sum=True, max_grad_norm=0.1, gradient_accumulation_steps=2, snr_gamma=5.0),
        dict(
            scale=True, gradient_checkpointing=True, prior_weight=0.5
        ),  # a bias of keys has no gradient but what rounding leaves
        dict(method="lora", rank=2, flip=True),
    ],
    ids=["sum", "sum and scale", "lora"],
)
def test_each_adapter_is_that_of_a_run_of_its_own(settings, photos, tmp_path, changes):
    table = tmp_path / "subjects.yaml"  # the first ends before the second, and the third takes its place
    rows = {"cat": {"max_steps": 2, "ema_decay": 0.5}, "dog": {"seed": 7, "learning_rate": 2 * RATE}, "old car": {}}
    rows = {name: values | {"images": str(photos / name)} for name, values in rows.items()}
    table.write_text(json.dumps({name: {key: str(value) for key, value in row.items()} for name, row in rows.items()}))
    pictures = dict(validation_prompt=("a {subject} at night",), sample_every=2, sample_steps=2)
    together = settings("all", subjects=table, subjects_at_once=2, **changes, **pictures)
    assert train_text_to_image.main(together) == 0
    for name, own in subjects_of(together).items():
        own.output_dir = tmp_path / "own" / name
        assert train_text_to_image.main(own) == 0
        run = together.output_dir / name
        assert_same_run(run, own.output_dir, ROUNDED)
        assert {path.name for path in run.iterdir()} == {path.name for path in own.output_dir.iterdir()}
        header, expected = (read_adapter(each) for each in (run, own.output_dir))
        assert (header.config, header.base) == (expected.config, expected.base)
        assert header.training["prompt"] == f"a {name}" and header.training["steps"] == (2 if name == "cat" else 4)
        grids = [
            np.array(Image.open(each / "samples/step-00000002.png")).astype(int) for each in (run, own.output_dir)
        ]
        assert np.abs(grids[0] - grids[1]).max() <= 1


def call_at(monkeypatch, number, function):
    """Calls a function inside a batch of the next run (1 is the first)."""
    losses, calls = task.training_losses, []

    def counted(*args):
        calls.append(1)
        if len(calls) == number:
            function()
        return losses(*args)

    monkeypatch.setattr(task, "training_losses", counted)


def test_a_command_that_was_stopped_goes_on_bit_for_bit_and_takes_new_subjects(
    settings, photos, tmp_path, monkeypatch, capsys
):
    whole, halves = settings("whole", subjects=photos), settings("halves", subjects=photos)
    assert train_text_to_image.main(whole) == 0
    with monkeypatch.context() as patch:
        call_at(patch, 3, lambda: signal.raise_signal(signal.SIGTERM))
        assert train_text_to_image.main(halves) == 143
    assert "The same command resumes." in capsys.readouterr().out
    assert train_text_to_image.main(halves) == 0
    for name in ("cat", "dog", "old car"):
        assert_same_run(whole.output_dir / name, halves.output_dir / name)
    # A run of its own goes on from there, and another subject is trained beside what is finished.
    own = subjects_of(settings("whole", subjects=photos, max_steps=6))["dog"]
    assert train_text_to_image.main(own) == 0 and len(losses_of(own.output_dir)) == 6
    more = tmp_path / "more.yaml"
    more.write_text(json.dumps({name: {"images": str(photos / name)} for name in ("dog", "cat")}))
    assert train_text_to_image.main(settings("halves", subjects=more)) == 0
    assert "halves/dog: finished at step 4, nothing to do" in capsys.readouterr().out


def test_a_subject_that_diverges_ends_alone(settings, photos, tmp_path, capsys):
    table = tmp_path / "subjects.yaml"
    rates = {"cat": RATE, "dog": 1e38, "old car": RATE}
    rows = {name: {"images": str(photos / name), "learning_rate": str(rate)} for name, rate in rates.items()}
    table.write_text(json.dumps(rows))
    together, others = settings("all", subjects=table), settings("others", subjects=tmp_path / "others.yaml")
    assert train_text_to_image.main(together) == 1
    said = capsys.readouterr().out
    assert "dog: loss is nan at step 2, with learning rate 1e+38; last good checkpoint: none. Start over" in said
    assert not (together.output_dir / "dog" / "onelora_weights.safetensors").exists()
    others.subjects.write_text(json.dumps({name: rows[name] for name in ("cat", "old car")}))
    assert train_text_to_image.main(others) == 0
    for name in ("cat", "old car"):
        assert_same_run(together.output_dir / name, others.output_dir / name, ROUNDED)


def test_sets_of_classes_train_together_each_with_its_own_table(tmp_path):
    make_dit_pipeline().save_pretrained(tmp_path / "base")
    for name, classes in {"pets": ("cat", "dog"), "signs": tuple("abcdefghijklm")}.items():
        for number, each in enumerate(classes):
            (tmp_path / "sets" / name / each).mkdir(parents=True)
            Image.new("RGB", (16, 16), (20 * number, 90, 0)).save(tmp_path / "sets" / name / each / "0.png")
    short = dict(base=str(tmp_path / "base"), max_steps=3, batch_size=4, log_every=1, sample_every=0, label_drop=0.5)
    short |= dict(learning_rate=RATE, eval_every=3, eval_images=4, eval_steps=2, eval_features="pixels")
    together = Settings(**short, subjects=tmp_path / "sets", output_dir=tmp_path / "all")
    assert train_dit.main(together) == 0
    for name, own in subjects_of(together).items():
        own.output_dir = tmp_path / "own" / name
        assert train_dit.main(own) == 0
        run = tmp_path / "all" / name
        lines = [json.loads((each / "metrics.jsonl").read_text().splitlines()[-1]) for each in (run, own.output_dir)]
        assert lines[0]["distance"] == pytest.approx(lines[1]["distance"], rel=1e-3)
        for key, tensor in adapter_of(own.output_dir).items():
            torch.testing.assert_close(adapter_of(run)[key], tensor, rtol=0, atol=ROUNDED)
        assert read_adapter(run).config.num_classes == (2 if name == "pets" else 13)


@pytest.mark.parametrize(
    "names, message",
    [
        ((), "has no folder of images: put one there for each subject"),
        (("cat", "empty"), "no images in .*empty"),
        (("cat", "Cat"), "Cat and cat are one name where capitals do not count"),
        (("cat", "latents"), "'latents' cannot be the name of a subject's folder"),
    ],
)
def test_folders_that_are_no_subjects_are_one_line_before_anything_is_written(settings, tmp_path, names, message):
    folder = tmp_path / "subjects"
    folder.mkdir()
    for name in names:
        (folder / name).mkdir()
        if name != "empty":
            Image.new("RGB", (16, 16)).save(folder / name / "0.png")
    assert_refused(settings("all", subjects=folder), message)


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty: give each subject"),
        ("null: {images: x}", "'' cannot be the name of a subject's folder"),
        ("a/b: {images: x}", "'a/b' cannot be the name of a subject's folder"),
        ("cat: {images: x, rank: 2}", "rank of cat is none of a subject's settings"),
        ("cat: photos", "cat has no settings"),
        ("cat: {images: x}\ncat: {images: y}", "cat stands there twice"),
        ("cat: {images: x, max_steps: 0}", "--max-steps must be at least 1"),
        ("cat: {prompt: x}", "nothing to learn"),
        ("cat: {images: nowhere}", "no folder nowhere"),
    ],
)
def test_tables_that_are_wrong_are_one_line_before_anything_is_written(settings, tmp_path, text, message):
    table = tmp_path / "table.yaml"
    table.write_text(text)
    assert_refused(settings("all", subjects=table), message)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(method="full"), "--method full does not go with --subjects"),
        (dict(method="difffit"), "training norms .--no-norms., which all samples of a batch share, does not go"),
        (dict(engine="fsdp2"), "--engine fsdp2 does not go with --subjects"),
        (dict(images="photos"), "--images is each subject's own"),
        (dict(subjects=Path("nowhere")), "--subjects nowhere is no folder"),
        (dict(subjects=Path("nowhere.yaml")), "--subjects nowhere.yaml: there is no such table"),
        (dict(subjects_at_once=0), "--subjects-at-once must be at least 1"),
    ],
)
def test_what_does_not_go_with_subjects_is_refused(settings, photos, changes, message):
    assert_refused(settings("all", **dict(subjects=photos) | changes), message)


def assert_refused(settings, message):
    with pytest.raises(SystemExit, match=message) as caught:
        train_text_to_image.main(settings)
    assert "\n" not in caught.value.code
    assert not settings.output_dir.exists()
