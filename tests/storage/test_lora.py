import copy
import json

import pytest
import torch
from rounding import assert_rounded
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny_models import dit_inputs, flux, make_dit, pixart, randomize, sana, sd3, unet

from onelora_diffusion import (
    AdapterConfig,
    OneLoRADiTPipeline,
    OneLoRALoaderMixin,
    adapter_state_dict,
    export_lora,
    inject_adapter,
    unload_adapter,
)
from onelora_diffusion.pipelines.base import load_base
from onelora_diffusion.storage.lora import import_foreign


@pytest.mark.parametrize("make", [flux, sd3, pixart, sana, unet])
def test_inject_train_export_and_stock_loading_gives_the_same_output(make, tmp_path):
    from peft import PeftModel

    torch.manual_seed(0)
    stock, inputs = make()
    model = inject_adapter(copy.deepcopy(stock), AdapterConfig())
    base = stock(**inputs).sample
    assert_rounded(model(**inputs).sample, base, model)

    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    (model(**inputs).sample - torch.randn_like(base)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():
        randomize(model, scale=0.02)
        expected = model(**inputs).sample
        assert not torch.allclose(expected, base, atol=1e-4)

        export_lora(model, tmp_path)
        if make is pixart:  # diffusers gives it no LoRA verbs
            stock = PeftModel.from_pretrained(stock, tmp_path)
        else:
            component = "unet" if make is unet else "transformer"
            stock.load_lora_adapter(str(tmp_path), weight_name="pytorch_lora_weights.safetensors", prefix=component)
        assert_rounded(stock(**inputs).sample, expected, stock)


def test_a_flux_is_adapted_in_all_its_blocks_and_not_at_its_output():
    model, _ = flux()
    paths = {key.removesuffix(".onelora_b") for key in adapter_state_dict(inject_adapter(model, AdapterConfig()))}
    assert "single_transformer_blocks.0.proj_out" in paths and "proj_out" not in paths


def test_stock_flux_pipeline_loads_the_export(tmp_path):
    from diffusers import FluxPipeline

    torch.manual_seed(0)
    stock, inputs = flux()
    model = randomize(inject_adapter(copy.deepcopy(stock), AdapterConfig()))
    export_lora(model, tmp_path)
    pipe = FluxPipeline(None, None, None, None, None, None, transformer=stock)
    pipe.load_lora_weights(tmp_path)
    with torch.no_grad():
        assert_rounded(stock(**inputs).sample, model(**inputs).sample, stock)


@pytest.mark.parametrize("fuse_qkv", [False, True])
def test_peft_loads_the_export_of_a_dit(tmp_path, fuse_qkv):
    from peft import PeftModel

    model, inputs = make_dit(), dit_inputs()
    randomize(inject_adapter(model, AdapterConfig(fuse_qkv=fuse_qkv)))
    export_lora(model, tmp_path)
    with torch.no_grad():
        expected = model(**inputs).sample
        loaded = PeftModel.from_pretrained(make_dit(), tmp_path).eval()
        assert_rounded(loaded(**inputs).sample, expected, loaded)


def test_the_export_is_ones_and_b(dit, tmp_path):
    randomize(inject_adapter(dit, AdapterConfig()))
    export_lora(dit, tmp_path, dtype=torch.bfloat16)
    lora = load_file(tmp_path / "pytorch_lora_weights.safetensors")
    own = adapter_state_dict(dit)
    assert len(lora) == 2 * len(own)
    for key, b in own.items():
        path = f"transformer.{key.removesuffix('.onelora_b')}"
        assert torch.equal(lora[f"{path}.lora_B.weight"][:, 0], b.bfloat16())
        assert torch.equal(lora[f"{path}.lora_A.weight"], torch.ones_like(lora[f"{path}.lora_A.weight"]))


@pytest.mark.parametrize(
    "config, reason",
    [
        (AdapterConfig(num_classes=3), "trains a class table"),
        (AdapterConfig(bias=True), "trains biases"),
        (AdapterConfig(scale=True), "trains scales"),
        (AdapterConfig(method="bitfit"), "no sum part"),
        (AdapterConfig(method="mora1"), "of method 'mora1'"),
    ],
)
def test_what_a_lora_cannot_carry_is_refused(dit, tmp_path, config, reason):
    inject_adapter(dit, config)
    with pytest.raises(ValueError, match=f"adapter 'default' cannot be a LoRA: .*{reason}.*save_pretrained"):
        export_lora(dit, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def peft_pair(config, tmp_path):
    """A stock DiT with random PEFT weights, saved in a folder, and what it computes."""
    from peft import get_peft_model

    model = get_peft_model(make_dit(), config)
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
        model.save_pretrained(tmp_path)
        return model.eval()(**dit_inputs()).sample


TARGETS = ["to_q", "to_k", "to_v", "ff.net.2", "proj_out_2"]


def loaded_output(tmp_path):
    from diffusers import DiTPipeline

    base = load_base()
    pipe = OneLoRADiTPipeline.from_pipe(DiTPipeline(make_dit(), base.vae, base.scheduler))
    pipe.load_lora_weights(tmp_path, adapter_name="x")
    with torch.no_grad():
        return pipe.transformer(**dit_inputs()).sample, pipe.transformer._onelora.configs["x"]


def test_a_miss_folder_of_rank_1_is_1lora(tmp_path):
    from peft import MissConfig

    expected = peft_pair(MissConfig(r=1, target_modules=TARGETS), tmp_path)
    out, config = loaded_output(tmp_path)
    assert config.method == "1lora"
    assert_rounded(out, expected, make_dit())


@pytest.mark.parametrize(
    "settings, rank",
    [
        ({"r": 3}, 3),  # of 32 inputs, two groups have one more
        ({"r": 4, "init_weights": "mini", "mini_r": 8}, 4),
        ({"r": 1, "init_weights": "mini", "mini_r": 1}, 1),
    ],
)
def test_miss_of_any_rank_is_1lora_of_that_rank(tmp_path, settings, rank):
    from peft import MissConfig

    expected = peft_pair(MissConfig(**settings, target_modules=TARGETS), tmp_path)
    out, config = loaded_output(tmp_path)
    assert (config.method, config.rank, config.compression) == ("1lora", rank, "sum")
    assert_rounded(out, expected, make_dit())


def test_bat_miss_is_refused(tmp_path):
    from peft import MissConfig

    peft_pair(MissConfig(r=2, init_weights="bat", target_modules=["to_q"]), tmp_path)
    with pytest.raises(ValueError, match="only the plain one and 'mini' are 1LoRA"):
        loaded_output(tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"rank": 3},
        {"compression": "outputs", "rank": 2},
        {"compression": "random"},
        {"compression": "singular", "rank": 2},
    ],
)
def test_a_higher_rank_and_other_compressions_are_loras_for_peft(tmp_path, config):
    from peft import PeftModel

    model = randomize(inject_adapter(make_dit(), AdapterConfig(targets=("to_q", "ff.net.2"), **config)))
    export_lora(model, tmp_path)
    expected = model(**dit_inputs()).sample
    theirs = PeftModel.from_pretrained(make_dit(), tmp_path)
    assert_rounded(theirs(**dit_inputs()).sample, expected, model)
    out, read = loaded_output(tmp_path)
    assert_rounded(out, expected, model)
    assert (read.method, read.rank) == (("1lora", 3) if config == {"rank": 3} else ("lora", config.get("rank", 1)))


