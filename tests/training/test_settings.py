import dataclasses
import re
from pathlib import Path

import pytest

from onelora_diffusion.cli.train_dit import RECIPES
from onelora_diffusion.cli.train_text_to_image import EMBEDDED
from onelora_diffusion.training.prompt_settings import PromptSettings
from onelora_diffusion.training.settings import (
    DIFFUSERS_FLAGS,
    Settings,
    parse_command_line,
    read_recipe,
    recipe,
)


def write(tmp_path, text):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    return path


def test_without_flags_the_recipe_of_the_digits_runs_on_the_miniature():
    settings = parse_command_line([], RECIPES)
    assert settings == recipe("digits", RECIPES) == read_recipe(RECIPES / "digits.yaml")
    assert (settings.dataset, settings.base, settings.output_dir) == ("digits", None, Path("runs/digits"))


@pytest.mark.parametrize("path", sorted(set(RECIPES.glob("*.yaml")) - {EMBEDDED}), ids=lambda path: path.stem)
def test_the_recipes_are_right_and_say_where_their_run_goes(path):
    settings = read_recipe(path)
    settings.check()
    assert settings.output_dir == Path("runs") / settings.dataset


@pytest.mark.parametrize(
    ("dataset", "folder"),
    [("imagefolder", "imagefolder"), ("torchvision:Flowers102", "flowers102"), ("hf:owner/Birds", "birds")],
)
def test_a_set_without_a_recipe_has_that_of_photographs_and_a_run_of_its_own(dataset, folder):
    settings = recipe(dataset, RECIPES)
    assert (settings.dataset, settings.output_dir) == (dataset, Path("runs") / folder)
    assert settings.base == "facebook/DiT-XL-2-256" and settings.learning_rate == 1e-3


def test_a_file_sets_the_defaults_and_flags_override_it(tmp_path):
    path = write(
        tmp_path,
        "dataset: fashion-mnist\nlearning_rate: 1e-3\nema_decay: [0.9, 0.99]\nmax_steps: null\nflip: true\n"
        "bias: true\ntargets: [to_q, ff.net.2]\noutput_dir: here\ncompile: false\n",
    )
    settings = parse_command_line(["--config", str(path), "--max-steps", "7", "--no-flip"], RECIPES)
    assert (settings.dataset, settings.learning_rate, settings.ema_decay) == ("fashion-mnist", 1e-3, (0.9, 0.99))
    assert (settings.max_steps, settings.flip, settings.bias) == (7, False, True)
    assert (settings.targets, settings.output_dir) == (("to_q", "ff.net.2"), Path("here"))
    assert settings.config == path and settings.batch_size == Settings.batch_size


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("lerning_rate: 1", "unknown setting lerning_rate: did you mean learning_rate?"),
        ("data-root: here", "unknown setting data-root: did you mean data_root?"),
        ("max_steps: [1", "is no YAML: "),
        ("- 1", "a recipe is a list of `name: value`"),
        ("rank: 2\nseed: 1\nrank: 3", "rank stands there twice"),
        ("config: other.yaml", "config names a recipe from outside"),
        ("flip: maybe", "flip is true or false, not maybe"),
        ("output_dir: null", "output_dir has to have a value, and is null"),
        ("batch_size: ~", "batch_size has to have a value, and is null"),
        ("peft_config: {n_frequency: 50}", "peft_config is neither a value nor a list of values"),
        ("targets: [[to_q]]", "targets is neither a value nor a list of values"),
        ("rank: !!int 2", "rank is neither a value nor a list of values"),
        ("rank: !!python/name:os.system", "is no YAML: could not determine a constructor"),
        ("<<: {rank: 2}", "unknown setting <<"),
        ("seed: 1\n? [rank]\n: 2", "is no YAML: while constructing a mapping"),
    ],
)
def test_what_is_wrong_in_a_file_is_named_with_the_file(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ValueError) as caught:
        read_recipe(path)
    assert str(path) in str(caught.value) and message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ("0123", "0123"),
        ("12:30:45", "12:30:45"),
        ("yes", "yes"),
        ("no", "no"),
        ("1e3", "1e3"),
        ("2026-11-30", "2026-11-30"),
        ("0x10", "0x10"),
        ("-5", "-5"),
        ("--flip", "--flip"),
        ("'null'", "null"),
        ("''", ""),
        ("a = b: c", "is no YAML"),
        ("a=b", "a=b"),
        ("null", None),
        ("~", None),
        ("", None),
    ],
)
def test_a_text_stays_the_text_that_is_written(tmp_path, written, value):
    path = write(tmp_path, f"prompt: {written}\n")
    if value == "is no YAML":
        with pytest.raises(ValueError, match=value):
            read_recipe(path, PromptSettings)
    else:
        assert read_recipe(path, PromptSettings).prompt == value


def test_numbers_switches_and_lists_are_what_their_settings_are(tmp_path):
    path = write(
        tmp_path,
        "seed: 0123\nlearning_rate: 1e-3\nflip: yes\nbias: OFF\ncompile: True\nmax_steps: 1_000\n"
        "ema_decay: [0.9, .99]\ntargets: [no, '0123']\nlatent_cache: 0123\n",
    )
    found = read_recipe(path)
    assert (found.seed, found.learning_rate, found.max_steps, found.ema_decay) == (123, 1e-3, 1000, (0.9, 0.99))
    assert (found.flip, found.bias, found.compile, found.norms) == (True, False, True, None)
    assert (found.targets, found.latent_cache) == (("no", "0123"), Path("0123"))


