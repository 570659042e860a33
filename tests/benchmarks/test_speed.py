import json
import re
import weakref

import numpy as np
import pytest
import torch
from rounding import assert_rounded
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import benchmark
from benchmarks.measure import CountWork, Work, interleave, ratio, resident_bytes, saved_bytes, table
from benchmarks.peers import PEERS, make_base, make_peer, twin
from benchmarks.roofline import Device, at_batch, at_layers, step_seconds
from benchmarks.scale import ScaleSettings, scale, slope
from benchmarks.speed import SpeedSettings, Step, speed
from onelora_diffusion.injection.conditioning import DiTConditioning

SMALL = {"width": 32, "heads": 2, "layers": 2, "sample_size": 8}


@pytest.fixture(scope="module")
def base():
    return make_base(**SMALL)


def settings(**changes):
    return SpeedSettings(**(SMALL | {"batch": 2, "rounds": 2, "threads": torch.get_num_threads()} | changes))


def output(model):
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(2, 4, 8, 8, generator=generator)
    with torch.no_grad():
        return model.eval()(latents, torch.tensor([3, 900]), torch.tensor([1, 1000])).sample


# ---------------------------------------------------------------------------------------------------
# Peers


@pytest.mark.parametrize("rival", ["listing 1", "PEFT MiSS r=1", "PEFT OneLoraConfig"])
def test_rivals_that_are_1lora_compute_what_ours_does(base, rival):
    ours, theirs = make_peer("1LoRA", base, True), make_peer(rival, base, False)
    by_layer = {
        name.removesuffix(".onelora.default.b"): p.data for name, p in ours.named_parameters() if p.requires_grad
    }
    for name, parameter in theirs.named_parameters():
        if parameter.requires_grad:
            path = re.split(r"\.miss_block|\.lora_B|\.b$", name)[0]
            parameter.data.copy_(by_layer.pop(path).view_as(parameter))
    assert not by_layer
    assert_rounded(output(ours), output(theirs), ours)


@pytest.mark.parametrize("peer", PEERS)
def test_peers_leave_the_base_and_differ_from_it(base, peer):
    before = {name: weight.clone() for name, weight in base.state_dict().items()}
    step = Step(make_peer(peer, base, True), "fp32", batch=2)
    assert (output(step.model) - output(base)).abs().max() > 1e-5
    step.train()
    for name, weight in base.state_dict().items():
        assert torch.equal(weight, before[name]), name


@pytest.mark.parametrize(
    "peer, trained",  # width 32, out features of 2 x (6·32, 4 x 32, 128, 32) blocks, and of 64 and 32 outputs
    [("1LoRA", 1056), ("BitFit", 1056), ("biases unfrozen", 1056), ("listing 1", 1056), ("PEFT MiSS r=1", 1056)]
    + [("PEFT LoRA r=1", 1056 + 2 * (32 + 4 * 32 + 32 + 128) + 64)],
)
def test_trained_counts(base, peer, trained):
    model = make_peer(peer, base, False)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == trained


def test_twins_share_the_weights_and_a_conditioning_changes_no_output(base):
    model = twin(base)
    assert resident_bytes(nn.ModuleList([base, model])) == resident_bytes(base)
    before = resident_bytes(model)
    DiTConditioning(model).install()
    assert before - resident_bytes(model) == resident_bytes(base.transformer_blocks[1].norm1.emb)
    assert torch.equal(output(model), output(base))


# ---------------------------------------------------------------------------------------------------
# Measures


def test_ratio_is_taken_round_by_round():
    reference = np.array([1.0, 100.0, 1.0, 1.0, 10.0])  # two slow rounds, slow for both
    assert ratio(np.array([1.1, 120.0, 1.0, 1.2, 13.0]), reference) == pytest.approx((1.2, 1.1, 1.2))


def test_interleave_runs_every_step_once_a_round():
    calls, times = [], iter(range(100))
    steps = {name: lambda name=name: calls.append(name) for name in "abc"}
    seconds = interleave(steps, rounds=3, warmup=1, clock=lambda: next(times))
    assert [sorted(calls[i : i + 3]) for i in range(0, 12, 3)] == [list("abc")] * 4
    assert {name: values.tolist() for name, values in seconds.items()} == {name: [1, 1, 1] for name in "abc"}


def test_saved_bytes_by_hand():
    linear, x = nn.Linear(8, 4), torch.randn(16, 8)
    assert saved_bytes(linear, lambda: linear(x).exp()) == 4 * (16 * 8 + 16 * 4)  # x, and the exponential
    linear.requires_grad_(False).bias.requires_grad_()
    assert saved_bytes(linear, lambda: linear(x).exp()) == 4 * 16 * 4


def test_counting_saved_bytes_leaves_nothing_in_memory():
    linear, made = nn.Linear(8, 4), []

    def forward():
        output = linear(torch.randn(16, 8)).exp()  # which its own node keeps
        made.append(weakref.ref(output))
        return output

    saved_bytes(linear, forward)
    assert made[0]() is None


def test_work_by_hand():
    a, b, out = torch.randn(4, 8), torch.randn(8, 2), torch.zeros(4, 2)
    with CountWork() as counter:
        product = torch.mm(a, b)
        out.add_(product.view(2, 4).view(4, 2))
        out.add_(torch.ones(4, 1).expand(4, 2))
    assert counter.work.each == [
        ("mm", 2 * 4 * 8 * 2, 4 * (4 * 8 + 8 * 2 + 4 * 2)),
        ("add_", 0, 4 * (8 + 8 + 8)),  # reads both, writes one
        ("ones", 0, 4 * 4),
        ("add_", 0, 4 * (8 + 4 + 8)),  # four values stand behind the expanded one
    ]


