"""train_text_to_image.py on a tiny pipeline of each family: what it learns, writes, and does not depend on."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import DiffusionPipeline, FluxPipeline
from launching import launch
from peft import PeftModel
from PIL import Image
from rounding import assert_rounded, rounding_of_images
from safetensors.torch import load_file, save_file
from tiny_models import NAMED, RESOLUTION, make_dit_pipeline, make_pipeline, randomize

from onelora_diffusion import (
    AdapterConfig,
    OneLoRALoaderMixin,
    disable_adapter,
    export_lora,
    inject_adapter,
    load_adapter,
    read_adapter,
    route_adapters,
    set_adapters,
)
from onelora_diffusion.cli import sample
from onelora_diffusion.cli.train_text_to_image import EMBEDDED, main, prepare_task
from onelora_diffusion.denoisers import choose_denoiser, denoiser_of
from onelora_diffusion.families import family_of
from onelora_diffusion.families.autoencoder import encode_moments
from onelora_diffusion.sampling import SamplerSettings, as_uint8, generate_images, image_generators
from onelora_diffusion.training.prompt_settings import HINTS, PromptSettings, parse_command_line
from onelora_diffusion.training.stopping import Clock, Stop
from onelora_diffusion.training.task import encode

pytestmark = pytest.mark.usefixtures("fresh_accelerate")

COLOURS = {
    "a red sign": (230, 20, 20),
    "a green sign": (20, 200, 40),
    "a blue sign": (20, 40, 230),
    "night": (5, 5, 5),
}
LENGTH = 24
TRAINED = [*NAMED, "sdxl"]  # of the recorded a UNet, whose pipeline scales what it is given
PARTS = ("transformer", "transformer_2")


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """A folder of each family's pipeline."""
    folder = tmp_path_factory.mktemp("bases")
    for name in [*TRAINED, "wan22"]:
        make_pipeline(name).save_pretrained(folder / name)
    return folder


