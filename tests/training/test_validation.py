"""The validation loss: by hand, the same at every step and seed, and the best adapter by it."""

import json
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_pipeline

from onelora_diffusion import disable_adapter, load_adapter, read_adapter
from onelora_diffusion.cli.train_text_to_image import main, prepare_task
from onelora_diffusion.diffusion import add_noise
from onelora_diffusion.families import family_of
from onelora_diffusion.training import ema
from onelora_diffusion.training.prompt_settings import PromptSettings
from onelora_diffusion.training.randomness import VALIDATION, draw_step, keyed_generator
from onelora_diffusion.training.stopping import Clock, Stop
from onelora_diffusion.training.task import encode

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A base, and a folder of five pictures with captions of their own."""
    folder = tmp_path_factory.mktemp("validation")
    make_pipeline("sd3").save_pretrained(folder / "base")
    (folder / "signs").mkdir()
    for number in range(5):
        Image.new("RGB", (16, 16), (50 * number, 99, 0)).save(folder / "signs" / f"{number}.png")
        (folder / "signs" / f"{number}.txt").write_text(f"sign {number}")
    return folder


def settings_of(places, folder, **changes):
    short = dict(base=str(places / "base"), base_precision="fp32", images=str(places / "signs"), resolution=16)
    short |= dict(max_sequence_length=24, max_steps=4, batch_size=3, log_every=1, sample_every=0, checkpoint_every=2)
    short |= dict(learning_rate=0.05, validation_images=2, validate_every=2, ema_decay=(0.5,), output_dir=folder)
    return PromptSettings(**short | changes)


def validations_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        line["step"]: (line["validation_loss"], line["base_validation_loss"]) for line in lines if "loss" not in line
    }


@torch.no_grad()
def by_hand(places, run, held):
    """The mean loss of sd3, which learns ε - x, one sample at a time; and the base's."""
    pipeline = make_pipeline("sd3")
    family, model = family_of(pipeline), pipeline.transformer
    load_adapter(model, run)
    found = {True: [], False: []}
    for index in held:
        pixels = torch.from_numpy(np.array(Image.open(places / "signs" / f"{index}.png"))).permute(2, 0, 1)[None]
        mean, std = family.encode_images(pipeline.vae, pixels)[0]
        condition = family.encode_conditions(pipeline, [f"sign {index}"], 24)
        for time in range(4):
            random = keyed_generator(0, VALIDATION, 4 * index + time)
            posterior, noise = (torch.from_numpy(random.standard_normal(mean.shape, dtype=np.float32)) for _ in "ab")
            timestep = torch.tensor([int((time + random.random()) * 250)])
            assert 250 * time <= timestep < 250 * (time + 1)
            x = (mean + std * posterior)[None]
            noisy = add_noise(x, noise[None], timestep, pipeline.scheduler)
            times = pipeline.scheduler.timesteps.flip(0)[timestep]
            for adapted in found:
                with torch.no_grad() if adapted else disable_adapter(model):
                    prediction = family.predict(model, noisy, times, condition)
                found[adapted].append((prediction - (noise - x)).square().mean().item())
    return tuple(np.mean(found[adapted]) for adapted in (True, False))


def test_the_loss_of_images_that_are_not_trained_on_is_the_formulas_and_the_best_adapter_is_kept(places, tmp_path):
    runs = {name: tmp_path / name for name in ("best", "last", "halves", "seed")}
    assert main(settings_of(places, runs["best"], keep_best="validation_loss", max_steps=6)) == 0
    losses = validations_of(runs["best"])
    assert list(losses) == [2, 4, 6] and len({base for _, base in losses.values()}) == 1
    best = min(losses, key=lambda step: losses[step][0])
    adapter = read_adapter(runs["best"])
    assert (adapter.training["best"]["step"], adapter.training["best"]["validation_loss"]) == (best, losses[best][0])
    held = prepare_task(settings_of(places, tmp_path), Accelerator(cpu=True)).held_out
    assert len(held) == 2
    assert losses[best] == pytest.approx(by_hand(places, runs["best"], held), rel=1e-4)
    last = load_file(runs["best"] / "onelora_weights_last.safetensors")

    # Measuring changes nothing of the training; nor does a stop in between change what is measured.
    assert main(settings_of(places, runs["last"], max_steps=6, validate_every=3)) == 0
    for name, tensor in load_file(runs["last"] / "onelora_weights.safetensors").items():
        assert torch.equal(tensor, last[name])
    assert validations_of(runs["last"])[6] == losses[6] and set(validations_of(runs["last"])) == {3, 6}
    assert not (runs["last"] / "onelora_weights_last.safetensors").exists()
    assert main(settings_of(places, runs["halves"], keep_best="validation_loss", max_steps=4)) == 0
    assert main(settings_of(places, runs["halves"], keep_best="validation_loss", max_steps=6)) == 0
    assert validations_of(runs["halves"]) == losses
    assert read_adapter(runs["halves"]).training["best"]["step"] == best
    assert main(settings_of(places, runs["seed"], seed=7, max_steps=2)) == 0
    assert validations_of(runs["seed"])[2][1] == losses[2][1]  # the base's, of another seed