@pytest.mark.parametrize(
    "settings, method",
    [
        ({"r": 2, "lora_alpha": 8}, "lora"),
        ({"r": 4, "lora_alpha": 8, "use_rslora": True}, "lora"),
        ({"r": 2, "lora_alpha": 6, "rank_pattern": {"to_q": 3}, "alpha_pattern": {"to_k": 1}}, "lora"),
        ({"r": 2, "lora_alpha": 2, "use_dora": True}, "dora"),
        ({"r": 2, "lora_alpha": 6, "lora_bias": True}, "lora"),
    ],
)
def test_ordinary_lora_and_dora_by_way_of_peft(tmp_path, settings, method):
    from peft import LoraConfig

    expected = peft_pair(LoraConfig(**settings, target_modules=TARGETS), tmp_path)
    out, config = loaded_output(tmp_path)
    assert config.method == method
    assert_rounded(out, expected, make_dit())


def test_a_lora_with_constant_rows_is_1lora_with_its_scale(tmp_path, dit):
    """B A x with A = ((2 … 2), (3 … 3)) and α/r = 4/2 is b Σx with b = 2 · (2 b₁ + 3 b₂)."""
    b1, b2 = torch.arange(32.0), torch.ones(32)
    tensors = {
        "transformer.transformer_blocks.0.attn1.to_q.lora.down.weight": torch.tensor([[2.0], [3.0]]).expand(2, 32),
        "transformer.transformer_blocks.0.attn1.to_q.lora.up.weight": torch.stack([b1, b2], 1),
        "transformer.transformer_blocks.0.attn1.to_q.alpha": torch.tensor(4.0),
    }
    save_file({k: t.contiguous() for k, t in tensors.items()}, tmp_path / "x.safetensors")
    pipe = OneLoRADiTPipeline.from_pipe(load_base())
    pipe.transformer = dit
    pipe.load_lora_weights(tmp_path, adapter_name="x")
    (vector,) = adapter_state_dict(dit, "x").values()
    assert torch.equal(vector, 2 * (2 * b1 + 3 * b2))