@pytest.fixture(scope="module")
def signs(tmp_path_factory):
    """Four pictures of one colour each, with captions."""
    folder = tmp_path_factory.mktemp("data") / "signs"
    folder.mkdir()
    rows = []
    for number, (caption, colour) in enumerate(COLOURS.items()):
        Image.new("RGB", (40, 40), colour).save(folder / f"{number}.png")
        rows.append(json.dumps({"file_name": f"{number}.png", "text": caption}))
    (folder / "metadata.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def train(bases, signs, tmp_path):
    """Runs the script's main in this process; returns the run's folder."""

    def run(name, folder="run", exit_code=0, **changes):
        assert main(settings_of(bases, signs, tmp_path, name, folder, **changes)) == exit_code
        return tmp_path / folder

    return run


def settings_of(bases, signs, tmp_path, name, folder="run", **changes):
    short = dict(base=str(bases / name), base_precision="fp32", images=str(signs), output_dir=tmp_path / folder)
    short |= dict(
        resolution=RESOLUTION.get(name, 16), max_sequence_length=LENGTH, max_steps=4, batch_size=4, log_every=1
    )
    return PromptSettings(**short | dict(sample_every=0, checkpoint_every=2) | changes)


def adapter_of(run):
    return load_file(run / "onelora_weights.safetensors")


def losses_of(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines]


def draw(pipeline, name, prompts=tuple(COLOURS), **changes):
    """(prompts, 3, R, R) in [0, 1], each of its own noise."""
    pipeline.set_progress_bar_config(disable=True)
    arguments = dict(num_inference_steps=4, output_type="pt", height=RESOLUTION[name], width=RESOLUTION[name])
    arguments["generator"] = [torch.Generator().manual_seed(n) for n in range(len(prompts))]
    if name != "sdxl":
        arguments["max_sequence_length"] = LENGTH
    if name != "flux":
        arguments["guidance_scale"] = 1.0
    if name in ("pixart", "sana"):
        arguments["use_resolution_binning"] = False
    return pipeline(list(prompts), **arguments | changes).images


def loaded(bases, name):
    return OneLoRALoaderMixin.from_pipe(DiffusionPipeline.from_pretrained(bases / name))


def test_a_number_of_tokens_that_the_base_cannot_encode_is_named(train):
    """One token is less than SD3's pipeline takes from T5's and CLIP's; the stock call fails in its own words."""
    with pytest.raises(SystemExit, match="cannot be encoded to --max-sequence-length 1, where more may do: "):
        train("sd3", max_sequence_length=1)


@pytest.fixture
def copied(bases):
    """A base that a test may change: changes the first weights of a part by a function of their tensors by name."""

    def change(name, part, by):
        folder = shutil.copytree(bases / name, bases / "copied", dirs_exist_ok=True)
        (file,) = (folder / part).glob("*.safetensors")
        save_file(by(load_file(file)), file, {"format": "pt"})
        return folder

    yield change
    shutil.rmtree(bases / "copied")


def test_a_base_whose_weights_change_between_two_starts_is_noticed(train, copied):
    copied("sd3", "vae", dict)
    train("copied", max_steps=2)
    copied("sd3", "vae", lambda weights: {name: 1.01 * tensor for name, tensor in weights.items()})
    with pytest.raises(SystemExit, match="step-00000002.* was trained on other weights than .*copied has now"):
        train("copied")
    train("copied", allow_changed_settings=True)


def test_weights_that_a_base_lacks_are_named(train, copied):
    copied("sd3", "transformer", lambda weights: {n: w for n, w in weights.items() if n != "norm_out.linear.bias"})
    with pytest.raises(SystemExit, match="the files of its transformer lack norm_out.linear.bias"):
        train("copied")
    copied("sd3", "text_encoder_3", lambda weights: {n: w for n, w in weights.items() if not n.endswith("wo.weight")})
    with pytest.raises(SystemExit, match=r"files of its text_encoder_3 lack encoder\.block\.0\..*wo\.weight \(of "):
        train("copied")


@pytest.mark.parametrize("name", TRAINED)
def test_a_run_resumes_bit_for_bit_and_its_adapter_draws_everywhere_the_same(train, bases, name):
    whole = train(name, "whole", export_lora=(), learning_rate=0.05)
    halves = train(name, "halves", max_steps=2, learning_rate=0.05)
    assert halves == train(name, "halves", learning_rate=0.05)
    assert losses_of(whole) == losses_of(halves)
    for key, tensor in adapter_of(whole).items():
        assert torch.equal(tensor, adapter_of(halves)[key]), key

    adapter = read_adapter(whole)
    family = family_of(DiffusionPipeline.from_pretrained(bases / name))
    assert adapter.config.targets == family.targets and adapter.base == str(bases / name)
    assert (adapter.training["family"], adapter.training["dataset"], adapter.id2label) == (family.name, "signs", {})

    pipeline = loaded(bases, name)
    by_base = draw(pipeline, name)
    pipeline.load_lora_weights(whole)
    adapted = draw(pipeline, name)
    assert (adapted - by_base).abs().mean() > 1e-3
    tolerance = dict(rtol=0, atol=rounding_of_images(pipeline, 4))
    pipeline.fuse_lora()
    torch.testing.assert_close(draw(pipeline, name), adapted, **tolerance)
    stock = DiffusionPipeline.from_pretrained(bases / name)
    if hasattr(stock, "load_lora_weights"):
        stock.load_lora_weights(whole / "lora")
    else:  # diffusers has no such verb for PixArt
        stock.register_modules(
            transformer=PeftModel.from_pretrained(stock.transformer, whole / "lora").get_base_model()
        )
    torch.testing.assert_close(draw(stock, name), adapted, **tolerance)


@pytest.mark.parametrize("name", NAMED)
def test_a_run_learns_its_pictures(train, bases, signs, name):
    """The loss falls, and what is drawn of their captions comes nearer to them."""
    run = train(name, max_steps=60, learning_rate=0.05, ema_decay=(0.9,), checkpoint_every=60, caption_drop=0.0)
    losses = losses_of(run)
    assert np.mean(losses[-20:]) < 0.95 * np.mean(losses[:10])

    pipeline = loaded(bases, name)
    size = RESOLUTION[name]
    pixels = [torch.tensor(colour).view(3, 1, 1).expand(3, size, size) for colour in COLOURS.values()]
    wanted = encode_moments(pipeline.vae, torch.stack(pixels).to(torch.uint8))[:, 0]

    def distance():
        found = draw(pipeline, name, output_type="latent")
        found = FluxPipeline._unpack_latents(found, size, size, pipeline.vae_scale_factor) if name == "flux" else found
        return (found - wanted).square().mean().item()

    before = distance()
    pipeline.load_lora_weights(run)
    assert distance() < before


def test_two_transformers_are_trained_together_into_one_file(train, bases, tmp_path):
    with pytest.raises(SystemExit, match="WanPipeline has transformer and transformer_2: choose one, or both, by --d"):
        train("wan22")
    with pytest.raises(SystemExit, match="StableDiffusion3Pipeline has no transformer_2; it has transformer"):
        train("sd3", denoisers="transformer_2")
    with pytest.raises(SystemExit, match="StableDiffusion3Pipeline has no both; it has transformer"):
        train("sd3", denoisers="both")
    with pytest.raises(SystemExit, match="--sample-steps is 1001; this base takes 1 to 1000"):
        train("sd3", validation_prompt=("night",), sample_every=2, sample_steps=1001)
    with pytest.raises(SystemExit, match="--denoisers both trains no --subjects: choose transformer or transformer_2"):
        train("wan22", denoisers="both", subjects=tmp_path, images=None)
    shared = dict(denoisers="both", learning_rate=0.05, max_sequence_length=None)
    run = train("wan22", export_lora=(), **shared)
    halves = train("wan22", "halves", max_steps=2, **shared)
    assert halves == train("wan22", "halves", **shared) and losses_of(run) == losses_of(halves)
    tensors = adapter_of(run)
    assert all(torch.equal(tensor, adapter_of(halves)[key]) and tensor.any() for key, tensor in tensors.items())
    parts = [{key.removeprefix(f"{part}.") for key in tensors if key.startswith(f"{part}.")} for part in PARTS]
    assert parts[0] == parts[1] and len(parts[0]) * 2 == len(tensors)
    assert read_adapter(run).training["denoiser"] == "both" and read_adapter(run).is_of_two

    stock = DiffusionPipeline.from_pretrained(bases / "wan22")
    pipeline = loaded(bases, "wan22")

    def drawn(pipeline):
        pipeline.set_progress_bar_config(disable=True)
        settings = dict(height=16, width=16, num_frames=1, num_inference_steps=6, guidance_scale=1.0)
        return pipeline("night", generator=image_generators(0, [0]), output_type="pt", **settings).frames[0, 0]

    seen = [drawn(pipeline)]
    pipeline.load_lora_weights(run, "x", load_into_transformer_2=True)  # its part of the file alone
    seen.append(drawn(pipeline))
    pipeline.delete_adapters("x")
    pipeline.load_lora_weights(run)
    assert pipeline.get_list_adapters() == {part: ["default_0"] for part in PARTS}
    seen.append(drawn(pipeline))
    for second, part in enumerate(PARTS):
        stock.load_lora_weights(run / "lora" / part, load_into_transformer_2=bool(second))
    assert all((one - other).abs().max() > 1e-3 for one, other in zip(seen, seen[1:], strict=False))
    tolerance = dict(rtol=0, atol=rounding_of_images(pipeline, 4))
    torch.testing.assert_close(drawn(stock), seen[-1], **tolerance)
    pipeline.load_lora_weights(pipeline.lora_state_dict(run), "again")
    torch.testing.assert_close(drawn(pipeline), seen[-1], **tolerance)
    pipeline.load_lora_weights(halves, "again", hotswap=True)
    torch.testing.assert_close(drawn(pipeline), seen[-1], **tolerance)
    asked = dict(prompts=("night",), per_class=1, num_inference_steps=6, guidance_scale=1.0)
    sample.main(sample.Settings(adapter=run, output=tmp_path / "pngs", **asked))
    picture = torch.from_numpy(np.array(Image.open(tmp_path / "pngs/000000.png"))).permute(2, 0, 1)
    torch.testing.assert_close(picture / 255, seen[-1], rtol=0, atol=tolerance["atol"] + 0.5001 / 255)

    with pytest.raises(ValueError, match="is for transformer and transformer_2 of one pipeline: load it by the pipel"):
        load_adapter(stock.transformer, run)
    with pytest.raises(ValueError, match="adapter is for transformer and transformer_2, and WanPipeline has no tr"):
        OneLoRALoaderMixin.from_pipe(make_pipeline("wan")).load_lora_weights(run)
    with pytest.raises(ValueError, match="lora.safetensors' is a file: give a folder$"):
        choose_denoiser(stock, "both")
        export_lora(load_adapter(denoiser_of(stock), run), tmp_path / "lora.safetensors")


def assert_same_run(one, other, tolerance):
    np.testing.assert_allclose(losses_of(one), losses_of(other), rtol=0, atol=tolerance)
    for key, tensor in adapter_of(one).items():
        torch.testing.assert_close(tensor, adapter_of(other)[key], rtol=0, atol=tolerance)


def test_accumulation_checkpointing_and_compiled_blocks_change_nothing(train, monkeypatch):
    compiled = []

    def compile_eagerly(module):  # the default compiler takes minutes
        compiled.append(type(module).__name__)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_eagerly)
    one = train("flux", "one")
    assert_same_run(one, train("flux", "parts", gradient_accumulation_steps=2), 1e-5)
    assert_same_run(one, train("flux", "recomputed", gradient_checkpointing=True), 1e-5)
    assert_same_run(one, train("flux", "compiled", compile=True), 1e-5)
    assert compiled == ["FluxTransformerBlock", "FluxSingleTransformerBlock"]


