"""What people ask for when they personalise: masks, orders of tags, repeats, a trigger word, a held-out folder."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from tiny_models import NAMED, make_pipeline

from onelora_diffusion import disable_adapter, load_adapter
from onelora_diffusion.cli import sample
from onelora_diffusion.cli.train_text_to_image import main, prepare_task
from onelora_diffusion.data.caption_texts import tag_orders, with_trigger
from onelora_diffusion.diffusion import add_noise, model_timesteps
from onelora_diffusion.families import family_of
from onelora_diffusion.serving.library import AdapterLibrary
from onelora_diffusion.storage.adapter_file import describe_adapter
from onelora_diffusion.training.prompt_settings import PromptSettings
from onelora_diffusion.training.randomness import (
    TAG_ORDERS,
    VALIDATION,
    StepKeyedBatches,
    caption_choices,
    draw_step,
    keyed_generator,
)
from onelora_diffusion.training.stopping import Clock, Stop
from onelora_diffusion.training.subjects import subjects_of
from onelora_diffusion.training.task import encode
from onelora_diffusion.training.weighting import min_snr_weights

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

TAGS = ("a, red, sign", "one, two, three, {trigger}", "night")
MASKED = {
    0: (slice(0, 8), slice(4, 16)),
    1: (slice(3, 16), slice(0, 6)),
}  # the white parts of masks of 16 by 16 pixels


def write_folder(folder, masks=MASKED):
    """Three pictures with tags, and masks of some of them."""
    folder.mkdir(parents=True)
    random = np.random.default_rng(3)
    for number, caption in enumerate(TAGS):
        pixels = random.integers(0, 256, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
        if number in masks:
            Image.fromarray(mask_of(number)).save(folder / f"{number}.mask.png")
    return folder


def mask_of(number):
    mask = np.zeros((16, 16), np.uint8)
    mask[MASKED[number]] = 255
    return mask


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    folder = tmp_path_factory.mktemp("personal")
    for name in NAMED:
        make_pipeline(name).save_pretrained(folder / name)
    write_folder(folder / "signs")
    write_folder(folder / "plain", masks={})
    return folder


@pytest.fixture
def settings(places, tmp_path):
    def of(folder="run", base="sd3", **changes):
        short = dict(base=str(places / base), base_precision="fp32", images=str(places / "signs"), resolution=16)
        short |= dict(max_sequence_length=24, max_steps=4, batch_size=4, log_every=1, sample_every=0, trigger="sks")
        return PromptSettings(**short | dict(checkpoint_every=2, output_dir=tmp_path / folder) | changes)

    return of


def prepared(settings):
    """A task with an adapter of some values, and all that it needs encoded."""
    task = prepare_task(settings, Accelerator(cpu=True))
    with torch.no_grad():
        for number, tensor in enumerate(task.attach().values()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    encode([task], Stop(Clock(), 1))
    task.open_caches()
    return task


def on_latents(mask, size):
    """The mean of a mask over each latent's pixels, (size, size) from 0 to 1."""
    cell = len(mask) // size
    return torch.from_numpy(mask.astype(np.float64).reshape(size, cell, size, cell).mean((1, 3)) / 255)


