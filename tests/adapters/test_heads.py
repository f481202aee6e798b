"""Heads and biases that are trained beside an adapter, as PEFT's modules_to_save and bias mean it."""

from typing import Literal

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForSequenceClassification

from tests.adapters.on_encoders import ALL_KINDS, KINDS, NAME, Fitted, family_of, fitted, read
from tests.small_encoders import save_tiny_encoder
from weft.adapters.attach import Standing, attach
from weft.adapters.hf_prompts import sizes_of
from weft.adapters.lora import Lora
from weft.adapters.no_adapter import NoAdapter
from weft.adapters.prompts import SoftPrompt
from weft.adapters.recipe import Recipe
from weft.errors import ModelError
from weft.families.encoder import Encoder


@pytest.fixture(params=KINDS.values(), ids=list(KINDS))
def one(request: pytest.FixtureRequest) -> Fitted:
    return fitted(request.param)


def test_fresh_adapters_answer_as_the_model_does_but_for_virtual_tokens(one: Fitted) -> None:
    if one.recipe.virtual_tokens:
        assert one.recipe.virtual_tokens == 3
    else:
        assert torch.allclose(one.answer(), one.answer(None), atol=1e-6)


def test_outside_an_adapter_the_model_is_what_it_was_to_the_bit(one: Fitted) -> None:
    before = one.answer(None)
    one.shake()
    assert (one.answer() - before).abs().max() > 1e-3
    assert torch.equal(one.answer(None), before)
    assert (one.answer() - before).abs().max() > 1e-3  # and back


def test_every_trained_tensor_is_a_parameter_of_the_network_and_has_a_gradient(one: Fitted) -> None:
    one.shake()
    one.answer().square().sum().backward()
    own = {id(parameter) for parameter in one.network.parameters() if parameter.requires_grad}
    assert own == {id(parameter) for parameter in one.parameters.values()}
    assert all(parameter.grad is not None for parameter in one.parameters.values())
    assert all(parameter.grad.abs().max() > 0 for parameter in one.parameters.values() if parameter.grad is not None)


def test_its_state_comes_back_whole(one: Fitted) -> None:
    one.shake()
    other = fitted(one.recipe, seed=5)
    other.adapters.load_state_dict(NAME, {key: t.clone() for key, t in one.adapters.state_dict(NAME).items()})
    assert torch.equal(other.answer(), one.answer())


def test_first_values_come_of_the_seed(one: Fitted) -> None:
    torch.manual_seed(77)  # nobody draws from it
    again, another = fitted(one.recipe), fitted(one.recipe, seed=1)
    now = one.adapters.state_dict(NAME)
    assert all(torch.equal(tensor, again.adapters.state_dict(NAME)[key]) for key, tensor in now.items())
    of_chance = one.recipe.kind not in ("ia3",) and getattr(one.recipe, "init", "") != "pissa"
    equal = all(torch.equal(tensor, another.adapters.state_dict(NAME)[key]) for key, tensor in now.items())
    assert equal != of_chance


def test_a_head_begins_as_the_models_own_and_is_called_as_in_the_model(one: Fitted) -> None:
    head = dict(read(one.family)[0].named_parameters())
    assert one.adapters.whole(NAME) == ("classifier",)
    assert torch.equal(one.parameters["classifier.weight"], head["classifier.weight"])
    assert torch.equal(one.parameters["classifier.bias"], head["classifier.bias"])


@pytest.mark.parametrize("model_type", ["distilbert", "deberta-v2", "roberta", "modernbert"])
def test_what_the_source_has_no_weights_for_is_trained_whole(model_type: str) -> None:
    one = fitted(Lora(targets="auto", rank=2), model_type)
    heads = one.adapters.whole(NAME)
    assert heads == one.family.heads(read(one.family)[0]) and len(heads) >= 1
    trained = set(one.parameters)
    for path in heads:
        names = {f"{path}.{key}" for key, _ in one.network.get_submodule(path).named_parameters() if "weft" not in key}
        assert names and names <= trained
    one.shake()
    assert torch.isfinite(one.answer()).all()


@pytest.mark.parametrize("bias", ["all", "lora_only"])
def test_the_biases_that_are_trained_are_those_of_peft(bias: Literal["all", "lora_only"]) -> None:
    one = fitted(Lora(targets="auto", rank=2, bias=bias))
    theirs = get_peft_model(
        read(one.family)[0],
        LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["query", "value"], bias=bias),  # pyright: ignore
    )
    expected = {
        name.removeprefix("base_model.model.").replace(".base_layer", "").replace("modules_to_save.default.", "")
        for name, parameter in theirs.named_parameters()
        if "bias" in name and parameter.requires_grad and "original_module" not in name
    }
    assert {name for name in one.parameters if "bias" in name} == expected | {"classifier.bias"}


