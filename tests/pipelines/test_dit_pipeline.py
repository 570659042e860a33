import copy
import json

import pytest
import torch
from diffusers import DDIMScheduler, DiTPipeline
from rounding import rounding_of_images
from tiny_models import make_dit, make_dit_pipeline, randomize

from onelora_diffusion import (
    AdapterConfig,
    OneLoRADiTPipeline,
    inject_adapter,
    miniature_path,
    route_adapters,
    save_adapter,
    set_adapters,
)

FOOD = {0: "pizza", 1: "sushi", 2: "ice_cream"}
BIRDS = {0: "robin, redbreast", 1: "wren"}


def make_stock(num_classes=10):
    names = {label: f"number {label}, n{label}" for label in range(num_classes)}
    return make_dit_pipeline(make_dit(num_classes=num_classes), levels=1, id2label=names)


@pytest.fixture(scope="session")
def files(tmp_path_factory):
    configs = {
        "food": (AdapterConfig(num_classes=3), FOOD),
        "birds": (AdapterConfig(method="difffit", sum=True, num_classes=2), BIRDS),
        "style": (AdapterConfig(method="bitfit"), None),
    }
    folders = {}
    for seed, (name, (config, id2label)) in enumerate(configs.items()):
        folders[name] = tmp_path_factory.mktemp(name)
        model = randomize(inject_adapter(make_dit(), config), seed=seed)
        save_adapter(model, folders[name], id2label=id2label)
    return folders


@pytest.fixture
def pipe(files):
    pipe = OneLoRADiTPipeline.from_pipe(make_stock())
    pipe.set_progress_bar_config(disable=True)
    for name, folder in files.items():
        pipe.load_lora_weights(folder, adapter_name=name)
    return pipe


def run(pipe, class_labels, seeds=None, **kwargs):
    """(N, H, W, 3); image i from seed i."""
    count = 1 if isinstance(class_labels, int | str) else len(class_labels)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds or range(count)]
    images = pipe(class_labels, num_inference_steps=3, output_type="np", generator=generators, **kwargs).images
    return torch.from_numpy(images)


def close(a, b):
    return torch.allclose(a, b, rtol=0, atol=rounding_of_images(make_stock(), 3))


def test_without_adapters_it_is_the_stock_pipeline():
    stock = make_stock(num_classes=1000)
    stock.set_progress_bar_config(disable=True)
    pipe = OneLoRADiTPipeline.from_pipe(stock)
    expected = run(stock, [3, 999])
    assert torch.equal(run(pipe, [3, 999]), expected)
    assert torch.equal(run(pipe, ["number 3", "n999"]), expected)
    pipe.transformer.train()  # in which stock diffusers drops labels at random
    assert torch.equal(run(pipe, [3, 999], guidance="domain"), expected)
    assert pipe.transformer.training and pipe.transformer.transformer_blocks[1].training


def test_class_names_are_those_of_the_adapter_that_serves(pipe):
    pipe.set_adapters("food")
    assert pipe.get_label_ids("pizza") == [0]
    assert pipe.get_label_ids(["Ice cream", "sushi"]) == [2, 1]
    assert pipe.labels == {"pizza": 0, "sushi": 1, "ice_cream": 2}
    with pytest.raises(ValueError, match="no class 'robin' among the 3 of adapter 'food': there is"):
        pipe.get_label_ids("robin")
    pipe.set_adapters(["food", "birds", "style"])
    assert pipe.get_label_ids("redbreast") == [0]
    pipe.set_adapters("style")  # it brought no classes
    assert pipe.get_label_ids("number 7") == [7]
    assert pipe.get_label_ids(["n3", "wren"], adapter_names=[None, "birds"]) == [3, 1]
    pipe.disable_lora()
    assert pipe.get_label_ids("n9") == [9]


