import copy

import pytest
import torch
from rounding import assert_rounded, rounding
from tiny_models import make_dit, randomize
from torch import nn

from onelora_diffusion import AdapterConfig, adapter_state_dict, inject_adapter, merge_adapter
from tools.analysis import extract_adapter


def pair(update):
    """A base of one linear layer and its fine-tuned twin."""
    base = nn.Sequential(nn.Linear(update.shape[1], update.shape[0]))
    finetuned = copy.deepcopy(base)
    with torch.no_grad():
        finetuned[0].weight += update
    return base, finetuned


def test_an_update_that_is_a_1lora_is_found_whole(dit, inputs):
    trained = randomize(inject_adapter(make_dit(), AdapterConfig()))
    vectors = {name: b.detach().clone() for name, b in adapter_state_dict(trained).items()}
    expected = trained(**inputs).sample
    extraction = extract_adapter(dit, merge_adapter(trained))
    # The update is a difference of weights of size 1 at most, which were rounded.
    assert extraction.share == pytest.approx(1, abs=rounding(dit))
    for name, b in adapter_state_dict(dit).items():
        assert_rounded(b, vectors[name], dit, size=1)
    assert_rounded(dit(**inputs).sample, expected, dit)


def test_shares_by_hand():
    """Rows (1, 1) are b 1ᵀ, rows (1, -1) have the sum 0, rows (2, 0) are half of each."""
    for row, b, share in (([1.0, 1.0], 1, 1), ([1.0, -1.0], 0, 0), ([2.0, 0.0], 1, 0.5), ([0.0, 0.0], 0, 1)):
        base, finetuned = pair(torch.tensor([row] * 3))
        extraction = extract_adapter(base, finetuned)
        assert extraction.shares["0"] == pytest.approx(share, abs=rounding(terms=3 * 2))
        assert_rounded(adapter_state_dict(base)["0.onelora_b"], torch.full((3,), float(b)), terms=2, size=2)


def test_b_is_the_least_squares_solution():
    torch.manual_seed(0)
    update = torch.randn(5, 7)
    base, finetuned = pair(update)
    extraction = extract_adapter(base, finetuned)
    fit = torch.linalg.lstsq(torch.ones(7, 1), update.T).solution[0]
    assert_rounded(adapter_state_dict(base)["0.onelora_b"], fit, terms=7, size=update.abs().max().item())
    left = (update - torch.outer(fit, torch.ones(7))).square().sum() / update.square().sum()
    assert extraction.share == pytest.approx(1 - left.item(), abs=rounding(terms=5 * 7))


def test_biases_and_a_new_class_table_of_a_full_adapter(dit, inputs):
    finetuned = randomize(inject_adapter(make_dit(), AdapterConfig("full", num_classes=3)))
    extraction = extract_adapter(dit, finetuned, "found", bias=True)
    own, full = adapter_state_dict(dit, "found"), adapter_state_dict(finetuned)
    assert torch.equal(own["class_embedding.weight"], full["class_embedding.weight"])
    expected = full["proj_out_2.onelora_bias"] - make_dit().proj_out_2.bias
    assert_rounded(own["proj_out_2.onelora_beta"], expected, terms=1)
    # of independent random numbers a layer's own direction holds one part in k on average
    assert 0.5 / 128 < extraction.share < 2 / 32


def test_models_that_differ():
    base, _ = pair(torch.zeros(3, 2))
    with pytest.raises(ValueError, match="0 with shape \\(3, 2\\) is not in the fine-tuned model"):
        extract_adapter(base, nn.Sequential(nn.Linear(4, 3)))
    assert not hasattr(base, "_onelora")