def test_a_model_without_biases_refuses_to_train_them() -> None:
    with pytest.raises(ModelError, match="there is none here"):
        fitted(Lora(targets="auto", bias="all"), "modernbert")


def test_biases_belong_to_one_adapter_alone() -> None:
    network = read(family_of())[0]
    paths = ("bert.encoder.layer.0.attention.self.query",)
    with pytest.raises(Exception, match=r"cannot be those of 2 adapters"):
        attach(network, {name: Standing(Lora(bias="all"), paths) for name in ("one", "two")}, 0)


def test_two_adapters_have_a_head_each() -> None:
    family = family_of()
    network = read(family)[0]
    paths = ("bert.encoder.layer.0.attention.self.query",)
    adapters = attach(network, {name: Standing(Lora(), paths, ("classifier",)) for name in ("one", "two")}, 0)
    adapters.initialize()
    with torch.no_grad():
        adapters.parameters("one")["classifier.bias"] += 1
    both = [Fitted(family, network, adapters, Lora()).answer(name) for name in ("one", "two", None)]
    assert torch.allclose(both[0], both[1] + 1) and torch.equal(both[1], both[2])


# ---- Once, and in which order (E4) ----------------------------------------------------------------------------------


def test_a_network_is_wrapped_once_and_never_twice() -> None:
    one = fitted(Lora(targets="auto", rank=2))
    with pytest.raises(ModelError, match="wrapped twice"):
        attach(one.network, {"more": Standing(Lora(), one.adapters.paths)}, 0)
    with pytest.raises(ModelError, match="wrapped twice"):
        plain = fitted(NoAdapter())
        attach(plain.network, {"more": Standing(Lora(), one.adapters.paths)}, 0)


@pytest.mark.parametrize("recipe", [KINDS["lora"], KINDS["ia3"], KINDS["prompt"]], ids=["lora", "ia3", "prompt"])
def test_weights_before_the_adapter_and_after_it_make_one_model(recipe: Recipe, tmp_path) -> None:
    """A model that was trained whole, then wrapped; and one that was wrapped, then given the trained weights."""
    trained = fitted(NoAdapter())
    trained.shake(0.05)
    trained.network.save_pretrained(tmp_path)
    for file in (trained.family.folder / "tokenizer.json", trained.family.folder / "tokenizer_config.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    family = Encoder(source=str(tmp_path), labels=trained.family.labels, multi_label=False)
    loaded_first = fitted(recipe, family=family)
    wrapped_first = fitted(recipe)
    before = {name: parameter for name, parameter in wrapped_first.network.named_parameters() if "weft" not in name}
    weights = trained.adapters.state_dict(NAME)
    with torch.no_grad():
        for name, parameter in before.items():
            own = name.replace(".base_layer", "")
            if own in weights:
                parameter.copy_(weights[own])
    wrapped_first.adapters.initialize()
    for one in (loaded_first, wrapped_first):
        assert torch.equal(one.parameters["classifier.weight"], weights["classifier.weight"])
    assert torch.equal(loaded_first.answer(None), wrapped_first.answer(None))
    assert torch.equal(loaded_first.answer(), wrapped_first.answer())


# ---- The line (E1) --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [kind for kind in ALL_KINDS if kind not in ("pissa", "native lora")])
def test_parameters_are_counted_as_peft_counts_them(kind: str) -> None:
    one = fitted(ALL_KINDS[kind])
    bare = read(one.family)[0]
    if kind == "none":
        expected = (sum(p.numel() for p in bare.parameters()),) * 2
    else:
        recipe = one.recipe
        config = (
            recipe.encoder_config(sizes_of(recipe, bare))
            if isinstance(recipe, SoftPrompt)
            else recipe.peft_config({path: bare.get_submodule(path) for path in one.adapters.paths_of(NAME)})
        )
        config.task_type = "SEQ_CLS"  # pyright: ignore[reportAttributeAccessIssue]
        if recipe.biases != "none":
            config.bias = recipe.biases  # pyright: ignore[reportAttributeAccessIssue]
        theirs = get_peft_model(bare, config)
        assert isinstance(theirs, PeftModel)
        expected = theirs.get_nb_trainable_parameters()
    trained = sum(parameter.numel() for parameter in one.parameters.values())
    everything = sum(parameter.numel() for parameter in one.network.parameters())
    assert (trained, everything) == expected


def test_a_trained_head_is_trained_on(tmp_path) -> None:
    folder = save_tiny_encoder(tmp_path / "bert", head="classifier", labels=("no", "yes"))
    family = Encoder(source=str(folder), labels=("no", "yes"), multi_label=False)
    theirs = AutoModelForSequenceClassification.from_pretrained(folder)
    one = fitted(Lora(targets="auto", rank=2), family=family)
    head = theirs.get_submodule("classifier")
    assert isinstance(head, nn.Linear)
    assert torch.equal(one.parameters["classifier.weight"], head.weight)
