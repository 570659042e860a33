"""1LoRA's experiments for PEFT's method comparisons, and the rehearsal of the one of images."""

import json

import diffusers
import pytest
from peft import MissConfig, PeftConfig
from safetensors.torch import load_file

from tools.peft_suite.experiments import EXPERIMENTS, count, write
from tools.peft_suite.rehearsal import rehearse

pytestmark = pytest.mark.skipif(
    not hasattr(diffusers, "Flux2KleinPipeline"), reason="this version of diffusers has no FLUX.2 klein"
)

# Numbers of the comparisons' own MiSS of ranks 32 and 64 in their published results, over the rank.
PUBLISHED = {"flux2-klein-rank1-1lora": 28508160 // 32, "llama-3.2-3B-rank1-1lora": 7340032 // 64}


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda experiment: experiment.name)
def test_what_is_written_is_read_by_peft_as_miss_of_rank_1(experiment, tmp_path):
    folder = write(experiment, tmp_path)
    assert folder.relative_to(tmp_path).parts[:3] == (experiment.comparison, "experiments", "miss")
    config = PeftConfig.from_pretrained(folder)
    assert isinstance(config, MissConfig) and (config.r, config.init_weights, config.bias) == (1, True, "none")
    assert config.target_modules == set(experiment.targets)
    params = json.loads((folder / "training_params.json").read_text())
    assert params == {"optimizer_kwargs": experiment.optimizer_kwargs}
    if experiment.name in PUBLISHED:
        assert count(experiment) == PUBLISHED[experiment.name]


def test_the_rehearsal_trains_what_is_read_here_as_1lora(tmp_path):
    folder = write(EXPERIMENTS[0], tmp_path)
    fast = {"optimizer_kwargs": {"lr": 0.02, "weight_decay": 0.0}}  # to see something after few steps
    (folder / "training_params.json").write_text(json.dumps(fast))
    found = rehearse(folder, tmp_path / "adapter", steps=20)
    assert found["loss after"] < found["loss before"]
    assert -1 <= found["similarity by random features"] <= 1 and 1e-5 < found["drift by random features"] < 1
    # Float32 through four steps and the decoder, whose pictures are from 0 to 1.
    assert found["difference of pictures, read here as 1lora"] < 1e-5 < 1e-3 < found["largest change of pictures"]
    blocks = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {len(block) for block in blocks.values()} == {1}
    assert sum(block.numel() for block in blocks.values()) == found["trained numbers"]