def losses_of(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


def adapter_of(run):
    return load_file(run / "onelora_weights.safetensors")


@pytest.mark.parametrize("base", ["pixart", "sd3", "flux"])
def test_a_masked_loss_is_its_formula_and_prior_preservation_has_no_mask(settings, base):
    """Σ m e² / Σ m on the grid of latents, also where the transformer takes them in packs of four."""
    gamma = 2.0 if base == "pixart" else None
    task = prepared(settings(base=base, prior_weight=0.5, prior_prompt="a sign", snr_gamma=gamma))
    numbers, flips = torch.tensor([0, 1, 2]), [False, True, False]
    moments = torch.stack([task.examples[number, False][0] for number in numbers.tolist()])
    drawn = draw_step(0, 0, 3, tuple(moments.shape[2:]), 1000, 0.0)
    conditions = task.conditions(numbers, torch.zeros(3, dtype=torch.bool))
    masks = task.data.masks_of(numbers, flips, moments.shape[-2:])
    arguments = task.pipeline.transformer, moments, conditions, drawn
    plain, masked = (task.losses(*arguments, each, keeps_prior=True) for each in (None, masks))
    torch.testing.assert_close(masked["prior"], plain["prior"], rtol=0, atol=0)

    x = moments[:, 0] + moments[:, 1] * drawn.posterior_noise
    scheduler, size = task.pipeline.scheduler, moments.shape[-1]
    with torch.no_grad():
        noisy, times = (
            add_noise(x, drawn.noise, drawn.timesteps, scheduler),
            model_timesteps(drawn.timesteps, scheduler),
        )
        output = task.family.predict(task.pipeline.transformer, noisy, times, conditions)[:, : x.shape[1]]
    error = (output - (drawn.noise if base == "pixart" else drawn.noise - x)).square().double()
    by_hand = [on_latents(mask_of(0), size), on_latents(mask_of(1)[:, ::-1], size), torch.ones(size, size)]
    for sample_of, mask in enumerate(by_hand):
        expected = (mask * error[sample_of]).sum() / mask.sum() / len(error[sample_of])
        torch.testing.assert_close(masked["mse"][sample_of].double(), expected, rtol=1e-5, atol=0)
        if sample_of < 2:
            assert abs(expected - error[sample_of].mean()) > 1e-3 * expected
    weights = 1 if gamma is None else min_snr_weights(drawn.timesteps, scheduler, gamma)
    expected = weights * masked["mse"] + masked.get("vb", 0) + 0.5 * masked["prior"]
    torch.testing.assert_close(masked["loss"], expected, rtol=1e-5, atol=0)
    for name in plain:  # without a mask, to the bit
        assert torch.equal(masked[name][2], plain[name][2]), name


def test_a_step_draws_flips_of_masks_and_orders_of_tags_by_its_number(settings, places):
    """The first loss of a run, in which the adapter is 0, from pictures, masks and prompts put together by hand."""
    asked = settings(
        flip=True, caption_shuffles=2, keep_tags=1, caption_drop=0.0, gradient_accumulation_steps=2, seed=7
    )
    assert main(replace(asked, max_steps=1)) == 0
    (found,) = losses_of(asked.output_dir)
    pipeline = make_pipeline("sd3")
    family, errors = family_of(pipeline), []
    keys = StepKeyedBatches(7, 0, 4, 3, True, []).global_batch(0)
    assert {flip for index, flip in keys if index in MASKED} == {False, True}
    choices = caption_choices(7, 0, 4, 3).tolist()
    for row, ((index, flip), choice) in enumerate(zip(keys, choices, strict=True)):
        order = tag_orders(TAGS[index], 2, 1, keyed_generator(7, TAG_ORDERS, index))[choice]
        prompt = with_trigger(order, "sks")
        assert "sks" in prompt and prompt.split(", ")[0] in ("sks", "one")
        pixels = np.array(Image.open(places / "signs" / f"{index}.png"))
        mask = mask_of(index) if index in MASKED else np.full((16, 16), 255)
        pixels, mask = (each[:, ::-1].copy() if flip else each for each in (pixels, mask))
        mean, std = family.encode_images(pipeline.vae, torch.from_numpy(pixels).permute(2, 0, 1)[None])[0]
        drawn = draw_step(7, 0, 4, tuple(mean.shape), 1000, 0.0)
        x, noise, time = mean + std * drawn.posterior_noise[row], drawn.noise[row], drawn.timesteps[row : row + 1]
        with torch.no_grad():
            output = family.predict(
                pipeline.transformer,
                add_noise(x[None], noise[None], time, pipeline.scheduler),
                model_timesteps(time, pipeline.scheduler),
                family.encode_conditions(pipeline, [prompt], 24),
            )
        m = on_latents(mask, mean.shape[-1])
        errors.append(((m * (output[0] - (noise - x)).square()).sum() / m.sum() / len(x)).item())
    assert found == pytest.approx(np.mean(errors), rel=1e-4)


def test_a_run_resumes_bit_for_bit_and_depends_on_no_split_and_no_cache(settings, places):
    all_of_it = dict(flip=True, caption_shuffles=3, learning_rate=0.05, validation_images=1, validate_every=2)
    whole, halves = settings("whole", **all_of_it), settings("halves", **all_of_it)
    assert main(whole) == 0
    assert main(replace(halves, max_steps=2)) == 0 and main(halves) == 0
    lines = [
        [{k: v for k, v in json.loads(line).items() if "loss" in k} for line in path.read_text().splitlines()]
        for path in (each.output_dir / "metrics.jsonl" for each in (whole, halves))
    ]
    assert lines[0] == lines[1]
    for name, tensor in adapter_of(whole.output_dir).items():
        assert torch.equal(tensor, adapter_of(halves.output_dir)[name])
    for name, changes in {"parts": dict(gradient_accumulation_steps=2), "uncached": dict(latent_cache_gb=0)}.items():
        other = settings(name, **all_of_it)
        for key, value in changes.items():
            setattr(other, key, value)
        assert main(other) == 0
        losses = [
            [
                line["loss"]
                for line in map(json.loads, (each.output_dir / "metrics.jsonl").read_text().splitlines())
                if "loss" in line
            ]
            for each in (whole, other)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    mask, before = places / "signs/0.mask.png", (places / "signs/0.mask.png").read_bytes()
    try:
        Image.fromarray(mask_of(1)).save(mask)
        with pytest.raises(SystemExit, match="was trained on other data"):
            main(replace(whole, max_steps=6))
    finally:
        mask.write_bytes(before)


def test_subjects_with_masks_and_without_are_runs_of_their_own(settings, places, tmp_path):
    table = tmp_path / "subjects.yaml"
    rows = {
        "masked": {"images": str(places / "signs"), "caption_shuffles": "2", "trigger": "sks {subject}"},
        "plain": {"images": str(places / "plain"), "trigger": "w"},
    }
    table.write_text(json.dumps(rows))
    targets = ("to_q", "to_k", "to_v", "to_out.0", "net.0.proj", "net.2")
    together = settings("all", base="pixart", images=None, subjects=table, flip=True, targets=targets, trigger=None)
    assert main(together) == 0
    for name, own in subjects_of(together).items():
        own.output_dir = tmp_path / "own" / name
        assert main(own) == 0
        run = together.output_dir / name
        assert losses_of(run) == pytest.approx(losses_of(own.output_dir), rel=1e-5)
        for key, tensor in adapter_of(own.output_dir).items():
            torch.testing.assert_close(adapter_of(run)[key], tensor, rtol=0, atol=1e-5)
        assert describe_adapter(run).training["trigger"] == ("sks masked" if name == "masked" else "w")


def test_images_count_as_often_as_their_repeats_say(settings, places, tmp_path):
    for number, folder in enumerate(("3_red", "2_blue", "plain")):
        (tmp_path / "kohya" / folder).mkdir(parents=True)
        Image.new("RGB", (16, 16), (90 * number, 0, 0)).save(tmp_path / "kohya" / folder / "0.png")
    asked = settings(images=str(tmp_path / "kohya"), prompt="a sign", repeats_by_folder=True)
    task = prepare_task(asked, Accelerator(cpu=True))
    assert task.learned_images.tolist() == [0, 0, 1, 1, 1, 2]  # 2_blue, 3_red, plain
    batches = StepKeyedBatches(0, 0, 4, 6, False, [], images=task.learned_images)
    shown = [index for step in range(3) for index, _ in batches.global_batch(step)]
    assert [shown.count(index) for index in range(3)] == [4, 6, 2]  # in two epochs
    assert np.array_equal(
        prepare_task(replace(asked, repeats_by_folder=False), Accelerator()).learned_images, range(3)
    )


@torch.no_grad()
def by_hand(places, run, folder):
    """The mean loss of a folder's pictures with an adapter of sd3, and without."""
    pipeline = make_pipeline("sd3")
    family, model = family_of(pipeline), pipeline.transformer
    load_adapter(model, run)
    found = {True: [], False: []}
    for index in range(3):
        pixels = torch.from_numpy(np.array(Image.open(folder / f"{index}.png"))).permute(2, 0, 1)[None]
        mean, std = family.encode_images(pipeline.vae, pixels)[0]
        condition = family.encode_conditions(pipeline, [with_trigger(TAGS[index], "sks")], 24)
        mask = on_latents(mask_of(index), mean.shape[-1]) if index in MASKED else torch.ones(mean.shape[-2:])
        for time in range(4):
            random = keyed_generator(0, VALIDATION, 4 * index + time)
            posterior, noise = (torch.from_numpy(random.standard_normal(mean.shape, dtype=np.float32)) for _ in "ab")
            timestep = torch.tensor([int((time + random.random()) * 250)])
            x = mean + std * posterior
            noisy = add_noise(x[None], noise[None], timestep, pipeline.scheduler)
            for adapted in found:
                with torch.no_grad() if adapted else disable_adapter(model):
                    output = family.predict(model, noisy, model_timesteps(timestep, pipeline.scheduler), condition)[0]
                found[adapted].append(((mask * (output - (noise - x)).square()).sum() / mask.sum() / len(x)).item())
    return tuple(np.mean(found[adapted]) for adapted in (True, False))


def test_the_loss_of_a_held_out_folder_is_the_formulas_and_nothing_of_it_is_trained_on(settings, places):
    asked = settings(images=str(places / "plain"), validation_images=places / "signs", validate_every=4)
    asked.learning_rate, asked.ema_decay, asked.caption_shuffles = 0.05, (0.5,), 2
    assert main(asked) == 0
    last = json.loads((asked.output_dir / "metrics.jsonl").read_text().splitlines()[-1])
    found = last["validation_loss"], last["base_validation_loss"]
    assert found == pytest.approx(by_hand(places, asked.output_dir, places / "signs"), rel=1e-4)
    task = prepare_task(asked, Accelerator(cpu=True))
    assert task.learned_images.tolist() == task.held_out.tolist() == [0, 1, 2] and task.data.held.masks
    other = settings("without", images=asked.images, learning_rate=0.05, ema_decay=(0.5,), caption_shuffles=2)
    assert main(other) == 0
    for name, tensor in adapter_of(other.output_dir).items():
        assert torch.equal(tensor, adapter_of(asked.output_dir)[name])


def test_subjects_are_validated_on_folders_of_their_names(settings, places, tmp_path):
    for name in ("cat", "dog"):
        write_folder(tmp_path / "photos" / name, masks={})
        write_folder(tmp_path / "held" / name)
    together = settings("all", images=None, subjects=tmp_path / "photos", validation_images=tmp_path / "held")
    own = subjects_of(together)
    assert own["dog"].validation_images == tmp_path / "held/dog" and own["dog"].images == str(tmp_path / "photos/dog")


def test_an_adapter_names_its_trigger_word_where_it_is_described(settings, capsys, tmp_path):
    asked = settings(max_steps=1, prompt="a {trigger} sign", validation_prompt=("[trigger] at night",), sample_every=1)
    assert main(replace(asked, sample_steps=1)) == 0
    assert "--prompts 'a sks sign'" in capsys.readouterr().out
    file = describe_adapter(asked.output_dir)
    assert (file.training["trigger"], file.training["prompt"]) == ("sks", "a sks sign")
    entry = AdapterLibrary([tmp_path], file.fingerprint).entry("run")
    assert (entry.trigger, entry.prompt) == ("sks", "a sks sign")
    drawn = dict(adapter=asked.output_dir, prompts=("night",), per_class=1, num_inference_steps=1)
    sample.main(sample.Settings(**drawn))
    assert "the adapter's trigger word: sks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(trigger=None), r"'one, two, three, \{trigger\}' has \{trigger\}: give the word by --trigger"),
        (dict(trigger=" "), "--trigger is ' ': give one, or leave it out"),
        (dict(training_adapter=""), "--training-adapter is '': give one, or leave it out"),
        (dict(max_sequence_length=0), "--max-sequence-length is 1 to 10,000 tokens, not 0"),
        (dict(max_sequence_length=10**6), "--max-sequence-length is 1 to 10,000 tokens, not 1000000"),
        (dict(validation_prompt=("[trigger]",), trigger=None, prompt="x"), r"'\[trigger\]' has \[trigger\]: give the"),
        (dict(keep_tags=1), "--keep-tags 1 is not used: give --caption-shuffles"),
        (dict(caption_shuffles=-1), "--caption-shuffles must be at least 0, not -1"),
        (dict(caption_shuffles=2, keep_tags=3), "--caption-shuffles 2 changes nothing: no caption has 5 tags"),
        (dict(caption_shuffles=2, prompt="a sign"), "--caption-shuffles 2 changes nothing: no caption has 2 tags"),
        (dict(repeats_by_folder=True, repeats_column="n"), "say the same twice"),
        (dict(repeats_by_folder=True), "finds no folder named like 3_cats"),
        (dict(mask_column="m"), "'m' is a column of a table"),
        (dict(validation_split="test", validation_images="plain"), "test is for a number of --validation-images"),
        (dict(validation_images="signs"), "signs and --images .*signs lie in one another: part them"),
        (dict(validation_images="."), "and --images .*signs lie in one another: part them"),
        (dict(validation_images="nowhere"), "no folder .*nowhere: give a folder of images"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(settings, places, changes, message):
    if isinstance(changes.get("validation_images"), str):
        changes = changes | {"validation_images": places / changes["validation_images"]}
    asked = settings(**changes)
    with pytest.raises(SystemExit, match=message) as caught:
        main(asked)
    assert "\n" not in caught.value.code and not asked.output_dir.exists()
