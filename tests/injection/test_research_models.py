"""Models in their authors' own code: new classes, the paper's layers, and every verb, in a plain module."""

import copy
import re
from pathlib import Path

import pytest
import torch
from research_models import MODELS, inputs_of, make_model, output_of
from rounding import assert_rounded
from tiny_models import randomize
from torch import nn
from torch.nn import functional as F

from onelora_diffusion import (
    AdapterConfig,
    adapter_state_dict,
    combine_adapters,
    count_trainable,
    disable_adapter,
    inject_adapter,
    load_adapter,
    merge_adapter,
    route_adapters,
    save_adapter,
    set_adapters,
    stock_state_dict,
    unload_adapter,
    unmerge_adapter,
)
from onelora_diffusion.injection.layers import target_layers

FOOD = AdapterConfig(num_classes=3)


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def trained(name, config=FOOD, seed=2):
    return randomize(inject_adapter(make_model(name), config), seed=seed)


def table_of(model):
    return model.y_embedder.embedding_table


# ---------------------------------------------------------------------------------------------------
# Which layers, and how many numbers

DIT_XL_2 = {"width": 1152, "depth": 28, "heads": 16, "size": 32, "num_classes": 1000}


@pytest.mark.parametrize(
    ("method", "trainable"),
    [
        ("1lora", 603_680),
        ("bitfit", 603_680),
        ("difffit", 1_089_856),
        ("lora", 864_032),
        ("dora", 1_350_208),
        ("vera", 603_822),
        ("mora1", 604_412),
        ("mora6", 596_516),
    ],
)
def test_metas_dit_xl_2_has_the_papers_counts(method, trainable):
    """Table S8, which counts one linear layer for q, k and v, as this model has it."""
    with torch.device("meta"):
        model = make_model("DiT", **DIT_XL_2)
    assert count_trainable(inject_adapter(model, AdapterConfig(method, num_classes=101))) == trainable


@pytest.mark.parametrize(
    ("name", "last", "mlp"),
    [
        ("DiT", 1, ["fc1", "fc2"]),
        ("SiT", 1, ["fc1", "fc2"]),
        ("REPA", 1, ["fc1", "fc2"]),
        ("LightningDiT", 1, ["w12", "w3"]),
        ("DDT", 0, ["w1", "w2", "w3"]),
        ("RAE", 1, ["w12", "w3"]),
    ],
)
def test_targets_are_the_linears_of_the_blocks_and_of_the_final_layer(name, last, mlp):
    model = make_model(name)
    of_a_block = [f"adaLN_modulation.{last}", "attn.proj", "attn.qkv", *(f"mlp.{layer}" for layer in mlp)]
    expected = {f"blocks.{index}.{layer}" for index in range(len(model.blocks)) for layer in of_a_block}
    assert set(target_layers(model, None)) == expected | {"final_layer.linear", f"final_layer.adaLN_modulation.{last}"}


# ---------------------------------------------------------------------------------------------------
# New classes


def test_starts_as_the_base_at_its_null_row(name):
    x, t, _ = inputs_of(name)
    model = inject_adapter(make_model(name), FOOD)
    base = make_model(name).requires_grad_(
        False
    )  # as the adapted one is: PyTorch may add up differently for gradients
    expected = output_of(base, (x, t, torch.full((3,), 10)))
    for null in (3, 10, 1000):  # any label past the classes
        assert torch.equal(output_of(model, (x, t, torch.full((3,), null))), expected)
    assert adapter_state_dict(model)["class_embedding.weight"].shape == (4, table_of(base).embedding_dim)
    assert torch.equal(table_of(model)(torch.tensor([2, 3])), adapter_state_dict(model)["class_embedding.weight"][2:])


