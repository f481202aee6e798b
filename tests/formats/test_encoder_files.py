"""What runs of encoders leave: PEFT folders with heads that plain PEFT reads, and whole models."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from tests.adapters.on_encoders import CLASSES, KINDS, NAME, Fitted, family_of, fitted, question, read, source
from weft.adapters.no_adapter import NoAdapter
from weft.adapters.prompts import Prompt, PTuning
from weft.errors import ModelError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.canonical import tensors_at_scale
from weft.formats.describe import describe
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.formats.transformers_folder import TransformersFolder
from weft.run.saving import Export

# Files hold what these make, and not what they were trained as.
FOLDED = ("pissa", "p-tuning", "p-tuning by an LSTM", "prefix, projected")


def saved(one: Fitted, base: Path) -> SavedAdapter:
    """As `run/saving.py` does it."""
    tensors = one.adapters.state_dict(NAME)
    paths, about = one.adapters.paths_of(NAME), {"base_model": str(base)}
    whole, options = one.adapters.whole(NAME), one.recipe.of_network(one.network)
    return Export(one.recipe, paths, about, tensors, whole, options).saved(tensors)


def theirs(model: torch.nn.Module) -> Tensor:
    docs = question()
    return model.eval()(input_ids=docs.ids, attention_mask=docs.mask.long()).logits


def whole_model(model_type: str, folder: Path) -> Path:
    """The encoder with the head that every run of these tests begins with."""
    read(family_of(model_type))[0].save_pretrained(folder)
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_plain_peft_answers_as_the_run_did(kind: str, tmp_path: Path) -> None:
    one = fitted(KINDS[kind])
    one.shake()
    base = whole_model("bert", tmp_path / "base")
    folder = PeftFolder().write(tmp_path / "adapter", saved(one, base))
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), str(folder))
    assert torch.allclose(theirs(model), one.answer(), atol=1e-6)
    assert (one.answer() - one.answer(None)).abs().max() > 1e-2


@pytest.mark.parametrize("model_type", ["distilbert", "deberta-v2", "roberta"])
@pytest.mark.parametrize("kind", ["lora", "ia3", "prompt"])
def test_plain_peft_finds_the_heads_of_other_models(model_type: str, kind: str, tmp_path: Path) -> None:
    one = fitted(KINDS[kind], model_type)
    one.shake()
    base = whole_model(model_type, tmp_path / "base")
    folder = PeftFolder().write(tmp_path / "adapter", saved(one, base))
    model = PeftModel.from_pretrained(AutoModelForSequenceClassification.from_pretrained(base), str(folder))
    assert torch.allclose(theirs(model), one.answer(), atol=1e-6)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if kind not in ("pissa",) and "p-tuning" not in kind and "projected" not in kind]
)
def test_a_run_goes_on_from_a_folder(kind: str, tmp_path: Path) -> None:
    one = fitted(KINDS[kind])
    one.shake()
    folder = PeftFolder().write(tmp_path / "adapter", saved(one, source()))
    earlier = read_adapter(folder, heads=True)
    other = fitted(KINDS[kind], seed=9)
    assert other.recipe.differences(earlier) == [] and earlier.bias == other.recipe.biases
    other.adapters.load_state_dict(NAME, tensors_at_scale(earlier, other.recipe.scale, other.recipe.conv_scale))
    assert torch.equal(other.answer(), one.answer())


def test_what_p_tuning_made_goes_on_as_a_prompt(tmp_path: Path) -> None:
    one = fitted(PTuning(tokens=3))
    one.shake()
    folder = PeftFolder().write(tmp_path / "adapter", saved(one, source()))
    earlier = read_adapter(folder, heads=True)
    assert PTuning(tokens=3).differences(earlier) == ["adapter.kind=prompt"]
    assert Prompt(tokens=4).differences(earlier) == ["adapter.tokens=3"]
    other = fitted(Prompt(tokens=3))
    other.adapters.load_state_dict(NAME, tensors_at_scale(earlier, 1.0))
    assert torch.allclose(other.answer(), one.answer(), atol=1e-6)


@pytest.mark.parametrize("kind", ["lora", "lora, all biases", "ia3", "prompt"])
def test_what_asks_for_changes_of_layers_alone_refuses_heads_in_words(kind: str, tmp_path: Path) -> None:
    folder = PeftFolder().write(tmp_path / "adapter", saved(fitted(KINDS[kind]), source()))
    with pytest.raises(ModelError, match=r"(modules trained whole|adapter of kind).*start_from") as refused:
        read_adapter(folder)
    assert "classifier" in str(refused.value)


@pytest.mark.parametrize("kind", ["lora, all biases", "ia3", "prompt", "p-tuning", "prefix"])
def test_a_folder_can_be_described_without_its_tensors(kind: str, tmp_path: Path) -> None:
    one = fitted(KINDS[kind])
    folder = PeftFolder().write(tmp_path / "adapter", saved(one, source()))
    told = describe(folder)
    assert (told.kind, told.targets) == (one.recipe.kind, one.adapters.paths_of(NAME))
    assert told.rank == (3 if one.recipe.kind == "lora" else 0)


# ---- A whole model --------------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Fitted, Path]:
    one = fitted(NoAdapter())
    one.shake()
    return one, TransformersFolder().write(tmp_path / "adapter", saved(one, source()))


def test_transformers_loads_the_folder_to_the_bit(trained: tuple[Fitted, Path]) -> None:
    one, folder = trained
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    assert torch.equal(theirs(model), one.answer())
    assert model.config.id2label == dict(enumerate(CLASSES))
    assert model.config.problem_type == "single_label_classification"


def test_the_folder_has_the_tokenizer_of_its_source(trained: tuple[Fitted, Path]) -> None:
    text = "bade bafi an unknown"
    ours, of_source = (AutoTokenizer.from_pretrained(folder)(text).input_ids for folder in (trained[1], source()))
    assert ours == of_source


def test_the_folder_is_a_source_again_with_its_classes(trained: tuple[Fitted, Path]) -> None:
    one, folder = trained
    family = family_of(folder=folder).model_copy(update={"labels": (), "multi_label": None})
    assert family.trained_labels == CLASSES
    again = fitted(KINDS["lora"], family=family)
    assert torch.equal(again.answer(None), one.answer())
    assert "classifier" in again.adapters.whole(NAME)


def test_every_weight_is_in_the_folder_once_under_transformers_own_name(trained: tuple[Fitted, Path], tmp_path) -> None:
    one, folder = trained
    one.network.save_pretrained(tmp_path / "theirs")
    own, expected = load_file(folder / "model.safetensors"), load_file(tmp_path / "theirs" / "model.safetensors")
    assert own.keys() == expected.keys()
    assert all(torch.equal(own[name], tensor) for name, tensor in expected.items())
    ours, of_theirs = (json.loads((at / "config.json").read_text()) for at in (folder, tmp_path / "theirs"))
    assert ours.items() >= {k: v for k, v in of_theirs.items() if k not in ("dtype", "transformers_version")}.items()


def test_the_format_holds_no_adapters(tmp_path: Path) -> None:
    one = fitted(KINDS["lora"])
    with pytest.raises(ModelError, match="whole models"):
        TransformersFolder().write(tmp_path / "a", saved(one, source()))


def test_a_source_that_is_gone_leaves_no_model_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="has no tokenizer any more"):
        TransformersFolder().write(tmp_path / "a", saved(fitted(NoAdapter()), tmp_path / "gone"))
    assert not (tmp_path / "a").exists()
