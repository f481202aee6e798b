"""--network_args: values, defaults, and words that are not known."""

import logging
from argparse import Namespace

import pytest

import weft.integrations.musubi as musubi
from tests.integrations.small_wan import WanModel
from tests.integrations.trainer import arguments
from weft.errors import ConfigError
from weft.integrations.musubi_args import EXAMPLES, READERS, NetworkArgs, network_args


def made(dim: int | None = 4, alpha: float | None = 2.0, **kwargs: str):
    return musubi.create_arch_network(1.0, dim, alpha, None, None, WanModel(), **kwargs)


def test_what_is_not_given_is_as_in_musubi():
    assert network_args({}) == NetworkArgs(conv_dim=None, conv_alpha=1.0, backend="peft")
    network = made(None, None)
    assert {(layer.lora_dim, layer.scale) for layer in network.unet_loras} == {(4, 0.25)}


@pytest.mark.parametrize("alpha", [0.0, 0])
def test_an_alpha_of_zero_is_the_rank(alpha: float):
    assert {layer.scale for layer in made(8, alpha).unet_loras} == {1.0}


def test_an_unknown_word_is_named_with_the_nearest(caplog):
    with caplog.at_level(logging.WARNING):
        made(rank_dropuot="0.1")
    assert "'rank_dropuot' is unknown and has no effect. Did you mean 'rank_dropout'?" in caplog.text


@pytest.mark.parametrize(
    "given", [
        {"conv_dim": "many"}, {"conv_dim": "-1"}, {"rank_dropout": "1"}, {"module_dropout": "x"},
        {"loraplus_lr_ratio": "0"}, {"exclude_patterns": "ffn"}, {"include_patterns": "'ffn'"},
        {"exclude_patterns": "__import__('os')"}, {"backend": "lycoris"}, {"dora": "perhaps"}, {"verbose": "loud"},
    ],
)  # fmt: skip
def test_a_value_of_another_kind_is_refused_with_an_example(given: dict[str, str]):
    key = next(iter(given))
    with pytest.raises(ConfigError, match=f"network_args: {key}=.* is not .*Write for instance"):
        network_args(given)


def test_every_example_is_read():
    for key in READERS:
        word, _, value = EXAMPLES[key].strip('"').partition("=")
        assert word == key and (key == "conv_alpha" or network_args({key: value}) != NetworkArgs())


def test_rslora_stands_in_alpha_so_that_every_reader_scales_alike():
    layer = made(16, 4.0, rslora="True").unet_loras[0]
    assert layer.scale == pytest.approx(4.0 / 16**0.5) and float(layer.alpha) == pytest.approx(4.0 * 16**0.5)


@pytest.mark.parametrize("given", [{"scale_weight_norms": 1.0}, {"dit_high_noise": "high.safetensors"}])
def test_dora_is_refused_beside_what_it_cannot_bear(given: dict[str, object]):
    with pytest.raises(ConfigError, match="dora=True"):
        made(dora="True").prepare_network(arguments(**given))
    made().prepare_network(arguments(**given))
    made(dora="True").prepare_network(Namespace())  # scripts of other models have fewer arguments


def test_dora_is_refused_beside_dropouts_of_the_ranks():
    with pytest.raises(ConfigError, match="DoRA measures"):
        made(dora="True", rank_dropout="0.1")


def test_the_trainer_finds_prepare_network_in_the_module():
    assert hasattr(musubi, "prepare_network")


def test_a_network_without_layers_is_refused_when_it_is_applied():
    for network in (made(dim=0), made(exclude_patterns="['.*']")):
        with pytest.raises(ConfigError, match="there are no layers to adapt"):
            network.apply_to(None, None)
    with pytest.raises(ConfigError, match="there are no layers to adapt"):
        made().apply_to(None, None, apply_unet=False)


def test_another_class_of_layers_is_refused():
    with pytest.raises(ConfigError, match="give no other"):
        musubi.create_network(["Head"], "lora_te", 1.0, 4, 1.0, None, None, WanModel())
