"""Every kind of adapter, under the rules that all keep: exact base, fp32 weights, own names, right gradients, files."""

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from tests.adapters.conftest import PRESETS
from tests.adapters.recipes import KINDS, saved
from weft.adapters.recipe import recipe_of
from weft.contracts import Adapters
from weft.errors import ModelError
from weft.formats.canonical import at_strength, tensors_at_scale
from weft.formats.describe import describe
from weft.formats.diffusers import DiffusersFile
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.run.moving_average import MovingAverage

every_kind = pytest.mark.parametrize("recipe", KINDS.values(), ids=list(KINDS))
AUTOCAST = (None, torch.bfloat16)


def answers(network, adapters, ask, name="student", autocast=None):
    with adapters.use(name), torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None):
        return ask(network)


@every_kind
@pytest.mark.parametrize("autocast", AUTOCAST)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_base_stays_bit_by_bit_under_none(recipe, autocast, dtype, tiny_wan, ask, attach, shaken):
    network = tiny_wan().to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast is not None), torch.no_grad():
        expected = ask(network)
    adapters = attach(recipe, network, ("student", "critic"))
    shaken(adapters)
    found = answers(network, adapters, ask, None, autocast)
    assert found.dtype == expected.dtype and torch.equal(found, expected)
    changed = answers(network, adapters, ask, "student", autocast)
    assert changed.dtype == expected.dtype and not torch.equal(changed, expected)
    assert torch.equal(answers(network, adapters, ask, None, autocast), expected)


@every_kind
def test_a_new_adapter_of_any_kind_changes_nothing(recipe, tiny_wan, ask, attach):
    network = tiny_wan()
    expected = ask(network)
    adapters = attach(recipe, network)
    assert isinstance(adapters.names, tuple) and callable(Adapters.use)
    assert_close(answers(network, adapters, ask), expected, atol=1e-6, rtol=1e-6)


@every_kind
def test_weights_are_fp32_and_begin_alike_whatever_the_global_chance(recipe, tiny_wan, attach):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.random.get_rng_state()
        adapters = attach(recipe, tiny_wan().to(torch.bfloat16), ("critic", "student"), seed=9)
        assert torch.equal(torch.random.get_rng_state(), before)
        states.append(adapters.state_dict("student"))
    assert {tensor.dtype for tensor in states[0].values()} == {torch.float32}
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


@every_kind
def test_without_a_dropout_a_training_step_draws_no_chance(recipe, tiny_wan, ask, attach):
    network = tiny_wan().train()
    adapters = attach(recipe, network)
    network.train()
    before = torch.random.get_rng_state()
    with adapters.use("student"):
        ask(network).sum().backward()
    assert torch.equal(torch.random.get_rng_state(), before)


@every_kind
def test_two_adapters_of_a_kind_do_not_mix(recipe, tiny_wan, ask, attach, shaken):
    network = tiny_wan()
    both = attach(recipe, network, ("student", "critic"))
    for name, seed in (("student", 1), ("critic", 2)):
        shaken(both, name, seed)
    for name, seed in (("student", 1), ("critic", 2)):
        lone_network = tiny_wan()
        lone = attach(recipe, lone_network, (name,))
        shaken(lone, name, seed)
        assert torch.equal(answers(network, both, ask, name), answers(lone_network, lone, ask, name))


