"""Kind none: the plain transformers model is trained, to the bit as a loop of one's own would."""

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForSequenceClassification

from tests.adapters.on_encoders import NAME, Fitted, family_of, fitted, question, read
from weft.adapters.attach import Standing, attach
from weft.adapters.no_adapter import NoAdapter
from weft.errors import ConfigError
from weft.run.optimizers import CustomOptimizer

LABELS = torch.tensor([0, 2, 1])


@pytest.fixture
def plain() -> Fitted:
    return fitted(NoAdapter())


def test_nothing_is_wrapped_and_no_module_is_added(plain: Fitted) -> None:
    bare = read(plain.family)[0]
    assert [(n, type(m)) for n, m in bare.named_modules()] == [(n, type(m)) for n, m in plain.network.named_modules()]
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in plain.network.modules())
    assert "forward" not in vars(plain.network)


def test_all_parameters_are_trained_under_their_own_names(plain: Fitted) -> None:
    own = dict(plain.network.named_parameters())
    assert list(plain.parameters) == list(own)
    assert all(plain.parameters[name] is parameter and parameter.requires_grad for name, parameter in own.items())


def test_there_is_no_base_to_go_back_to(plain: Fitted) -> None:
    plain.shake()
    assert not plain.recipe.has_base
    assert torch.equal(plain.answer(None), plain.answer(NAME))


def test_20_steps_are_those_of_the_plain_transformers_model_to_the_bit(plain: Fitted, tmp_path) -> None:
    plain.network.save_pretrained(tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path).train()
    plain.network.train()
    build = CustomOptimizer(path="torch.optim.AdamW", lr=1e-3, weight_decay=0.1)
    ours = build.build(plain.parameters, plain.recipe.lr_factor)
    usual = torch.optim.AdamW(theirs.parameters(), lr=1e-3, weight_decay=0.1)
    docs, losses = question(), []
    for step in range(20):
        torch.manual_seed(step)  # of the dropouts
        mine = functional.cross_entropy(plain.answer(), LABELS)
        torch.manual_seed(step)
        loss = theirs(input_ids=docs.ids, attention_mask=docs.mask.long(), labels=LABELS).loss
        assert torch.equal(mine, loss)
        for each, optimizer in ((mine, ours), (loss, usual)):
            optimizer.zero_grad()
            each.backward()
            optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    expected = theirs.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in plain.adapters.state_dict(NAME).items())


def test_its_state_comes_back_whole(plain: Fitted) -> None:
    plain.shake()
    saved = {name: tensor.clone() for name, tensor in plain.adapters.state_dict(NAME).items()}
    other = fitted(NoAdapter())
    other.adapters.load_state_dict(NAME, saved)
    assert torch.equal(other.answer(), plain.answer())


def test_it_cannot_be_two_roles() -> None:
    network = read(family_of())[0]
    with pytest.raises(ConfigError, match="cannot be 2 roles"):
        attach(network, {name: Standing(NoAdapter(), ()) for name in ("one", "two")}, 0)


def test_an_adapter_to_start_from_is_a_model_to_begin_with(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"family\.source"):
        NoAdapter(start_from=tmp_path)


@pytest.mark.parametrize("medium", ["video", "text"])
def test_it_is_refused_for_models_that_are_adapted_alone(medium: str) -> None:
    reason = NoAdapter().refusal(medium)
    assert reason is not None and medium in reason and "adapter.kind=lora" in reason
    assert NoAdapter().refusal("documents") is None
