"""Weights of an adapter by block."""

import itertools

import pytest

from onelora_diffusion.adapters.weights import weight_at

BY_BLOCK = {"transformer_blocks.*": 0.5, "transformer_blocks.3": 2.0, "*.attn1": 0.0, "transformer_blocks.3.ff": 4.0}


@pytest.mark.parametrize("order", list(itertools.permutations(BY_BLOCK)))
def test_the_longest_key_counts_whatever_comes_first(order):
    weight = {key: BY_BLOCK[key] for key in order}
    expected = {
        "transformer_blocks.1.ff.net.2": 0.5,
        "transformer_blocks.3.norm1.linear": 2.0,  # as long as the key with the asterisk, which names more
        "transformer_blocks.3.attn1.to_q": 2.0,
        "transformer_blocks.3.ff.net.2": 4.0,
        "transformer_blocks.31.ff.net.2": 0.5,
        "pos_embed.attn1.to_q": 0.0,
        "proj_out_1": 1.0,
    }
    assert {path: weight_at(weight, path) for path in expected} == expected