def test_two_processes_that_share_out_the_base_train_what_one_does(train, bases, signs, tmp_path):
    name, run = "flux", tmp_path / "two"
    flags = f"--base {bases / name} --base-precision fp32 --images {signs} --output-dir {run} --engine fsdp2"
    flags += f" --resolution {RESOLUTION[name]} --max-sequence-length {LENGTH} --max-steps 4 --log-every 1"
    flags += " --validation-prompt night --sample-every 4 --sample-steps 2"
    launch("--num_processes", 2, "--cpu", "train_text_to_image.py", *flags.split())
    one = train(name, "one", validation_prompt=("night",), sample_every=4, sample_steps=2)
    assert_same_run(one, run, 1e-5)
    grids = [np.array(Image.open(each / "samples/step-00000004.png")).astype(int) for each in (run, one)]
    assert np.abs(grids[0] - grids[1]).max() <= 1


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_samples_are_of_the_adapter_and_of_the_base_below_the_same_noise(train, bases, name):
    prompts = ("night", "a bold Q")
    run = train(name, validation_prompt=prompts, sample_every=4, sample_steps=2, learning_rate=0.05)
    size = RESOLUTION[name] + 2
    grid = torch.from_numpy(np.array(Image.open(run / "samples" / "step-00000004.png"))).permute(2, 0, 1)
    assert grid.shape == (3, 2 * size + 2, 2 * size + 2)
    pipeline = loaded(bases, name)
    for row in range(2):
        if row:
            pipeline.load_lora_weights(run)
        for column, prompt in enumerate(prompts):
            noise, defaults = image_generators(0, [column]), {"guidance_scale": 7.0 if name == "sd3" else 3.5}
            expected = draw(pipeline, name, [prompt], generator=noise, num_inference_steps=2, **defaults)[0] * 255
            found = grid[:, row * size + 2 : (row + 1) * size, column * size + 2 : (column + 1) * size]
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=1.0)


