"""Meta's DiT and diffusers': the same weights, and what each computes with them."""

import argparse

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel
from research_models import inputs_of, make_model
from rounding import assert_rounded, rounding

from onelora_diffusion import miniature_path
from onelora_diffusion.cli.convert_dit import Settings, main, to_diffusers, to_meta

XS = {"width": 48, "heads": 4}  # a width of no DiT of the paper


def output(model, inputs):
    x, t, y = inputs
    return model(x, timestep=t, class_labels=y).sample


@torch.no_grad()
def test_outputs_agree_but_for_epsilon_and_frequencies():
    """In float64, with both set as in Meta's code, they are equal to rounding; with one alone or none they are not."""
    meta = make_model("DiT", **XS)
    x, t, _ = inputs_of("DiT")
    inputs = x.double(), 1000 * t, torch.tensor([0, 9, 10])  # the last is the null row
    state = meta.state_dict()
    meta.double()
    for exact in (True, False):
        model = to_diffusers(state, heads=4, exact=exact).double()
        meta.pos_embed.copy_(model.pos_embed.pos_embed)  # which rounds them otherwise
        expected = meta(*inputs)
        for shift in (1, 0):
            for block in model.transformer_blocks:
                block.norm1.emb.time_proj.downscale_freq_shift = shift
            difference = (output(model, inputs) - expected).abs().max() / expected.abs().max()
            assert (difference < rounding(model)) == (exact and shift == 0)


def test_a_file_of_theirs_to_a_folder_and_back(tmp_path):
    state = make_model("DiT", **XS).state_dict()
    of_training = {"model": {}, "ema": state, "opt": {"state": {}}, "args": argparse.Namespace(model="DiT-XS/2")}
    for index, contents in enumerate((state, of_training)):
        source, folder, back = (tmp_path / f"{name}-{index}" for name in ("dit.pt", "folder", "back.pt"))
        torch.save(contents, source)
        main(Settings(source, folder, heads=4))
        config = DiTTransformer2DModel.load_config(folder / "transformer")
        assert (config["sample_size"], config["num_embeds_ada_norm"], config["norm_eps"]) == (8, 10, 1e-5)
        main(Settings(folder, back))
        found = torch.load(back, weights_only=True)
        assert list(found) != [] and found.keys() == state.keys()
        assert all(torch.equal(tensor, state[name]) for name, tensor in found.items() if name != "pos_embed")
        assert_rounded(found["pos_embed"], state["pos_embed"], 1)  # diffusers computes it anew
        make_model("DiT", seed=1, **XS).load_state_dict(found)


def test_a_whole_pipeline_with_a_vae(tmp_path):
    file = tmp_path / "dit.pt"
    torch.save(to_meta(DiTTransformer2DModel.from_pretrained(miniature_path(), subfolder="transformer")), file)
    main(Settings(file, tmp_path / "pipeline", vae=str(miniature_path() / "vae"), heads=4, exact=True))
    ours, stock = DiTPipeline.from_pretrained(tmp_path / "pipeline"), DiTPipeline.from_pretrained(miniature_path())
    assert ours.transformer.config.norm_eps == 1e-6
    assert ours.scheduler.config.items() >= {"beta_end": 0.02, "clip_sample": False, "beta_schedule": "linear"}.items()
    weights = stock.transformer.state_dict()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in ours.transformer.state_dict().items())


def test_a_sit_is_named_as_such(tmp_path):
    """By its file's name, by what its train.py wrote beside the weights, or by an output without variance."""
    state = make_model("DiT", **XS).state_dict()
    without_variance = state | {name: tensor[::2] for name, tensor in state.items() if "final_layer.linear" in name}
    of_training = {"ema": state, "opt": {}, "args": argparse.Namespace(model="SiT-XL/2", path_type="Linear")}
    cases = (
        ("SiT-XL-2-256x256.pt", state, "by its name"),
        ("0050000.pt", of_training, "its settings say SiT-XL/2"),
        ("last.pt", {"ema": without_variance}, "it predicts no variance"),
    )
    for name, contents, sign in cases:
        torch.save(contents, tmp_path / name)
        with pytest.raises(SystemExit, match=f"{name} is a SiT \\({sign}\\), .* by SiT's own code"):
            main(Settings(tmp_path / name, tmp_path / "folder", heads=4))
    assert not (tmp_path / "folder").exists()


def test_what_is_no_dit_of_theirs_is_one_line(tmp_path):
    state = make_model("DiT", **XS).state_dict()
    with pytest.raises(ValueError, match="a width of 48 has is not in the file: give --heads"):
        to_diffusers(state)
    with pytest.raises(ValueError, match="projectors.0.0.bias is none of its: no DiT of Meta's"):
        to_diffusers(make_model("REPA", **XS).state_dict(), heads=4)
    with pytest.raises(ValueError, match="blocks.1.mlp.fc1.bias is not there"):
        to_diffusers({name: t for name, t in state.items() if name != "blocks.1.mlp.fc1.bias"}, heads=4)
    model = to_diffusers(state, heads=4)
    with torch.no_grad():
        model.transformer_blocks[1].norm1.emb.timestep_embedder.linear_1.weight += 1
    with pytest.raises(ValueError, match="transformer_blocks.1.*linear_1.weight is not that of block 0"):
        to_meta(model)

    file = tmp_path / "evil.pt"
    torch.save({"run": print}, file)
    with pytest.raises(SystemExit, match="convert_dit.py: .*evil.pt: is no file of weights alone"):
        main(Settings(file, tmp_path / "folder"))
    assert not (tmp_path / "folder").exists()


def test_a_place_that_cannot_be_written_is_named_before_anything_is_read(tmp_path):
    (tmp_path / "there").write_text("text")
    (tmp_path / "folder").mkdir()
    with pytest.raises(SystemExit, match=r"^convert_dit.py: .*there/transformer.* cannot be written, .* no folder"):
        main(Settings(tmp_path / "no-such.pt", tmp_path / "there", heads=4))
    with pytest.raises(SystemExit, match=r"^convert_dit.py: '.*folder' is no file that can be replaced"):
        main(Settings(tmp_path / "folder", tmp_path / "folder"))