def test_the_bias_of_a_lora_with_constant_rows_is_beta(dit):
    """2/1 · (B 1ᵀx + bias) is b Σx + β with b = 2 B and β = 2 bias; a layer without one has β = 0."""
    ones, b, bias = torch.ones(1, 32), torch.arange(32.0).unsqueeze(1), torch.arange(32.0)
    tensors = {
        "transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": ones,
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight": b,
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.bias": bias,
        "transformer.transformer_blocks.1.attn1.to_q.lora_A.weight": ones,
        "transformer.transformer_blocks.1.attn1.to_q.lora_B.weight": b,
    }
    file = import_foreign(dit, tensors, {"lora_alpha": 2}, "it")
    assert (file.config.method, file.config.bias) == ("1lora", True)
    first, second = (f"transformer_blocks.{i}.attn1.to_q.onelora_" for i in (0, 1))
    assert torch.equal(file.tensors[f"{first}b"], 2 * b[:, 0]) and torch.equal(file.tensors[f"{first}beta"], 2 * bias)
    assert torch.equal(file.tensors[f"{second}beta"], torch.zeros(32))
    with pytest.raises(ValueError, match="to_q.lora_A.bias with shape .* is no part of a LoRA"):
        import_foreign(dit, {key.replace("B.bias", "A.bias"): t for key, t in tensors.items()}, {}, "it")


@pytest.mark.parametrize("parts", [("lora_A",), ("lora_A", "lora_B", "miss_block"), ("alpha",)])
def test_a_layer_without_the_rest_of_its_lora_is_named(dit, parts):
    tensors = {f"transformer_blocks.0.attn1.to_q.{part}.weight": torch.ones(1, 32) for part in parts}
    with pytest.raises(ValueError, match=r"it: transformer_blocks.0.attn1.to_q has .*; every layer needs"):
        import_foreign(dit, tensors, {}, "it")


def test_settings_that_cannot_be_kept_are_refused(tmp_path):
    from peft import LoraConfig

    peft_pair(LoraConfig(r=1, target_modules=["to_q"], bias="lora_only"), tmp_path)
    with pytest.raises(ValueError, match="to_q.*bias.* is no part of a LoRA|its bias is 'lora_only'"):
        loaded_output(tmp_path)


def test_a_path_that_also_ends_another_path(tmp_path):
    """Flux has `proj_out` and `single_transformer_blocks.0.proj_out`."""
    torch.manual_seed(0)
    model, inputs = flux()
    model.requires_grad_(False)  # as it is adapted: for gradients PyTorch may add up otherwise
    expected_base = model(**inputs).sample
    b = torch.randn(4, 1)
    tensors = {"transformer.proj_out.lora_A.weight": torch.ones(1, 32), "transformer.proj_out.lora_B.weight": b}
    from diffusers import FluxPipeline

    pipe = OneLoRALoaderMixin.from_pipe(FluxPipeline(None, None, None, None, None, None, transformer=model))
    pipe.load_lora_weights(tensors, adapter_name="x")
    own = adapter_state_dict(model, "x")
    assert torch.equal(own["proj_out.onelora_b"], b[:, 0])
    assert not own["single_transformer_blocks.0.proj_out.onelora_b"].any()
    assert not torch.allclose(model(**inputs).sample, expected_base)
    assert pipe.get_list_adapters() == {"transformer": ["x"]}
    unload_adapter(model)
    assert torch.equal(model(**inputs).sample, expected_base)


def test_the_files_say_where_they_come_from(dit, tmp_path):
    inject_adapter(dit, AdapterConfig(targets=("to_q",)))
    export_lora(dit, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["peft_type"]) == (1, 1, "LORA")
    assert config["target_modules"] == [f"transformer_blocks.{i}.attn1.to_q" for i in (0, 1)]
    with safe_open(tmp_path / "pytorch_lora_weights.safetensors", framework="pt") as file:
        metadata = json.loads(file.metadata()["lora_adapter_metadata"])
    # diffusers 0.36 to 0.39 reads both by name, and fails where one is missing
    assert (metadata["transformer.rank_pattern"], metadata["transformer.alpha_pattern"]) == ({}, {})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "pytorch_lora_weights.safetensors",
    ]
    with pytest.raises(ValueError, match="is a file: give a folder"):
        export_lora(dit, tmp_path / "adapter_config.json")