def test_images_that_are_held_out_are_never_in_a_batch(places, tmp_path):
    task = prepare_task(settings_of(places, tmp_path), Accelerator(cpu=True))
    assert sorted([*task.held_out, *task.learned_images]) == list(range(5))
    assert not {*task.held_out} & {*task.learned_images}


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(validation_images=5), "--validation-images 5 are more than signs: 5 images can spare"),
        (dict(validation_split="test"), "a folder has no split 'test': leave --validation-split out"),
        (dict(validation_images=0, validation_split="test"), "--validation-split test is not used"),
        (dict(validation_images=0, keep_best="validation_loss"), "never measured: give --validation-images"),
        (dict(keep_best="distance"), "--keep-best distance is never measured: give --eval-every"),
        (dict(validate_every=0), "--validate-every must be at least 1"),
    ],
)
def test_what_cannot_be_validated_is_one_line(places, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message):
        main(settings_of(places, tmp_path / "run", **changes))
    assert not (tmp_path / "run").exists()


def test_a_signal_ends_a_validation_but_not_the_return_of_trained_values(places, tmp_path, monkeypatch):
    """Values that were returned for some tensors alone would be a checkpoint of no step."""
    at_once, copy_values, inside, copied = Stop.at_once, ema.copy_values, [], []

    @contextmanager
    def watched(stop):
        with at_once(stop):
            inside.append(stop)
            yield
            inside.clear()

    def copy(tensors, values):
        copied.append(bool(inside))
        copy_values(tensors, values)

    monkeypatch.setattr(Stop, "at_once", watched)
    monkeypatch.setattr(ema, "copy_values", copy)
    assert main(settings_of(places, tmp_path / "run", max_steps=2)) == 0
    assert copied and not any(copied)


def test_prior_preservation_is_its_formula(places, tmp_path):
    """w · mean (ε(x_t, t, p) − ε_base(x_t, t, p))² on top of the loss, of each sample, computed one by one."""
    weight = 0.7
    settings = settings_of(places, tmp_path, prior_weight=weight, prior_prompt="a sign", validation_images=0)
    task = prepare_task(settings, Accelerator(cpu=True))
    trained = task.attach()
    with torch.no_grad():
        for number, tensor in enumerate(trained.values()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    prior = task.family.encode_conditions(task.pipeline, ["a sign"], 24)
    encode([task], Stop(Clock(), 1))
    task.open_caches()
    model, drops = task.pipeline.transformer, torch.tensor([False, True])
    moments = torch.stack([task.examples[index, False][0] for index in (0, 3)])
    drawn = draw_step(0, 0, 2, tuple(moments.shape[2:]), 1000, 0.0)
    conditions = task.conditions(torch.tensor([0, 3]), drops)
    plain = task.losses(model, moments, conditions, drawn)
    losses = task.losses(model, moments, conditions, drawn, keeps_prior=True)
    for sample in range(2):
        x = moments[sample, 0] + moments[sample, 1] * drawn.posterior_noise[sample]
        time = drawn.timesteps[sample : sample + 1]
        noisy = add_noise(x[None], drawn.noise[sample : sample + 1], time, task.pipeline.scheduler)
        times = task.pipeline.scheduler.timesteps.flip(0)[time]
        with torch.no_grad():
            found = task.family.predict(model, noisy, times, prior)
            with disable_adapter(model):
                wanted = task.family.predict(model, noisy, times, prior)
        expected = (found - wanted).square().mean()
        assert expected > 1e-4
        torch.testing.assert_close(losses["prior"][sample], expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(
            losses["loss"][sample], plain["loss"][sample] + weight * expected, rtol=1e-4, atol=0
        )
    gradients = torch.autograd.grad(losses["prior"].sum(), [*trained.values()])
    assert sum(gradient.abs().sum() for gradient in gradients) > 0