def test_sample_draws_prompts_as_the_pipeline_does(train, bases, tmp_path):
    run = train("sd3", learning_rate=0.05)
    prompts = ("night", "a bold Q")
    short = dict(adapter=run, prompts=prompts, num_inference_steps=2)
    sample.main(sample.Settings(**short, num_images=3, output=tmp_path / "pngs"))
    pipeline = loaded(bases, "sd3")
    pipeline.load_lora_weights(run)
    for number, path in enumerate(sorted((tmp_path / "pngs").iterdir())):
        noise, defaults = image_generators(0, [number]), {"num_inference_steps": 2, "guidance_scale": 7.0}
        expected = draw(pipeline, "sd3", [prompts[number % 2]], generator=noise, **defaults)[0] * 255
        found = torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1)
        torch.testing.assert_close(found.float(), expected, rtol=0, atol=1.0)
    assert number == 2
    sample.main(sample.Settings(**short, per_class=2))
    assert Image.open(run / "sample.png").size[1] == 2 * 66 + 2

    for changes, message in (
        (dict(prompts=()), "draws prompts: give --prompts"),
        (dict(sampler="ddim"), "sampler 'ddim' is for classes"),
        (dict(resolution=15), "a resolution of 15 is no multiple of 2"),
        (dict(mixed_precision="fp16"), "--mixed-precision fp16 is for classes"),
    ):
        with pytest.raises(SystemExit, match=message):
            sample.main(sample.Settings(**short | changes))