def test_a_value_of_the_wrong_kind_is_named_with_the_file(tmp_path, capsys):
    path = write(tmp_path, "batch_size: many")
    with pytest.raises(SystemExit) as caught:
        read_recipe(path)
    said = capsys.readouterr().err
    assert caught.value.code == 2 and "--batch-size" in said and f"in {path}" in said


def test_a_missing_file_is_named():
    with pytest.raises(FileNotFoundError, match="no recipe nowhere.yaml: give one by --config"):
        parse_command_line(["--config", "nowhere.yaml"], RECIPES)


@pytest.mark.parametrize(("name", "package"), [("adamw-8bit", "bitsandbytes"), ("schedule-free", "schedulefree")])
def test_an_optimizer_whose_library_is_missing_is_said(name, package, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    with pytest.raises(ValueError, match=f"--optimizer {name} needs a package that is missing: pip install {package}"):
        Settings(optimizer=name).check()


def test_settings_of_peft_are_taken_as_json(tmp_path):
    path = write(tmp_path, "method: peft:fourierft\npeft_config: '{\"n_frequency\": 50}'\n")
    assert read_recipe(path).adapter_config(3).peft_config == {"n_frequency": 50}
    with pytest.raises(ValueError, match="--peft-config n_frequency=50 is no JSON"):
        Settings(method="peft:fourierft", peft_config="n_frequency=50").check()
    with pytest.raises(ValueError, match="is no JSON of settings: 'n_frequency' is there twice"):
        Settings(method="peft:fourierft", peft_config='{"n_frequency": 1, "n_frequency": 2}').check()
    with pytest.raises(ValueError, match="peft_config goes with"):
        Settings(peft_config='{"r": 2}').check()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(learning_rate=0.0), "--learning-rate must be more than 0 and finite, not 0.0"),
        (dict(learning_rate=-1e-3), "--learning-rate must be more than 0 and finite, not -0.001"),
        (dict(learning_rate=float("nan")), "--learning-rate must be more than 0 and finite, not nan"),
        (dict(class_learning_rate=float("inf")), "--class-learning-rate must be more than 0 and finite, not inf"),
        (dict(snr_gamma=-5.0), "--snr-gamma must be more than 0 and finite, not -5.0"),
        (dict(max_grad_norm=0.0), "--max-grad-norm must be more than 0 and finite, not 0.0"),
        (dict(seed=-1), "--seed must be at least 0, not -1"),
        (dict(max_steps=0), "--max-steps must be at least 1, not 0"),
        (dict(max_train_time="0s"), "--max-train-time must be more than 0, not 0s"),
        (dict(warmup_steps=-1), "--warmup-steps must be at least 0, not -1"),
        (dict(sample_steps=0), "--sample-steps must be at least 1, not 0"),
        (dict(latent_cache_gb=float("nan")), "--latent-cache-gb must be at least 0, not nan"),
        (dict(guidance_scale=float("inf")), "--guidance-scale must be finite, not inf"),
        (dict(dataset="digitz"), "unknown dataset 'digitz': choose one of digits, .* .did you mean digits"),
        (dict(dataset="hf:"), "unknown dataset 'hf:'"),
        (dict(dataset="torchvision:Flower102"), "torchvision has no data set 'Flower102': Flowers102"),
    ],
)
def test_what_no_run_can_be_made_of_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Settings(**changes).check()


@pytest.mark.parametrize(
    ("flags", "value"),
    [
        (["--bias"], True),
        (["--no-bias"], False),
        (["--no_bias"], False),
        (["--bias", "True"], True),
        (["--bias", "False"], False),
        (["--bias", "None"], None),
        (["--bias", "--rank", "1"], True),
        ([], None),
    ],
)
def test_switches_are_switches(flags, value):
    assert parse_command_line(["--max-steps", "7", *flags], RECIPES).bias is value


def test_a_recipe_sets_a_switch_and_a_flag_unsets_it(tmp_path):
    path = write(tmp_path, "bias: true\nscale: false\nnorms: null\n")
    assert (read_recipe(path).bias, read_recipe(path).scale, read_recipe(path).norms) == (True, False, None)
    assert parse_command_line(["--config", str(path), "--no-bias"], RECIPES).bias is False


@pytest.mark.parametrize(
    ("flag", "here"),
    [("--train_batch_size=4", "--batch-size"), ("--report_to", "--track"), ("--max-train-steps", "--max-steps")],
)
def test_diffusers_names_are_told_ours(flag, here):
    with pytest.raises(ValueError, match=f"^{flag.split('=')[0]} is a name of other scripts; here there is {here}"):
        parse_command_line(["--base", "folder", flag], RECIPES)


def test_hints_are_for_flags_that_are_not_ours_and_name_ones_that_are():
    ours = {field.name for field in dataclasses.fields(Settings)}
    assert not ours & set(DIFFUSERS_FLAGS)
    named = {word for hint in DIFFUSERS_FLAGS.values() for word in re.findall(r"--([a-z-]+)", hint)}
    assert {name.replace("-", "_") for name in named} <= ours
