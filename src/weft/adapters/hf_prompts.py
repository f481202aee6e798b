"""Virtual tokens by the modules of PEFT, and the hooks that put them before what an encoder is asked."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from peft import PromptEmbedding, PromptEncoder
from peft.tuners.prefix_tuning import PrefixEncoder
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from weft.adapters.fused import InUse
from weft.adapters.modules import EMBEDDING
from weft.adapters.named import UNSET, Chance
from weft.adapters.prompts import Prefix, Prompt, SoftPrompt
from weft.adapters.recipe import Standing
from weft.errors import ConfigError
from weft.math.sharded import fill, whole

CHILD = "weft_prompts"  # child of the network that holds what makes the virtual tokens
BEFORE = EMBEDDING.removesuffix("embedding.weight")  # of the canonical names
STORES = "past_key_values"
HALF_TAKES = ("big_bird",)  # its forward names them, and its attention fails on them (transformers 5.23)
BY_IDS = ("longformer",)
WITH_STORES = (
    "bert, roberta, xlm-roberta, camembert, electra, ernie, megatron-bert, rembert, data2vec-text or "
    "roberta-prelayernorm"
)
Changed = tuple[Any, dict[str, Any]]  # what a module is asked in place of what came


@dataclass(frozen=True)
class Sizes:
    """Of a network, as far as virtual tokens need them. width: of a word's embedding, or of a layer's keys together."""

    width: int
    layers: int
    heads: int

    def fields(self) -> dict[str, Any]:
        """In PEFT's words."""
        return {"token_dim": self.width, "num_layers": self.layers, "num_attention_heads": self.heads,
                "num_transformer_submodules": 1, "task_type": "SEQ_CLS"}  # fmt: skip


class SoftPrompts:
    """A carrier of virtual tokens. What makes them is a child of the network, so that fast weights reach it by name."""

    def __init__(self, network: nn.Module, standings: Mapping[str, Standing]) -> None:
        assert isinstance(network, PreTrainedModel)
        self.names = tuple(standings)
        self.network, self.in_use = network, InUse()
        self.recipes: dict[str, SoftPrompt] = {}
        self.sizes: dict[str, Sizes] = {}
        holder = nn.ModuleDict()
        for name, standing in standings.items():
            assert isinstance(standing.recipe, SoftPrompt)
            self.recipes[name], self.sizes[name] = standing.recipe, sizes_of(standing.recipe, network)
            holder[name] = _unset(_fresh(standing.recipe, self.sizes[name], 0), network.get_input_embeddings())
        network.add_module(CHILD, holder.train(network.training))
        network.register_forward_pre_hook(self._at_the_input, with_kwargs=True)
        if any(isinstance(recipe, Prefix) for recipe in self.recipes.values()):
            backbone_of(network).register_forward_pre_hook(self._in_the_layers, with_kwargs=True)

    def paths_of(self, name: str) -> tuple[str, ...]:
        """No layer has an adapter."""
        return ()

    def base_layer(self, path: str) -> nn.Module:
        raise KeyError(path)

    def tensors(self, name: str) -> dict[str, Tensor]:
        """Canonical name -> tensor: as PEFT's module calls it."""
        own = self._maker(name).state_dict(keep_vars=True)
        return {BEFORE + key: tensor for key, tensor in own.items()}

    def begin(self, name: str, chance: Chance) -> None:
        """First values as PEFT's own modules have them, or embeddings of words. Every process draws them whole."""
        recipe, own = self.recipes[name], self.tensors(name)
        first = _fresh(recipe, self.sizes[name], chance(BEFORE).initial_seed()).state_dict()
        if isinstance(recipe, Prompt) and recipe.init == "vocabulary":
            words = whole(_words(self.network).weight.detach())
            drawn = torch.randint(len(words), (recipe.tokens,), generator=chance(EMBEDDING))
            first = {"embedding.weight": words[drawn.to(words.device)]}
        for key, tensor in first.items():
            fill(own[BEFORE + key], tensor)

    def answer(self, name: str | None) -> None:
        """Ask with the virtual tokens of one adapter, or with None without any."""
        self.in_use.name = name

    def rest(self) -> None:
        """Ask without any."""
        self.in_use.name = None

    def _maker(self, name: str) -> nn.Module:
        return self.network.get_submodule(f"{CHILD}.{name}")

    def _made(self, name: str, device: torch.device) -> Tensor:
        """The virtual tokens of an adapter (1, tokens, width of each): the same for all documents."""
        return self._maker(name)(torch.arange(self.recipes[name].tokens, device=device)[None])

    def _at_the_input(self, network: nn.Module, args: Any, kwargs: dict[str, Any]) -> Changed | None:
        name = self.in_use.name
        if name is None or isinstance(self.recipes[name], Prefix):
            return None
        ids, rest = kwargs["input_ids"], {key: value for key, value in kwargs.items() if key != "input_ids"}
        words = _words(self.network)(ids)  # (B, L, D)
        tokens = self._made(name, ids.device).to(words.dtype).expand(len(ids), -1, -1)
        return args, {
            **rest,
            "inputs_embeds": torch.cat([tokens, words], 1),
            "attention_mask": _longer(kwargs["attention_mask"], tokens.shape[1]),
        }

    def _in_the_layers(
        self, backbone: nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]] | None:
        name = self.in_use.name
        if name is None or not isinstance(self.recipes[name], Prefix):
            return None
        mask, sizes = kwargs["attention_mask"], self.sizes[name]
        made = self._made(name, mask.device)
        tokens = made.shape[1]
        split = made.expand(len(mask), -1, -1).unflatten(2, (sizes.layers * 2, sizes.heads, -1))
        # (2 layers, B, heads, tokens, width of a head), of each layer its keys and its values
        stores = split.permute(2, 0, 3, 1, 4).split(2)
        cache = DynamicCache([(keys, values) for keys, values in stores])
        return args, {**kwargs, STORES: cache, "attention_mask": _longer(mask, tokens)}