@torch.no_grad()
def test_domain_guidance_leads_from_the_base_without_prompt_to_the_adapter():
    pipeline = make_pipeline("sd3")
    family, model = family_of(pipeline), pipeline.transformer
    prompt, empty = (family.encode_conditions(pipeline, [text], LENGTH) for text in ("night", ""))
    randomize(inject_adapter(model, AdapterConfig(targets=family.targets)), 0.2)
    settings = SamplerSettings(num_inference_steps=1, guidance_scale=3.0, guidance="domain")
    [(_, found)] = generate_images(pipeline, ["night"], 0, [0], settings, size=16, max_sequence_length=LENGTH)
    # One step of Euler's from pure noise, σ = 1, is x - v.
    noise = torch.randn(1, 4, 8, 8, generator=image_generators(0, [0])[0])
    time = torch.tensor([1000.0])
    adapted = family.predict(model, noise, time, prompt)
    with disable_adapter(model):
        base = family.predict(model, noise, time, empty)
    expected = as_uint8(family.decode(pipeline.vae, noise - (base + 3 * (adapted - base))))
    assert (found.int() - expected.int()).abs().max() <= 1
    with pytest.raises(ValueError, match="domain guidance leads from the empty prompt, from which Flux is not guided"):
        generate_images(make_pipeline("flux"), ["night"], 0, [0], settings)


def test_tensorboard_gets_the_pictures(train):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = train("sd3", validation_prompt=("night",), sample_every=2, sample_steps=1, track="tensorboard")
    events = EventAccumulator(str(run / "onelora-diffusion")).Reload()
    pictures = events.Images("samples")
    assert [(picture.step, picture.height, picture.width) for picture in pictures] == [(2, 38, 20), (4, 38, 20)]


def test_dropped_captions_train_the_empty_prompt(train):
    def losses(caption, drop):
        return losses_of(train("pixart", f"{caption}-{drop}", prompt=caption, caption_drop=drop))

    assert losses("night", 1.0) == losses("a bold Q", 1.0)
    assert losses("night", 0.0) != losses("a bold Q", 0.0)


def test_other_prompts_to_look_at_leave_the_captions_encoded(train, tmp_path):
    def encoded():
        return {path: path.stat().st_mtime_ns for path in tmp_path.glob("latents/prompts-*/shard-*")}

    train("pixart", "one", validation_prompt=("night",))
    before = encoded()
    train("pixart", "two", validation_prompt=("night", "a bold Q"))
    after = encoded()
    assert before.items() < after.items() and len(after) == len(before) + 1


