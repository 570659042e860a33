"""Guidance that is trained in: its target by two models, when it begins and at what noise, and how it is drawn."""

import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from safetensors.torch import load_file
from tiny_models import make_dit

from onelora_diffusion import OneLoRADiTPipeline, adapter_state_dict, inject_adapter, read_adapter
from onelora_diffusion.cli import sample
from onelora_diffusion.cli.train_dit import main, prepare_task
from onelora_diffusion.evaluation.settings import Generate
from onelora_diffusion.injection import routing
from onelora_diffusion.sampling.adapted import load_adapted
from onelora_diffusion.serving.library import AdapterLibrary
from onelora_diffusion.training.randomness import StepDraws, draw_step
from onelora_diffusion.training.settings import Settings
from onelora_diffusion.training.stopping import Clock, Stop
from onelora_diffusion.training.subjects import subjects_of
from onelora_diffusion.training.task import encode
from onelora_diffusion.training.trained_guidance import guidance_excess

pytestmark = pytest.mark.usefixtures("fresh_accelerate")


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A random pipeline of seven classes."""
    folder = tmp_path_factory.mktemp("base")
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(4, 4), norm_num_groups=4, **blocks)
    DiTPipeline(make_dit(num_classes=7), vae, DDIMScheduler(clip_sample=False)).save_pretrained(folder)
    return folder


@pytest.fixture
def settings(base, tmp_path):
    """The settings of a short run, changed as asked."""

    def of(name="run", **changes):
        short = dict(base=str(base), output_dir=tmp_path / name, max_steps=4, batch_size=8, log_every=1)
        return Settings(**short | dict(sample_every=0, learning_rate=1e-2, latent_cache=base / "latents") | changes)

    return of


def losses_of(run):
    return [json.loads(line)["loss"] for line in (run / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("method", ["1lora", "full"])
def test_the_loss_and_its_gradient_are_those_of_two_models(settings, base, method):
    """ε' = ε + (w − 1) · sg(ε_θ(x_t, c) − ε_base(x_t, ∅)), the base a model of its own, without adapters."""
    task = prepare_task(settings(method=method), Accelerator(cpu=True))
    trained = task.attach()
    with torch.no_grad():
        for number, tensor in enumerate(trained.values()):
            tensor += 0.1 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(number))
    encode([task], Stop(Clock(), 1))
    task.open_caches()
    model, labels, drops = task.pipeline.transformer, torch.tensor([3, 9, 5]), torch.tensor([False, False, True])
    moments = torch.stack([task.examples[index, False][0] for index in (0, 3, 4)])
    drawn = draw_step(0, 0, 3, tuple(moments.shape[2:]), 1000, 0.0)
    excess = torch.tensor([0.5, 2.0, 0.0])
    losses = task.losses(model, moments, task.conditions(labels, drops), drawn, guidance=excess)
    found = torch.autograd.grad(losses["mse"].sum(), [*trained.values()])

    source = DiTTransformer2DModel.from_pretrained(base, subfolder="transformer").eval()
    tuned = DiTTransformer2DModel.from_pretrained(base, subfolder="transformer").eval()
    own = adapter_state_dict(inject_adapter(tuned, task.config))
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(trained[name])
    signal = (1 - DDIMScheduler(clip_sample=False).betas).cumprod(0)[drawn.timesteps].view(-1, 1, 1, 1)
    clean = moments[:, 0] + moments[:, 1] * drawn.posterior_noise
    noisy = signal.sqrt() * clean + (1 - signal).sqrt() * drawn.noise
    with torch.no_grad():
        marginal = source(noisy, drawn.timesteps, class_labels=torch.full((3,), 7)).sample[:, :4]
    output = tuned(noisy, drawn.timesteps, class_labels=torch.where(drops, 10, labels)).sample[:, :4]
    target = drawn.noise + excess.view(-1, 1, 1, 1) * (output.detach() - marginal)
    expected = (output - target).square().mean((1, 2, 3))
    torch.testing.assert_close(losses["mse"], expected, rtol=1e-4, atol=0)
    wanted = torch.autograd.grad(expected.sum(), [*own.values()])
    largest = max(gradient.abs().max().item() for gradient in wanted)
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * largest)
    plain = task.losses(model, moments, task.conditions(labels, drops), drawn)
    torch.testing.assert_close(losses["vb"], plain["vb"], rtol=1e-6, atol=0)  # of the noise itself
    assert (losses["mse"] - plain["mse"])[:2].abs().min() > 1e-3 and losses["mse"][2] == plain["mse"][2]


def test_guidance_begins_late_and_is_cut_off_at_high_noise():
    settings = Settings(trained_guidance=3.0, guidance_start=5, guidance_cutoff=0.5)
    empty, times = torch.zeros(4), torch.tensor([0, 499, 500, 0])
    draws = StepDraws(empty, empty, times, torch.tensor([False, False, False, True]))
    assert guidance_excess(settings, 4, draws, 1000).tolist() == [0, 0, 0, 0]
    assert guidance_excess(settings, 5, draws, 1000).tolist() == [2, 2, 0, 0]
    assert guidance_excess(Settings(trained_guidance=1.5), 0, draws, 1000).tolist() == [0.5, 0.5, 0.5, 0]
    assert guidance_excess(Settings(), 0, draws, 1000).tolist() == [0, 0, 0, 0]