@every_kind
def test_recomputed_blocks_give_the_same_gradients_and_autograd_agrees_with_differences(
    recipe, tiny_wan, ask, attach, shaken
):
    gradients = []
    for recompute in (False, True):
        network = tiny_wan()
        adapters = attach(recipe, network, ("student", "critic"))
        shaken(adapters)
        network.train()
        if recompute:
            network.enable_gradient_checkpointing(lambda f, *a: checkpoint(f, *a, use_reentrant=False))
        with adapters.use("student"):
            ask(network).square().mean().backward()
        parameters = adapters.parameters("student")
        gradients.append({key: p.grad for key, p in parameters.items()})
        assert all(p.grad is None for p in adapters.parameters("critic").values())
    for key, gradient in gradients[0].items():
        assert gradient is not None and gradient.any() and torch.equal(gradient, gradients[1][key]), key
    # Along the gradient's own direction the loss grows by its norm. Central difference in fp32: three digits.
    norm = torch.stack([gradient.square().sum() for gradient in gradients[0].values()]).sum().sqrt()
    moved = []
    for sign in (1, -1):
        with torch.no_grad():
            for key, parameter in parameters.items():
                parameter.add_(sign * 1e-2 * gradients[0][key] / norm)
            moved.append(answers(network, adapters, ask).square().mean())
            for key, parameter in parameters.items():
                parameter.sub_(sign * 1e-2 * gradients[0][key] / norm)
    assert_close((moved[0] - moved[1]) / 2e-2, norm, rtol=1e-2, atol=1e-4)


@every_kind
def test_the_plan_counts_the_parameters_that_there_are(recipe, tiny_wan, attach):
    network = tiny_wan()
    report = recipe.match(recipe.layers(network), PRESETS, {})
    adapters = attach(recipe, network)
    assert recipe.trainable(report) == sum(p.numel() for p in adapters.parameters("student").values())
    assert adapters.paths == report.paths


@every_kind
def test_a_state_that_is_saved_and_loaded_goes_on_as_before(recipe, tiny_wan, ask, attach, shaken):
    """A resumed run: another process, whose own first values are replaced. PiSSA's first factors are in the state."""
    network = tiny_wan()
    adapters = attach(recipe, network)
    shaken(adapters)
    state = {key: tensor.clone() for key, tensor in adapters.state_dict("student").items()}
    resumed_network = tiny_wan()
    resumed = attach(recipe, resumed_network, seed=1234)
    resumed.load_state_dict("student", state)
    assert torch.equal(answers(resumed_network, resumed, ask), answers(network, adapters, ask))
    assert list(resumed.state_dict("student")) == list(state)
    with pytest.raises(ModelError, match=r"1 of .* tensors are missing"):
        resumed.load_state_dict("student", dict(list(state.items())[1:]))


@every_kind
@torch.no_grad()
def test_peft_answers_as_we_do_from_our_folder(recipe, tiny_wan, ask, attach, shaken, tmp_path, recwarn):
    network = tiny_wan()
    adapters = attach(recipe, network)
    shaken(adapters)
    folder = PeftFolder().write(tmp_path / "adapter", saved(recipe, adapters))
    theirs = PeftModel.from_pretrained(tiny_wan(), folder)
    expected = answers(network, adapters, ask)
    assert_close(ask(theirs), expected, atol=2e-5, rtol=1e-4)
    assert not torch.allclose(expected, ask(tiny_wan()), atol=1e-3)
    told = [str(w.message) for w in recwarn if "keyword" in str(w.message) or "missing" in str(w.message).lower()]
    assert not told, told


@every_kind
@torch.no_grad()
def test_an_adapter_from_its_file_answers_as_it_did_in_training(recipe, tiny_wan, ask, attach, shaken, tmp_path):
    network = tiny_wan()
    adapters = attach(recipe, network)
    shaken(adapters)
    written = saved(recipe, adapters)
    read = read_adapter(PeftFolder().write(tmp_path, written))
    assert (read.kind, read.rank, read.alpha, read.conv_rank) == (
        written.kind, written.rank, written.alpha, written.conv_rank,
    )  # fmt: skip
    assert read.metadata == {"weft.step": "3"} and set(read.targets) == set(adapters.paths)
    applied_network = tiny_wan()
    section = recipe_of(read, read.targets)
    applied = section.attach(applied_network, read.targets, ("default",), 0)
    applied.load_state_dict("default", read.tensors)
    expected = answers(network, adapters, ask)
    assert_close(answers(applied_network, applied, ask, "default"), expected, atol=2e-5, rtol=1e-4)