def test_a_prompt_that_is_not_finite_is_one_line(train, bases, tmp_path):
    pipeline = DiffusionPipeline.from_pretrained(bases / "pixart")
    with torch.no_grad():
        pipeline.text_encoder.encoder.final_layer_norm.weight[0] = float("nan")
    pipeline.save_pretrained(tmp_path / "damaged")
    with pytest.raises(SystemExit, match="the prompt's encoding is not finite: check the weights") as caught:
        train("pixart", base=str(tmp_path / "damaged"))
    assert "\n" not in caught.value.code and caught.value.code.startswith("train_text_to_image.py: ")


def test_images_of_several_shapes_train_in_buckets(train, tmp_path):
    folder = tmp_path / "shapes"
    folder.mkdir()
    for number, size in enumerate([(40, 40), (80, 30), (30, 80), (44, 40)]):
        Image.new("RGB", size, (60 * number, 0, 0)).save(folder / f"{number}.png")
    run = train("sd3", images=str(folder), prompt="a sign", aspect_buckets=True, batch_size=2, max_steps=6)
    assert len(losses_of(run)) == 6 and np.isfinite(losses_of(run)).all()


def test_text_encoders_leave_memory(bases, signs, tmp_path):
    task = prepare_task(settings_of(bases, signs, tmp_path, "sd3"), Accelerator(cpu=True))
    encoders = [name for name in task.pipeline.components if name.startswith("text_encoder")]
    assert len(encoders) == 3 and all(getattr(task.pipeline, name) is not None for name in encoders)
    encode([task], Stop(Clock(), 1))
    task.open_caches()
    assert task.is_cached and all(getattr(task.pipeline, name) is None for name in encoders)
    prompts = task.conditions(torch.tensor([0, 3]), torch.tensor([False, True]))
    expected = family_of(make_pipeline("sd3")).encode_conditions(make_pipeline("sd3"), ["a red sign", ""], LENGTH)
    for key, tensor in expected.items():
        assert_rounded(prompts[key], tensor, terms=1000)


def test_sixteen_prompts_with_sixteen_adapters_in_one_batch_are_their_single_runs():
    pipeline, names = make_pipeline("sd3"), [f"style{number}" for number in range(16)]
    family, model = family_of(pipeline), pipeline.transformer
    for seed, name in enumerate(names):
        inject_adapter(model, AdapterConfig(targets=family.targets), name)
        randomize(model, 0.2, seed)
    prompts = [f"sign number {number}" for number in range(16)]
    with route_adapters(model, names):
        together = draw(pipeline, "sd3", prompts)
    for number, name in enumerate(names):
        set_adapters(model, name)
        alone = draw(pipeline, "sd3", [prompts[number]], generator=torch.Generator().manual_seed(number))[0]
        torch.testing.assert_close(together[number], alone, rtol=0, atol=rounding_of_images(pipeline, 4))
    assert (together[0] - draw(pipeline, "sd3", [prompts[0]])[0]).abs().mean() > 1e-3


def test_an_int8_base_trains_what_the_full_one_does(train, bases):
    pytest.importorskip("torchao", reason="torchao is not installed: make test-quantised")
    full, packed = train("flux", "full", base_precision="bf16"), train("flux", "packed", base_precision="int8")
    np.testing.assert_allclose(losses_of(packed), losses_of(full), rtol=0.05)
    assert {tensor.dtype for tensor in adapter_of(packed).values()} == {torch.float32}
    pipeline = loaded(bases, "flux")
    pipeline.load_lora_weights(packed)  # the same adapter fits the full base


