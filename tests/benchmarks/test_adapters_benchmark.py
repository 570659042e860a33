import json

import diffusers
import pytest
import torch
from packaging.version import Version
from rounding import assert_rounded

import benchmark
from benchmarks.adapters import (
    LOADERS,
    AdaptersSettings,
    adapter_bytes,
    adapters,
    batch_of,
    make_bf16_base,
    our_models,
    peft_model,
    write_files,
)
from benchmarks.peers import twin
from onelora_diffusion import adapter_state_dict
from onelora_diffusion.injection.routing import route_adapters

TRAINED = 2 * (6 * 32 + 4 * 32 + 128 + 32) + 64 + 32  # out features of two blocks, and of both outputs
LORA_A = 2 * (32 + 4 * 32 + 32 + 128) + 2 * 32  # in features of the same layers

needs_verbs = pytest.mark.skipif(
    Version(diffusers.__version__) < Version("0.38"),
    reason="diffusers before 0.38 sets adapters of the classes that it lists by name alone, and has no DiT among them",
)
PEERS = [pytest.param(name, marks=needs_verbs) if "diffusers" in name else name for name in LOADERS]


def settings(**changes):
    small = {"width": 32, "heads": 2, "layers": 2, "mixed_layers": 2, "rounds": 2, "mixed_rounds": 2}
    counts = {"adapters": (1, 3), "batch": 6, "threads": torch.get_num_threads()}
    return AdaptersSettings(**(small | counts | changes))


def fp32_base(chosen):
    return make_bf16_base(chosen, 2, chosen.mixed_sample_size).float()


def test_peft_s_mixed_batch_of_the_same_adapters_gives_the_same_output():
    chosen = settings()
    base, (latents, timesteps, labels) = fp32_base(chosen), batch_of(chosen)
    batch = latents.float(), timesteps, labels
    serving, routed = our_models(base, 3)
    theirs = peft_model(base, 3)
    with torch.no_grad():
        for name, parameter in theirs.get_base_model().named_parameters():
            if ".lora_A." in name:
                parameter.fill_(1)
            elif ".lora_B." in name:
                path, _, adapter = name.removesuffix(".weight").partition(".lora_B.")
                parameter.copy_(adapter_state_dict(serving, adapter)[f"{path}.onelora_b"].unsqueeze(1))
        names = ["a0", "a1", "a2"] * 2
        with route_adapters(routed, names):
            mixed = routed(*batch).sample
        assert_rounded(mixed, theirs(*batch, adapter_names=names).sample, theirs)
        assert_rounded(serving(*batch).sample[::3], mixed[::3], serving)  # a0 serves
        assert (serving(*batch).sample[1::3] - mixed[1::3]).abs().max() > 1e-4


@pytest.mark.parametrize("name", PEERS)
def test_every_peer_loads_switches_and_swaps(tmp_path, name):
    """Files hold what an adapter starts with, which leaves the base as it is; other values move it."""
    chosen = settings()
    base = fp32_base(chosen)
    write_files(base, tmp_path)
    latents, timesteps, labels = batch_of(chosen)
    peer = LOADERS[name](twin(base), tmp_path)

    def output():
        model = peer.pipe.transformer if name == "1LoRA" else peer.model
        with torch.no_grad():
            return model.eval()(latents.float(), timesteps, labels).sample

    plain = output()
    peer.load("a0")
    assert_rounded(output(), plain, base)
    model = peer.pipe.transformer if name == "1LoRA" else peer.model
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith((".a0.b", ".lora_B.a0.weight")):
                parameter.fill_(0.01)
    moved = output()
    assert (moved - plain).abs().max() > 1e-4
    peer.load("a1")  # serves by itself
    assert_rounded(output(), plain, base)
    peer.switch("a0")
    assert_rounded(output(), moved, base)
    peer.hotswap("a0")
    assert_rounded(output(), plain, base)


def test_bytes_of_resident_adapters():
    base = fp32_base(settings())
    serving, routed = our_models(base, 3)
    assert adapter_bytes(serving) == adapter_bytes(routed) == 3 * 4 * TRAINED
    assert adapter_bytes(peft_model(base, 3)) == 3 * 4 * (TRAINED + LORA_A)


@needs_verbs
def test_tables_and_files(tmp_path):
    results = adapters(settings(output_dir=tmp_path))
    assert json.loads((tmp_path / "adapters.json").read_text())["mixed"] == json.loads(json.dumps(results["mixed"]))
    assert {(row["peer"], row["verb"]) for row in results["load"]} == {
        (peer, verb) for peer in LOADERS for verb in ("first load", "load", "switch", "hot-swap")
    }
    assert all(row["ours_over_it"] == (1, 1, 1) for row in results["load"] if row["peer"] == "1LoRA")
    assert [row["route_bytes"] for row in results["mixed"]] == [4 * TRAINED, 3 * 4 * TRAINED]
    report = (tmp_path / "adapters.md").read_text()
    assert "| PEFT LoRA r=1, diffusers " in report and max(map(len, report.splitlines())) <= 100


def test_command_line(monkeypatch, tmp_path):
    arguments = ["adapters", "--adapters", "3", "--batch", "8", "--output-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["benchmark.py", *arguments])
    with pytest.raises(SystemExit, match="^benchmark.py: a batch of 8 samples cannot be shared by 3 adapters alike"):
        benchmark.main()