def test_a_run_is_the_plain_one_until_guidance_begins_and_resumes_bit_for_bit(settings):
    late = dict(trained_guidance=1.75, guidance_start=2)
    assert main(settings("plain")) == 0 and main(settings("whole", **late)) == 0
    for steps in (2, 4):
        assert main(settings("halves", **late, max_steps=steps)) == 0
    plain, whole, halves = (settings(name).output_dir for name in ("plain", "whole", "halves"))
    assert losses_of(plain)[:2] == losses_of(whole)[:2] and losses_of(plain)[2] != losses_of(whole)[2]
    tensors = [load_file(run / "onelora_weights.safetensors") for run in (whole, halves)]
    assert all(torch.equal(tensor, tensors[1][name]) for name, tensor in tensors[0].items())
    with pytest.raises(SystemExit, match="trained_guidance was 1.75 and is 1.25"):
        main(settings("halves", trained_guidance=1.25, guidance_start=2))


def test_subjects_that_are_at_different_steps_have_the_guidance_of_their_own(settings, tmp_path):
    random = np.random.default_rng(0)
    for subject in ("a", "b", "c"):
        for label in ("x", "y"):
            (tmp_path / "sets" / subject / label).mkdir(parents=True)
            pixels = random.integers(0, 255, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "sets" / subject / label / "0.png")
    late = dict(trained_guidance=1.5, guidance_start=2, batch_size=2, max_steps=3, learning_rate=1e-3)
    table = {name: {"data_root": str(tmp_path / "sets" / name)} for name in ("a", "b", "c")}
    table["a"]["max_steps"] = "1"  # the third begins as the second has made one update
    (tmp_path / "sets.yaml").write_text(json.dumps(table))
    together = settings("all", dataset="imagefolder", subjects=tmp_path / "sets.yaml", subjects_at_once=2, **late)
    assert main(together) == 0
    for name in ("b", "c"):
        own = subjects_of(together)[name]
        own.output_dir = tmp_path / "own" / name
        assert main(own) == 0
        assert losses_of(own.output_dir) == pytest.approx(losses_of(together.output_dir / name), rel=1e-5)


def test_an_adapter_with_guidance_says_so_and_is_drawn_without(settings, tmp_path, caplog):
    guided = settings(max_steps=1, trained_guidance=1.5, guidance_cutoff=0.5, sample_every=1, sample_steps=2)
    run = guided.output_dir
    assert main(guided) == 0
    said = {"trained_guidance": 1.5, "guidance_start": 0, "guidance_cutoff": 0.5}
    assert said.items() <= read_adapter(run).training.items()
    routing._warn_once.cache_clear()

    def warnings():
        return [record.getMessage() for record in caplog.records if record.name == routing.__name__]

    short = dict(adapter=run, num_inference_steps=2, per_class=1)
    drawn = load_adapted(None, {"default": run})
    asked = sample.load(sample.Settings(**short), torch.device("cpu"), tmp_path)[0]
    assert asked.guidance_scale == drawn.default_guidance(4.0) == 1 and load_adapted(None, {}).default_guidance(4) == 4
    assert Generate().with_defaults(drawn.defaults, drawn, True, False).guidance_scale == 1
    sample.main(sample.Settings(**short, guidance_scale=1.0))
    assert not warnings()
    sample.main(sample.Settings(**short, guidance_scale=2.0))
    trained = "is put on top of guidance 1.5 that was trained into adapter"
    alone = "1 draws with that alone, in half the time"
    assert warnings() == [f"guidance 2 {trained} 'default': {alone}"]
    pipe = OneLoRADiTPipeline.from_pretrained(str(settings().base))
    pipe.set_progress_bar_config(disable=True)
    pipe.load_lora_weights(run, adapter_name="guided")
    pipe([1, 2], adapter_names=[None, "guided"], guidance_scale=1.0, num_inference_steps=1)
    pipe([1], adapter_names=[None], num_inference_steps=1)
    assert len(warnings()) == 1
    pipe([1, 2], adapter_names=[None, "guided"], num_inference_steps=1)
    assert warnings()[1:] == [f"guidance 4 {trained} 'guided': {alone}"]
    asked = dict(class_labels=[1], num_inference_steps=1, output_type="np")
    default, one, four = (
        pipe(**asked, generator=torch.Generator().manual_seed(0), **given).images
        for given in ({}, {"guidance_scale": 1.0}, {"guidance_scale": 4.0})
    )
    assert np.array_equal(default, one) and not np.array_equal(default, four)
    entry = AdapterLibrary([run], read_adapter(run).fingerprint).entry("onelora_weights")
    assert entry.has_guidance


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(trained_guidance=0.5), "--trained-guidance must be at least 1 and below 2, not 0.5"),
        (dict(trained_guidance=2.0), "--trained-guidance must be at least 1 and below 2, not 2.0"),
        (dict(trained_guidance=1.5, guidance_cutoff=0.0), "--guidance-cutoff is a share above 0, at most 1, not 0.0"),
        (dict(trained_guidance=1.5, guidance_start=-1), "--guidance-start must be at least 0, not -1"),
        (dict(guidance_start=3), "are not used: give --trained-guidance"),
    ],
)
def test_wrong_settings_are_one_line(settings, changes, message):
    with pytest.raises(SystemExit, match=message):
        main(settings(**changes))
    assert not settings().output_dir.exists()