def test_without_flags_words_for_digits_are_learned_and_drawn(tmp_path):
    settings = parse_command_line([], EMBEDDED)
    assert (settings.base, settings.images, settings.output_dir) == (None, None, Path("runs/digit-words"))
    run = tmp_path / "run"
    short = dict(output_dir=run, max_steps=4, sample_every=4, sample_steps=2, log_every=1)
    assert main(replace(settings, **short)) == 0
    adapter = read_adapter(run)
    assert (adapter.base, adapter.training["dataset"]) == (None, "handwritten digits")
    assert Image.open(run / "samples/step-00000004.png").size == (2 + 3 * 18, 2 + 2 * 18)
    drawn = sample.Settings(adapter=run, per_class=1, num_inference_steps=2, output=tmp_path / "pngs")
    sample.main(replace(drawn, export_lora=("comfyui",)))
    assert len(list((tmp_path / "pngs").iterdir())) == 10 and (run / "lora/comfyui_lora.safetensors").is_file()
    # One of the two alone is not the embedded job.
    assert parse_command_line(["--images", "signs"], EMBEDDED).max_steps == PromptSettings().max_steps


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(base=None), "no base: give the folder or hub id"),
        (dict(base="nowhere"), "base model 'nowhere': no such folder; give .* like black-forest-labs/FLUX.1-dev"),
        (dict(images=None), "nothing to learn: give a folder of images"),
        (dict(images="nowhere"), "no folder nowhere: give a folder of images"),
        (dict(resolution=15), "a resolution of 15 is no multiple of 2"),
        (dict(resolution=194), "does not take 194 by 194 pixels: Height .97. cannot be greater"),
        (dict(caption_drop=1.5), "--caption-drop is a share from 0 to 1, not 1.5"),
        (dict(snr_gamma=5.0), "--snr-gamma weighs the error of noise"),
        (dict(export_lora=(), bias=True), "adapter 'default' cannot be a LoRA"),
        (dict(targets=("to_z",)), "target 'to_z' matches no linear layer"),
        (dict(engine="fsdp2"), "fsdp2 shares the base out over several processes"),
        (dict(method="full", base_precision="bf16"), "full trains the base in float32"),
    ],
)
def test_what_is_wrong_is_one_line_and_nothing_is_written(bases, signs, tmp_path, changes, message):
    with pytest.raises(SystemExit, match=message) as caught:
        main(settings_of(bases, signs, tmp_path, "sd3", **changes))
    assert "\n" not in caught.value.code and caught.value.code.startswith("train_text_to_image.py: ")
    assert not (tmp_path / "run").exists()


def test_a_base_of_classes_is_refused_before_it_is_loaded(signs, tmp_path):
    make_dit_pipeline().save_pretrained(tmp_path / "dit")
    (tmp_path / "dit" / "transformer" / "config.json").unlink()
    settings = PromptSettings(base=str(tmp_path / "dit"), images=str(signs), output_dir=tmp_path / "run")
    with pytest.raises(SystemExit, match="dit' is a DiTTransformer2DModel, which draws classes and no"):
        main(settings)
    for damaged in ("{", "[]", '{"transformer": 3}'):
        (tmp_path / "dit" / "model_index.json").write_text(damaged)
        with pytest.raises(SystemExit, match="dit' has no readable model_index.json: "):
            main(settings)


def test_flags_are_read_over_a_recipe_and_diffusers_names_are_told_ours(tmp_path):
    (tmp_path / "signs.yaml").write_text("base: some/base\nimages: signs\nvalidation_prompt: [a, b]\n")
    flags = ["--config", str(tmp_path / "signs.yaml"), "--images", "others", "--bias"]
    settings = parse_command_line(flags, EMBEDDED)
    assert (settings.base, settings.images, settings.validation_prompt) == ("some/base", "others", ("a", "b"))
    assert settings.bias is True and settings.base_precision == "bf16"
    with pytest.raises(ValueError, match="--instance_prompt is a name of other scripts; here there is --prompt"):
        parse_command_line(["--instance_prompt", "x"], EMBEDDED)
    assert not set(HINTS) & {field for field in vars(settings)}