def sizes_of(recipe: SoftPrompt, network: nn.Module) -> Sizes:
    """What virtual tokens on a network need to know of it. Raises ConfigError for a network that takes none."""
    assert isinstance(network, PreTrainedModel)
    config = network.config
    width = _words(network).embedding_dim
    if isinstance(recipe, Prefix):
        takes = inspect.signature(backbone_of(network).forward).parameters
        if STORES not in takes or config.model_type in HALF_TAKES:
            raise ConfigError(
                f"adapter.kind: {config.model_type} takes no keys and values from outside, which kind prefix gives "
                f"each layer. Write adapter.kind=prompt, or choose a model of type {WITH_STORES}."
            )
        width = config.hidden_size
    elif config.model_type in BY_IDS:
        raise ConfigError(
            f"adapter.kind: {config.model_type} finds its windows by the tokens of a document, and virtual ones have "
            "no ids. Write adapter.kind=lora."
        )
    return Sizes(width, config.num_hidden_layers, config.num_attention_heads)


def shapes_on(recipe: SoftPrompt, network: nn.Module) -> dict[str, tuple[int, ...]]:
    """Canonical name -> shape of every tensor that is trained."""
    with torch.device("meta"):
        made = _module(recipe, sizes_of(recipe, network))
    return {BEFORE + key: tuple(tensor.shape) for key, tensor in made.state_dict().items()}


@torch.no_grad()
def embeddings(recipe: SoftPrompt, tensors: Mapping[str, Tensor]) -> Tensor:
    """The virtual tokens (tokens, width of each) that these tensors make, in fp32 on the CPU."""
    own = {key.removeprefix(BEFORE): tensor.detach().cpu().float() for key, tensor in tensors.items()}
    last = own.get("transform.2.weight")
    width = own["embedding.weight"].shape[1]
    if isinstance(recipe, Prompt) or (isinstance(recipe, Prefix) and last is None):
        return own["embedding.weight"]
    made = _fresh(recipe, Sizes(width, len(last) // (2 * width) if last is not None else 1, 1), 0).eval()
    made.load_state_dict(own)
    return made(torch.arange(recipe.tokens)[None])[0]


def backbone_of(network: PreTrainedModel) -> nn.Module:
    """The encoder under the head."""
    return network.get_submodule(network.base_model_prefix)


def _words(network: PreTrainedModel) -> nn.Embedding:
    words = network.get_input_embeddings()
    assert isinstance(words, nn.Embedding)
    return words


def _longer(mask: Tensor, tokens: int) -> Tensor:
    return torch.cat([mask.new_ones(len(mask), tokens), mask], 1)


def _module(recipe: SoftPrompt, sizes: Sizes) -> nn.Module:
    config = recipe.encoder_config(sizes)
    if isinstance(recipe, Prefix):
        return PrefixEncoder(config)
    if isinstance(recipe, Prompt):
        config.inference_mode = True  # it looks for words itself otherwise, by chance of its own
        return PromptEmbedding(config, nn.Embedding(1, 1))
    return PromptEncoder(config)


def _fresh(recipe: SoftPrompt, sizes: Sizes, seed: int) -> nn.Module:
    """PEFT's module on the CPU, in fp32, with the first values that torch gives it after a seed."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(seed)
        return _module(recipe, sizes).float()


def _unset(module: nn.Module, beside: nn.Module) -> nn.Module:
    """Without values, where the network is."""
    place = next(beside.parameters()).device
    for each in module.modules():
        for key, parameter in list(each.named_parameters(recurse=False)):
            # By setattr: an LSTM keeps a list of its own of what it was given.
            setattr(each, key, nn.Parameter(torch.full_like(parameter, UNSET, device=place)))
    return module