@pytest.mark.parametrize("num_classes", [3, 25])  # fewer and more than the base's ten
def test_labels_that_their_embedder_drops_become_the_new_null_row(num_classes):
    model = trained("DiT", AdapterConfig(num_classes=num_classes))
    table, labels = adapter_state_dict(model)["class_embedding.weight"], torch.arange(num_classes)
    embedder = model.y_embedder
    assert torch.equal(embedder(labels, train=False), table[:-1])
    dropped = embedder(labels, train=False, force_drop_ids=labels % 2)
    assert torch.equal(dropped[1::2], table[-1:].expand(num_classes // 2, -1))
    assert torch.equal(dropped[::2], table[:-1][::2])
    embedder.dropout_prob = 0.5
    torch.manual_seed(0)
    rows = embedder(labels.repeat(40), train=True)
    is_null = (rows == table[-1]).all(1)
    torch.manual_seed(0)
    assert torch.equal(is_null, torch.rand(num_classes * 40) < 0.5)  # their draw

    with disable_adapter(model):
        assert embedder.num_classes == 10
        assert torch.equal(embedder(torch.tensor([4]), train=False, force_drop_ids=torch.ones(1))[0], _base_null())
    assert embedder.num_classes == num_classes
    unload_adapter(model)
    assert embedder.num_classes == 10 and type(table_of(model)) is nn.Embedding


def _base_null():
    return table_of(make_model("DiT")).weight[-1]


def test_dropped_labels_of_a_mixed_batch_are_null_in_every_table():
    model = trained("DiT", AdapterConfig(num_classes=25))
    randomize(inject_adapter(model, FOOD, "small"), seed=5)
    tables = [adapter_state_dict(model, name)["class_embedding.weight"] for name in ("default", "small")]
    with route_adapters(model, ["default", "small", None]):
        model._onelora.open_route.start((torch.zeros(3),), {})
        rows = model.y_embedder(torch.tensor([1, 1, 1]), train=False, force_drop_ids=torch.ones(3))
    assert torch.equal(rows, torch.stack([tables[0][-1], tables[1][-1], _base_null()]))
    assert model.y_embedder.num_classes == 3


def test_a_table_by_its_name_and_tables_that_cannot_be_told():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.label_emb, self.position = nn.Embedding(5, 8), nn.Embedding(16, 8)
            self.linear = nn.Linear(8, 8)

        def forward(self, x, labels):
            return self.linear(x + self.label_emb(labels))

    model, x = Model(), torch.randn(2, 8)
    for config, message in [
        (FOOD, "Model has no class embedding to be found: name the table .* its tables are label_emb, position"),
        (AdapterConfig(num_classes=3, class_table="labels"), "class_table='labels' is not one of Model"),
        (AdapterConfig(num_classes=3, class_table="emb"), "class_table='emb' is not one of Model"),
    ]:
        with pytest.raises(ValueError, match=message):
            inject_adapter(model, config)
        assert not hasattr(model, "_onelora")
    named = AdapterConfig(num_classes=3, class_table="label_emb")
    start = model(x, torch.tensor([4, 4]))
    randomize(inject_adapter(model, named))
    with torch.no_grad():
        rows = adapter_state_dict(model)["class_embedding.weight"][[1, 3]]
        expected = model.linear(x + rows)
        assert torch.equal(model(x, torch.tensor([1, 9])), expected)
    with pytest.raises(ValueError, match="class_table='position': other adapters have theirs at label_emb"):
        inject_adapter(model, AdapterConfig(num_classes=3, class_table="position"), "second")
    assert list(model._onelora.adapters) == ["default"]
    unload_adapter(model)
    assert torch.equal(model(x, torch.tensor([4, 4])), start)

    with pytest.raises(ValueError, match="nn.Linear|Linear has no class embedding .* it has no nn.Embedding"):
        inject_adapter(nn.Linear(3, 3), FOOD)
    with pytest.raises(ValueError, match="class_table='label_emb' is where new classes go: give their num_classes"):
        AdapterConfig(class_table="label_emb")
    with pytest.raises(ValueError, match="has 10 rows, for its classes and none for no class"):
        inject_adapter(make_model("DiT", dropout_prob=0.0), FOOD)


# ---------------------------------------------------------------------------------------------------
# The verbs


def test_a_step_of_their_loop_trains_the_adapter_alone_and_every_part_of_it(name):
    model = inject_adapter(make_model(name), FOOD).train()
    before = {key: tensor.clone() for key, tensor in make_model(name).state_dict().items()}
    own = adapter_state_dict(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0)
    ema = copy.deepcopy(model)
    x, t, y = inputs_of(name)
    out = output_of(model, (x, t, torch.tensor([0, 1, 2])))
    F.mse_loss(out, torch.ones_like(out)).backward()
    assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
    assert all(parameter.grad.any() for parameter in own.values())
    start = {key: parameter.detach().clone() for key, parameter in own.items()}
    optimizer.step()
    assert not any(torch.equal(parameter, start[key]) for key, parameter in own.items())
    assert all(torch.equal(parameter, start[key]) for key, parameter in adapter_state_dict(ema).items())
    unload_adapter(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
    assert list(model.state_dict()) == list(before)


@pytest.mark.parametrize("method", ["1lora", "difffit", "mora1", "lora", "full"])
def test_save_load_merge_and_unmerge(name, method, tmp_path):
    model, inputs = trained(name, AdapterConfig(method, num_classes=3)), inputs_of(name)
    expected = output_of(model, inputs)
    loaded = load_adapter(make_model(name, seed=0), save_adapter(model, tmp_path))
    assert torch.equal(output_of(loaded, inputs), expected)
    with torch.no_grad():
        merge_adapter(loaded)
        assert_rounded(output_of(loaded, inputs), expected, loaded)
        if (name, method) == ("DDT", "difffit"):
            with pytest.raises(ValueError, match="merging gave blocks.0.attn.qkv a bias, which its class has not"):
                stock_state_dict(loaded)
            return
        plain = make_model(name, seed=1)  # without this library, from the merged weights alone
        plain.load_state_dict(stock_state_dict(loaded))
        assert_rounded(output_of(plain, inputs), expected, plain)
        x, t, _ = inputs
        null = output_of(plain, (x, t, torch.full((3,), 10)))  # where the base has it
        unmerge_adapter(loaded)
        assert_rounded(null, output_of(loaded, (x, t, torch.full((3,), 3))), plain)
        base = make_model(name).state_dict()
        stock = stock_state_dict(loaded)  # unmerged, the base's
        assert list(stock) == list(base) and all(torch.equal(tensor, base[key]) for key, tensor in stock.items())
        assert torch.equal(output_of(loaded, inputs), expected)
    unload_adapter(loaded)
    assert torch.equal(output_of(loaded, inputs), output_of(make_model(name).requires_grad_(False), inputs))


def test_each_sample_of_a_batch_by_its_own_adapter_and_classes(name):
    inputs = inputs_of(name)
    base, model = make_model(name), trained(name)
    inject_adapter(model, AdapterConfig("difffit", sum=True, norms=False, num_classes=2), "birds")
    randomize(model, seed=7)
    with torch.no_grad():
        alone = [output_of(set_adapters(model, "default"), inputs), output_of(set_adapters(model, "birds"), inputs)]
        alone.append(output_of(base, inputs))
        with route_adapters(model, ["default", "birds", None]):
            mixed = output_of(model, inputs)
        for sample, expected in enumerate(alone):
            assert_rounded(mixed[sample], expected[sample], model)
        combine_adapters(model, ["birds"], [0.5], "half")
        half = output_of(model, inputs)
        set_adapters(model, "birds", 0.5)
        assert_rounded(half, output_of(model, inputs), model)


def test_a_merged_table_of_more_classes_than_the_base_has():
    model = trained("DiT", AdapterConfig(num_classes=25))
    x, t, _ = inputs_of("DiT")
    inputs = x, t, torch.tensor([24, 25, 999])
    expected = output_of(model, inputs)
    with torch.no_grad():
        assert table_of(merge_adapter(model)).weight.shape == (26, 32)
        assert_rounded(output_of(model, inputs), expected, model)
        with pytest.raises(ValueError, match="has 25 classes, but the base's class table only has room for 10"):
            stock_state_dict(model)
        plain = make_model("DiT", num_classes=25)
        plain.load_state_dict(stock_state_dict(model, table_rows=26))
        assert_rounded(output_of(plain, (x, t, torch.tensor([24, 25, 25]))), expected, plain)
        unmerge_adapter(model)
    assert table_of(model).weight.shape == (11, 32)
    assert torch.equal(output_of(model, inputs), expected)


# ---------------------------------------------------------------------------------------------------
# The page


def test_the_pages_snippets_run_on_a_model_of_their_shape(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parents[2] / "docs" / "research_models.md").read_text()
    train, use = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(train, {"model": make_model("DiT"), "deepcopy": copy.deepcopy})
    x, t, y = inputs_of("DiT", batch=2)
    names = {"model": make_model("DiT"), "torch": torch, "x": x, "t": t, "y": y}
    exec(use.replace("stock_state_dict(model)", "stock_state_dict(model, table_rows=102)"), names)
    merged = torch.load("merged.pt", weights_only=True)
    assert merged["y_embedder.embedding_table.weight"].shape == (102, 32)
    make_model("DiT", num_classes=101).load_state_dict(merged)