@every_kind
def test_a_folder_is_described_from_its_header(recipe, tiny_wan, attach, tmp_path):
    written = saved(recipe, attach(recipe, tiny_wan()))
    told = describe(PeftFolder().write(tmp_path, written))
    assert (told.kind, told.rank, told.alpha, told.scale) == (written.kind, written.rank, written.alpha, written.scale)
    assert set(told.targets) == set(written.targets)
    assert told.parameters == sum(tensor.numel() for tensor in written.tensors.values())


@pytest.mark.parametrize("kind", ["loha", "lokr", "oft"])
def test_the_diffusers_format_refuses_other_kinds_by_name(kind, tiny_wan, attach, tmp_path):
    recipe = KINDS[kind]
    assert "diffusers" not in recipe.formats
    with pytest.raises(ModelError, match=rf"(?i)holds LoRA alone, and this adapter's kind is {kind}; write --to peft"):
        DiffusersFile().write(tmp_path, saved(recipe, attach(recipe, tiny_wan())))
    assert not list(tmp_path.iterdir())


@every_kind
def test_a_moving_average_of_any_kind_follows_and_answers(recipe, tiny_wan, ask, attach, shaken):
    """What validation and export do: the averages stand in for the weights, and the weights come back."""
    network = tiny_wan()
    adapters = attach(recipe, network)
    average = MovingAverage(decay=0.5, start=0)
    values = []
    for step in (1, 2, 3):
        shaken(adapters, seed=step)
        values.append({key: p.detach().clone() for key, p in adapters.parameters("student").items()})
        average.update(step, adapters.parameters("student"))
    for key, tensor in average.tensors.items():
        assert_close(tensor, 0.25 * values[0][key] + 0.25 * values[1][key] + 0.5 * values[2][key])
    adapters.load_state_dict("student", {**adapters.state_dict("student"), **average.tensors})
    written = saved(recipe, adapters)
    applied_network = tiny_wan()
    applied = recipe_of(written, written.targets).attach(applied_network, written.targets, ("default",), 0)
    applied.load_state_dict("default", written.tensors)
    expected = answers(network, adapters, ask)
    assert_close(answers(applied_network, applied, ask, "default"), expected, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr by 4, both", "conv", "pissa"])
@torch.no_grad()
def test_half_the_strength_is_half_the_change_and_another_alpha_the_same(kind, tiny_wan, attach, shaken):
    recipe = KINDS[kind]
    adapters = attach(recipe, tiny_wan())
    shaken(adapters)
    written = saved(recipe, adapters)
    path = "patch_embedding" if kind == "conv" else written.targets[0]

    def change(tensors, section):
        network = tiny_wan()
        applied = section.attach(network, written.targets, ("default",), 0)
        applied.load_state_dict("default", tensors)
        layer = network.get_submodule(path)
        x = torch.ones(1, 16, 1, 2, 2) if kind == "conv" else torch.ones(1, network.config.num_attention_heads * 24)
        base = layer(x)
        with applied.use("default"):
            return layer(x) - base

    section = recipe_of(written, written.targets)
    whole = change(written.tensors, section)
    assert_close(change(at_strength(written, 0.5).tensors, section), 0.5 * whole, atol=1e-6, rtol=1e-4)
    other = section.model_copy(update={"alpha": 5.0, **({"conv_alpha": 7.0} if kind == "conv" else {})})
    conv_scale = other.conv_scale if kind == "conv" else None
    assert_close(change(tensors_at_scale(written, other.scale, conv_scale), other), whole, atol=1e-6, rtol=1e-4)


def test_a_rotation_has_no_strength(tiny_wan, attach):
    written = saved(KINDS["oft"], attach(KINDS["oft"], tiny_wan()))
    assert at_strength(written, 1.0) is written and tensors_at_scale(written, 0.1) == written.tensors
    with pytest.raises(ModelError, match="leave the strength at 1"):
        at_strength(written, 0.5)
