"""Small models, and a stand-in for the hub, that several tests use."""

import signal
from pathlib import Path

import pytest
import torch

# A shell without job control starts what runs in the background with Ctrl-C ignored, and its children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def make_dit(equal_copies: bool = True, num_classes: int = 10, seed: int = 0):
    """A random DiT of two blocks, width 32, in eval mode; converted DiTs hold equal embeddings in every block."""
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(seed)
    model = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=num_classes,
    ).eval()
    if equal_copies:
        first, second = model.transformer_blocks
        second.norm1.emb.load_state_dict(first.norm1.emb.state_dict())
    return model


def dit_inputs(batch: int = 3, seed: int = 1) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "hidden_states": torch.randn(batch, 4, 8, 8, generator=generator),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
        "class_labels": torch.arange(batch) % 3,
    }


def randomize(model: torch.nn.Module, scale: float = 0.05, seed: int = 2) -> torch.nn.Module:
    """Give the trained tensors random values, as training would."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)
    return model


@pytest.fixture
def dit():
    return make_dit()


@pytest.fixture
def inputs():
    return dit_inputs()


@pytest.fixture
def fresh_accelerate():
    """What a test sets of accelerate's state is taken back."""
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def accelerator(fresh_accelerate):
    """Of one process on the CPU."""
    from accelerate import Accelerator

    return Accelerator(cpu=True)


@pytest.fixture
def hub(monkeypatch):
    """The hub's client, which keeps what it is given."""
    calls = {}

    class Hub:
        def __init__(self, token=None):
            calls["token"] = token

        def create_repo(self, repo_id, private, exist_ok):
            calls["repo"] = repo_id, private, exist_ok
            return f"https://hub/{repo_id}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls["files"] = {
                str(path.relative_to(folder_path)): path.read_bytes() for path in Path(folder_path).rglob("*.*")
            }

    monkeypatch.setattr("huggingface_hub.HfApi", Hub)
    return calls