def test_flops_agree_with_torch(base):
    step = Step(make_peer("BitFit", base, True), "fp32", batch=2)
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as reference:
            step.loss().backward()
        work = step.work(lambda: step.loss().backward())
    assert work.flops == reference.get_total_flops()


def test_1lora_saves_less_than_any_rival_and_merged_has_the_operators_of_the_base(tmp_path):
    results = speed(settings(precisions=("fp32",), roofline=False, output_dir=tmp_path))
    saved = {row["peer"]: row["saved_bytes"] for row in results["train"]}
    tokens = 2 * 16
    # 1LoRA saves one fp32 a token for qkv, out, fc1 and fc2 of a block and for the output; a label's for adaLN
    assert saved["1LoRA"] - saved["BitFit"] == 4 * (2 * (4 * tokens + 2) + 2 + tokens)
    assert all(saved["1LoRA"] <= saved[name] for name in ("listing 1", "PEFT MiSS r=1", "PEFT LoRA r=1", "full"))
    operators = {row["model"]: row["operators"] for row in results["forward"]}
    assert operators["1LoRA, merged"] == operators["base"] < operators["base, stock"]
    assert json.loads((tmp_path / "speed.json").read_text())["train"] == json.loads(json.dumps(results["train"]))
    assert (tmp_path / "speed.png").read_bytes().startswith(b"\x89PNG")
    assert max(map(len, (tmp_path / "speed.md").read_text().splitlines())) <= 100


def test_bf16_base_and_resident_bytes(tmp_path):
    chosen = settings(peers=(), precisions=("bf16", "bf16-base"), roofline=False, output_dir=tmp_path)
    results = speed(chosen)
    held = {row["precision"]: row["base_bytes"] for row in results["train"] if row["peer"] == "1LoRA"}
    assert held["bf16-base"] * 2 == held["bf16"]
    whole = make_base(**(SMALL | {"layers": 28}))
    assert results["resident"]["stock"] == resident_bytes(whole)
    DiTConditioning(whole).install()
    assert results["resident"]["shared"] == resident_bytes(whole)


# ---------------------------------------------------------------------------------------------------
# Roofline


def test_step_seconds_by_hand():
    device = Device("hand", flops_per_second=10, bytes_per_second=2)
    assert step_seconds(Work([("mm", 100, 4), ("add", 0, 6)]), device) == 10 + 3


def test_extrapolation_is_what_counting_gives(base):
    def count(layers, batch):
        model = make_peer("1LoRA", make_base(**(SMALL | {"layers": layers})), True)
        step = Step(model, "bf16", batch)
        return step.work(step.train)

    assert at_batch(count(2, 2), count(2, 3), 5) == count(2, 5)
    one, two, five = (count(layers, 2).bytes_moved for layers in (1, 2, 5))
    assert at_layers(one, two, 5) == five


# ---------------------------------------------------------------------------------------------------
# Scale


def test_slope_by_hand():
    assert slope([1, 2, 4], [5, 7, 11]) == pytest.approx(2)


def test_scale_of_memory_is_exact(tmp_path):
    chosen = ScaleSettings(
        peers=("1LoRA",),
        precision="fp32",
        width=32,
        heads=2,
        layers=(1, 2, 3),
        sample_sizes=(4, 8),
        adapters=(1, 3),
        batch=2,
        rounds=1,
        threads=torch.get_num_threads(),
        output_dir=tmp_path,
    )
    slopes = {row["axis"]: row for row in scale(chosen)}
    one, two = (resident_bytes(make_base(32, 2, layers, 8)) for layers in (1, 2))
    embedding = resident_bytes(make_base(32, 2, 1, 8).transformer_blocks[0].norm1.emb)
    block = two - one - embedding + 4 * (6 * 32 + 4 * 32 + 128 + 32)
    assert slopes["layers"]["resident_bytes_slope"] == pytest.approx(block)
    assert slopes["adapters"]["resident_bytes_slope"] == pytest.approx(4 * (480 + 64 + 32))  # the vectors alone
    assert slopes["adapters"]["saved_bytes_slope"] == pytest.approx(0, abs=1e-6)
    assert json.loads((tmp_path / "scale.json").read_text())["rows"] == json.loads(json.dumps(list(slopes.values())))


# ---------------------------------------------------------------------------------------------------
# Command line


def test_command_line_errors_are_one_line(monkeypatch, tmp_path):
    monkeypatch.setattr("sys.argv", ["benchmark.py", "speed", "--peers", "QLoRA", "--output-dir", str(tmp_path)])
    with pytest.raises(SystemExit, match="^benchmark.py: unknown peer 'QLoRA': choose from 1LoRA"):
        benchmark.main()
    monkeypatch.setattr("sys.argv", ["benchmark.py", "speed", "--no-such-flag"])
    with pytest.raises(SystemExit) as error:
        benchmark.main()
    assert error.value.code == 2


@pytest.mark.parametrize("command", ["speed", "generate", "scale", "adapters", "serve"])
def test_a_width_that_its_heads_do_not_divide_is_refused(command, monkeypatch, tmp_path):
    flags = ["--width", "100", "--heads", "3"] + (["--clients"] if command == "serve" else [])
    monkeypatch.setattr("sys.argv", ["benchmark.py", command, *flags, "--output-dir", str(tmp_path / "runs")])
    with pytest.raises(SystemExit, match="^benchmark.py: --width 100 is not a multiple of 3 heads$"):
        benchmark.main()
    assert not list(tmp_path.rglob("*.json"))


def test_table_is_aligned():
    assert table(["a", "bb"], [["long", "1"]]) == ["| a    | bb |", "|------|---:|", "| long |  1 |"]