def test_labels_out_of_range_are_refused(pipe):
    pipe.set_adapters("food")
    with pytest.raises(ValueError, match="label 7 is none of the 3 classes of adapter 'food'"):
        pipe([7])
    with pytest.raises(ValueError, match="label -1 is none of the 10 classes of the base"):
        pipe([-1], adapter_names=[None])
    assert run(pipe, torch.tensor([[2], [3]])).shape == run(pipe, [2, 1000]).shape  # null by both its numbers
    assert torch.equal(run(pipe, [2, 3]), run(pipe, [2, 1000]))
    assert torch.equal(run(pipe, "sushi"), run(pipe, 1))


@pytest.mark.parametrize("guidance", ["cfg", "domain"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_adapters_by_sample(pipe, guidance, guidance_scale):
    names, labels = ["food", "birds", None, "style", "food"], ["sushi", "wren", "n7", 4, 0]
    settings = {"guidance": guidance, "guidance_scale": guidance_scale}
    together = run(pipe, labels, adapter_names=names, **settings)
    for i, (name, label) in enumerate(zip(names, labels, strict=True)):
        pipe.set_adapters([] if name is None else name)
        alone = run(pipe, [label], seeds=[i], **settings)
        assert close(together[i : i + 1], alone)
    pipe.set_adapters("food")
    assert torch.equal(run(pipe, [1], adapter_names="food"), run(pipe, [1], adapter_names=["food"]))
    with pytest.raises(ValueError, match="1 adapter names for 2 class labels"):
        pipe([0, 1], adapter_names=["food"])


def test_the_stock_call_can_be_routed_too(pipe):
    stock = pipe._stock()
    expected = run(pipe, [1, 1, 7], adapter_names=["food", "birds", None])
    with route_adapters(pipe.transformer, ["food", "birds", None]):
        assert torch.equal(run(stock, [1, 1, 7]), expected)


def test_scale_at_call_time_by_sample(pipe):
    half = {"cross_attention_kwargs": {"scale": 0.5}}
    together = run(pipe, [3, 4], adapter_names=["style", None], **half)
    pipe.set_adapters("style", 0.5)
    assert close(together[:1], run(pipe, [3]))
    pipe.set_adapters([])
    assert close(together[1:], run(pipe, [4], seeds=[1]))


@pytest.mark.parametrize("adapter", ["food", "style"])
def test_domain_guidance_equals_two_models(pipe, adapter):
    """ε = ε_base(x, t, ∅) + w · (ε_adapted(x, t, y) − ε_base(x, t, ∅)), step by step in a loop of its own."""
    base, w = make_dit(), 3.0
    pipe.set_adapters(adapter)
    out = run(pipe, [1, 2], guidance="domain", guidance_scale=w)

    scheduler = copy.deepcopy(pipe.scheduler)
    scheduler.set_timesteps(3)
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    x = torch.cat([torch.randn(1, 4, 8, 8, generator=generator) for generator in generators])
    with torch.no_grad():
        for t in scheduler.timesteps:
            adapted = pipe.transformer(x, timestep=t.expand(2), class_labels=torch.tensor([1, 2])).sample[:, :4]
            null = base(x, timestep=t.expand(2), class_labels=torch.tensor([10, 10])).sample[:, :4]
            x = scheduler.step(null + w * (adapted - null), t, x).prev_sample
        image = pipe.vae.decode(x / pipe.vae.config.scaling_factor).sample
    assert close(out, (image / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1))
    assert not close(out, run(pipe, [1, 2], guidance_scale=w))


def test_wrong_calls_change_nothing(pipe):
    pipe.set_adapters("food")
    before = run(pipe, [0, 1])
    for kwargs, message in [
        ({"guidance": "none"}, "unknown guidance 'none': choose cfg or domain"),
        ({"cross_attention_kwargs": {"gligen": 1}}, "knows no other than 'scale'"),
        ({"cross_attention_kwargs": {"scale": float("nan")}}, "must be a finite number"),
        ({"adapter_names": ["food", "fish"]}, "'fish' is not in the list of present adapters"),
    ]:
        with pytest.raises(ValueError, match=message):
            pipe([0, 1], **kwargs)
        assert torch.equal(run(pipe, [0, 1]), before)
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="food are merged: unmerge them"):
        pipe([0, 1], guidance="domain")
    with pytest.raises(ValueError, match="food are merged: unmerge them"):
        pipe([0, 1], adapter_names=["food", None])
    assert close(run(pipe, [0, 1]), before)


@pytest.mark.parametrize("adapter", ["food", "birds", "style"])
def test_a_fused_pipeline_is_a_plain_one_that_stock_diffusers_draws_the_same_with(pipe, tmp_path, adapter):
    pipe.set_adapters(adapter)
    labels = [1, 0] if adapter != "style" else [1, 9]
    expected = run(pipe, labels)
    with pytest.raises(ValueError, match=f"adapters {adapter} serve unfused, which a plain pipeline cannot hold"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    pipe.fuse_lora()
    pipe.save_pretrained(tmp_path)

    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "DiTPipeline" and index["transformer"] == ["diffusers", "DiTTransformer2DModel"]
    stock = DiTPipeline.from_pretrained(tmp_path)
    stock.set_progress_bar_config(disable=True)
    assert close(run(stock, labels), expected)
    assert stock.labels == pipe.labels
    table = stock.transformer.transformer_blocks[1].norm1.emb.class_embedder.embedding_table.weight
    assert table.shape == (1001, 32) and torch.equal(table[10], table[1000])
    assert not any("onelora" in key for key in stock.transformer.state_dict())
    pipe.unfuse_lora()
    assert torch.equal(run(pipe, labels), expected)


def test_the_base_keeps_its_names_when_no_adapter_serves(pipe, tmp_path):
    pipe.disable_lora()
    expected = run(pipe, [1, 2])
    pipe.save_pretrained(tmp_path)
    again = OneLoRADiTPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.labels == make_stock().labels
    assert torch.equal(run(again, [1, 2]), expected)


def test_more_classes_than_stock_has_room_for(tmp_path):
    pipe = OneLoRADiTPipeline.from_pipe(make_stock())
    inject_adapter(pipe.transformer, AdapterConfig(num_classes=1001))
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="has 1001 classes, but the base's class table only has room for 1000"):
        pipe.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_weights_of_blocks_and_interpolation(pipe):
    pipe.set_adapters(["food", "style"], [0.5, 0.5])
    with torch.no_grad():
        one = run(pipe, [1, 2])
        with route_adapters(pipe.transformer, [{"food": 0.5, "style": 0.5}]):
            assert close(run(pipe._stock(), [1, 2]), one)
    set_adapters(pipe.transformer, ["food", "style"], [{"transformer_blocks.0": 0.0}, 0.0])
    assert not close(run(pipe, [1, 2]), one)


def test_from_pipe_of_another_kind():
    from diffusers import DDPMPipeline, UNet2DModel

    unet = UNet2DModel(
        block_out_channels=(8, 8),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )
    other = DDPMPipeline(unet, DDIMScheduler())
    with pytest.raises(ValueError, match="OneLoRADiTPipeline is made from a DiTPipeline, not DDPMPipeline"):
        OneLoRADiTPipeline.from_pipe(other)


@pytest.mark.parametrize("base", [None, miniature_path()])
def test_the_miniature_loads_without_a_name_and_without_a_warning(base, monkeypatch):
    warnings = []
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.logger.warning", warnings.append)
    pipe = OneLoRADiTPipeline.from_pretrained(base)
    assert warnings == []
    stock = DiTPipeline.from_pretrained(miniature_path())
    assert len(warnings) == 1 and "id2label" in warnings[0]  # diffusers' own, of the texts that JSON has for keys
    assert pipe.labels == stock.labels
    weights = stock.transformer.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.transformer.state_dict().items())
