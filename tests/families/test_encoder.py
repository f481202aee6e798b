"""Encoders of real classes: the network is the plain transformers one, weight for weight and answer for answer, and
what its files have no weights for begins by chance and is trained whole."""

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

from tests.small_encoders import OWN, PLACES, Head, save_tiny_encoder
from weft.contracts import DEFAULT, Berth, Documents
from weft.errors import ConfigError, ModelError
from weft.families.encoder import Encoder
from weft.math.chance import seed_of

LABELS = ("calm", "early", "late")
TEXTS = ("bade zofi lulu gome", "goba", "pivel turas norzo babade fide me dezo")
Folder = Callable[..., Path]
Bare = Callable[[str], tuple[Encoder, PreTrainedModel]]


@pytest.fixture(scope="session")
def encoder_folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """The folder of a kind of encoder with a kind of head, made once."""
    root = tmp_path_factory.mktemp("encoders")
    logging.set_verbosity_error()
    logging.disable_progress_bar()

    @cache
    def made(kind: str = "bert", head: Head = "none") -> Path:
        labels = LABELS if head == "classifier" else ()
        return save_tiny_encoder(root / f"{kind}-{head}", kind, head=head, labels=labels)

    return made


@pytest.fixture(scope="session")
def bare(encoder_folder: Folder) -> Bare:
    """The network of a kind, made of a bare encoder, loaded once. Whoever changes it changes it back."""
    return cache(lambda kind: opened(encoder_folder(kind)))


def opened(folder: Path, **options: object) -> tuple[Encoder, PreTrainedModel]:
    family = Encoder(**{"source": str(folder), "labels": LABELS, "longest": PLACES, **options})  # type: ignore[arg-type]
    return family, family.load("fp32", DEFAULT.name, Berth())


def theirs(folder: Path) -> PreTrainedModel:
    """The network as transformers itself loads it, frozen as ours is: torch multiplies otherwise where gradients are
    wanted."""
    network = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=len(LABELS))
    return network.eval().requires_grad_(False)


def asked(family: Encoder, texts: tuple[str, ...] = TEXTS) -> tuple[Documents, dict[str, Tensor]]:
    """A question as Weft asks it, padded at the right, and as transformers does."""
    tokenizer = family.tokenizer()
    own = dict(tokenizer(list(texts), padding=True, return_tensors="pt"))
    right = tokenizer(list(texts), padding=True, padding_side="right", return_tensors="pt")
    return Documents(right["input_ids"], right["attention_mask"].bool()), {
        name: own[name] for name in ("input_ids", "attention_mask")
    }


def drawn(network: PreTrainedModel, seed: int, name: str, std: float) -> Tensor:
    """First values of a linear layer's weight, by hand."""
    generator = torch.Generator().manual_seed(seed_of(seed, "head", name))
    return torch.normal(0.0, std, network.get_parameter(name).shape, generator=generator)


# ---- The plain network --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(OWN))
def test_an_encoder_answers_as_the_plain_transformers_network_bit_for_bit(
    bare: Bare, encoder_folder: Folder, kind: str
) -> None:
    family, network = bare(kind)
    plain = theirs(encoder_folder(kind))
    assert type(network) is type(plain)
    found, wanted = network.state_dict(), plain.state_dict()
    assert found.keys() == wanted.keys()
    heads = tuple(f"{path}." for path in family.heads(network))
    assert all(torch.equal(found[name], wanted[name]) for name in found if not name.startswith(heads))
    assert all(torch.equal(b, plain.get_buffer(name)) for name, b in network.named_buffers())
    plain.load_state_dict(found)
    own, question = asked(family)
    logits = family.forward(network, own)
    assert logits.dtype == torch.float32
    assert logits.shape == (len(TEXTS), len(LABELS))
    assert torch.equal(logits, plain(**question).logits)
    assert not network.training
    assert not any(parameter.requires_grad for parameter in network.parameters())


@pytest.mark.parametrize("kind", list(OWN))
def test_what_is_trained_whole_is_what_the_files_lack_and_all_of_it_learns(bare: Bare, kind: str) -> None:
    """Trap 6: DistilBERT's pre_classifier, DeBERTa's pooler, ModernBERT's head, XLNet's logits_proj."""
    family, network = bare(kind)
    heads = family.heads(network)
    assert heads == {
        "distilbert": ("pre_classifier", "classifier"),
        "deberta": ("pooler", "classifier"),
        "deberta-v2": ("pooler", "classifier"),
        "modernbert": ("head", "classifier"),
        "xlnet": ("sequence_summary", "logits_proj"),
    }.get(kind, ("classifier",))
    trained = {f"{path}.{name}" for path in heads for name, _ in network.get_submodule(path).named_parameters()}
    stored = set(family.weights.entries)
    prefix = f"{network.base_model_prefix}."
    unread = {"bert.pooler.weight", "bert.pooler.bias"} if kind == "big_bird" else set()
    assert {n for n, _ in network.named_parameters() if n.removeprefix(prefix) not in stored} - unread == trained
    network.requires_grad_(True)
    family.forward(network, asked(family)[0]).square().sum().backward()
    without = {name for name, parameter in network.named_parameters() if parameter.grad is None}
    network.requires_grad_(False).zero_grad()
    if kind == "xlnet":  # it has weights for a mask and for a second text, which nobody asks about
        unread = {name for name in without if name.endswith(("mask_emb", "seg_embed", "r_s_bias"))}
    assert without == unread


@pytest.mark.parametrize("kind", ["bert", "albert", "deberta-v2", "modernbert", "distilbert"])
def test_of_a_masked_language_model_the_pooler_is_missing_and_trained(encoder_folder: Folder, kind: str) -> None:
    family, network = opened(encoder_folder(kind, "masked-lm"))
    assert family.heads(network) == {
        "bert": ("bert.pooler", "classifier"),
        "albert": ("albert.pooler", "classifier"),
        "deberta-v2": ("pooler", "classifier"),
        "distilbert": ("pre_classifier", "classifier"),
        "modernbert": ("classifier",),  # its head is the one before words
    }.get(kind, ("classifier",))
    plain = theirs(encoder_folder(kind, "masked-lm")).state_dict()
    begun = family.heads(network)
    found = network.state_dict()
    assert all(torch.equal(found[name], plain[name]) for name in found if not name.startswith(begun))


@pytest.mark.parametrize("kind", ["bert", "distilbert", "roberta"])
def test_a_trained_classifier_is_loaded_and_is_a_head_as_well(encoder_folder: Folder, kind: str) -> None:
    folder = encoder_folder(kind, "classifier")
    family, network = opened(folder, labels=())
    assert family.trained_labels == LABELS
    assert family.heads(network) == ("classifier",)
    plain = theirs(folder).state_dict()
    assert all(torch.equal(tensor, plain[name]) for name, tensor in network.state_dict().items())
    assert network.config.id2label == dict(enumerate(LABELS))


def test_padding_goes_before_a_document_whose_answer_is_read_at_its_end(bare: Bare) -> None:
    family, network = bare("xlnet")
    padded, _ = asked(family)
    for row in range(len(TEXTS)):
        alone, _ = asked(family, TEXTS[row : row + 1])
        found = family.forward(network, padded)[row]
        torch.testing.assert_close(found, family.forward(network, alone)[0], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_both_kernels_of_attention_answer_alike(encoder_folder: Folder, kind: str) -> None:
    logits = []
    for attention in ("sdpa", "eager"):
        family, network = opened(encoder_folder(kind), attention=attention)
        assert network.config._attn_implementation == attention
        logits.append(family.forward(network, asked(family)[0]))
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-5, atol=1e-6)


def test_a_kernel_that_the_model_has_not_is_refused(encoder_folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"family.attention: a 'deberta-v2' cannot attend by 'sdpa'. Write auto"):
        opened(encoder_folder("deberta-v2"), attention="sdpa")


@pytest.mark.parametrize("kind", list(OWN))
def test_one_rate_of_dropout_reaches_every_place(encoder_folder: Folder, kind: str) -> None:
    skeleton = Encoder(source=str(encoder_folder(kind)), labels=LABELS, dropout=0.3).skeleton()
    assert {module.p for module in skeleton.modules() if isinstance(module, torch.nn.Dropout)} == {0.3}


@pytest.mark.parametrize("kind", ["bert", "deberta-v2", "distilbert", "modernbert", "xlnet"])
def test_without_dropout_no_chance_is_left_in_training(encoder_folder: Folder, kind: str) -> None:
    family, network = opened(encoder_folder(kind), dropout=0.0)
    question, _ = asked(family)
    assert torch.equal(family.forward(network.train(), question), family.forward(network.eval(), question))


def test_big_bird_answers_a_document_alike_whatever_came_before(bare: Bare) -> None:
    """It would turn to attending to everything at the first short batch, and stay with it."""
    family, network = bare("big_bird")
    long, short = asked(family, ("bade zofi lulu gome " * 12,))[0], asked(family)[0]
    before = family.forward(network, long)
    family.forward(network, short)
    assert torch.equal(family.forward(network, long), before)


def test_fast_weights_stand_in_for_parameters_of_the_networks_own_names(bare: Bare) -> None:
    family, network = bare("bert")
    question, _ = asked(family)
    weights = {"classifier.bias": torch.tensor([1.0, 2.0, 3.0])}

    def call(**kwargs: Tensor) -> object:
        return torch.func.functional_call(network, weights, (), kwargs)

    moved = family.forward(call, question) - family.forward(network, question)
    wanted = weights["classifier.bias"] - network.get_parameter("classifier.bias")
    torch.testing.assert_close(moved, wanted.expand(len(TEXTS), -1), rtol=0, atol=1e-6)


# ---- What begins by chance ----------------------------------------------------------------------------------------


def test_a_new_head_depends_on_the_seed_and_its_place_alone(encoder_folder: Folder) -> None:
    state = torch.get_rng_state()
    _, network = opened(encoder_folder(), seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    weight = network.get_parameter("classifier.weight")
    assert torch.equal(weight, drawn(network, 3, "classifier.weight", 0.1))  # 0.1: initializer_range of these
    assert not network.get_parameter("classifier.bias").any()
    torch.manual_seed(99)
    assert torch.equal(opened(encoder_folder(), seed=3)[1].get_parameter("classifier.weight"), weight)
    assert not torch.equal(opened(encoder_folder(), seed=4)[1].get_parameter("classifier.weight"), weight)


def test_a_new_head_begins_as_its_makers_say(encoder_folder: Folder) -> None:
    """ModernBERT: a normal distribution that ends at two deviations, which makes those 0.8796 as wide; they are
    1/sqrt(width) of the classifier and 0.1/sqrt(2 layers) of what is before it. Norms begin at one."""
    _, network = opened(encoder_folder("modernbert"), labels=tuple(f"class {n}" for n in range(200)))
    classifier = network.get_parameter("classifier.weight")
    assert float(classifier.std()) == pytest.approx(0.8796 * 32**-0.5, rel=0.05)
    assert float(classifier.abs().max()) <= 2 * 32**-0.5
    assert float(network.get_parameter("head.dense.weight").std()) == pytest.approx(0.8796 * 0.1 / 4**0.5, rel=0.1)
    assert network.get_parameter("head.norm.weight").eq(1).all()


def test_a_classifier_of_words_is_none_of_documents(encoder_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder_folder("bert", "classifier"), tmp_path / "words"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["BertForTokenClassification"]}))
    family, network = opened(folder, labels=("other", "names", "here"))
    assert not family.has_head
    assert torch.equal(network.get_parameter("classifier.weight"), drawn(network, 0, "classifier.weight", 0.1))


# ---- Its classes --------------------------------------------------------------------------------------------------


def test_a_trained_classifier_keeps_its_classes_and_refuses_others(encoder_folder: Folder) -> None:
    folder = encoder_folder("bert", "classifier")
    for labels, said in (
        (("calm", "late"), "2 classes, but the classifier .* was trained for 3: calm, early, late"),
        (("early", "calm", "late"), "the classes are early, calm, late, but .* calm, early, late, in that order"),
        (("a", "b", "c"), "Write family.head=new"),
        (("a", "a", "b"), "a class is named twice"),
    ):
        with pytest.raises(ConfigError, match=rf"family.labels: .*{said}"):
            opened(folder, labels=labels)
    family, network = opened(folder, labels=("a", "b"), head="new")
    assert family.trained_labels == ()
    assert torch.equal(network.get_parameter("classifier.weight"), drawn(network, 0, "classifier.weight", 0.1))
    assert network.config.id2label == {0: "a", 1: "b"}


def test_a_classifier_for_one_class_is_not_taken_for_several(encoder_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder_folder("bert", "classifier"), tmp_path / "single"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "problem_type": "single_label_classification"}))
    assert opened(folder, multi_label=False)[1].config.problem_type == "single_label_classification"
    with pytest.raises(ConfigError, match=r"family.multi_label: .* was trained to give a document one class"):
        opened(folder, multi_label=True)


def test_classes_must_be_known_and_more_than_one(encoder_folder: Folder) -> None:
    with pytest.raises(ConfigError, match=r"family.labels: nobody said into which classes to sort"):
        opened(encoder_folder(), labels=())
    with pytest.raises(ConfigError, match=r"family.labels: with one class alone there is nothing to tell apart"):
        opened(encoder_folder(), labels=("a",))
    assert opened(encoder_folder(), labels=("a",), multi_label=True)[1].config.num_labels == 1


def test_labels_that_arrive_later_are_those_of_the_network(encoder_folder: Folder) -> None:
    """The run takes them from its data, after the family was asked for its tokenizer and its context."""
    family = Encoder(source=str(encoder_folder()))
    assert (family.context, family.trained_labels) == (PLACES, ())
    told = family.model_copy(update={"labels": LABELS, "multi_label": True, "seed": 5})
    config = told.load("fp32", DEFAULT.name, Berth()).config
    assert (config.num_labels, config.problem_type) == (3, "multi_label_classification")


# ---- Its weights --------------------------------------------------------------------------------------------------


def test_every_tensor_is_read_and_put_once_through_the_berth(encoder_folder: Folder) -> None:
    family = Encoder(source=str(encoder_folder("distilbert")), labels=LABELS)
    read_shapes: list[tuple[int, ...]] = []
    placed: dict[int | None, int] = {}

    def read(here: Callable[[], Tensor], shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        tensor = here()
        assert (tuple(tensor.shape), tensor.dtype) == (shape, dtype)  # another process may have to make room for it
        read_shapes.append(shape)
        return tensor

    def put(tensor: Tensor, block: int | None, blocks: int) -> Tensor:
        assert blocks == 2
        placed[block] = placed.get(block, 0) + tensor.nbytes
        return tensor

    network = family.load("fp32", DEFAULT.name, Berth(put, read))
    assert len(read_shapes) == len(list(network.parameters()))
    buffers = sum(buffer.nbytes for buffer in network.buffers())
    assert family.weight_bytes("fp32") == {**placed, None: placed[None] + buffers}


def test_in_half_precision_heads_stay_wide_for_they_are_trained(encoder_folder: Folder) -> None:
    family = Encoder(source=str(encoder_folder("distilbert")), labels=LABELS, dtype="auto")
    network = family.load("bf16", DEFAULT.name, Berth())
    for name, parameter in network.named_parameters():
        wide = name.startswith(("classifier.", "pre_classifier."))
        assert parameter.dtype == (torch.float32 if wide else torch.bfloat16), name
    with torch.autocast("cpu", torch.bfloat16):
        logits = family.forward(network, asked(family)[0])
    assert logits.dtype == torch.float32
    assert family.weight_dtype("bf16") == "bf16"
    assert Encoder(source=family.source).weight_dtype("bf16") == "fp32"
    with pytest.raises(ConfigError, match=r"family.dtype: bf16 weights cannot be multiplied in fp32"):
        Encoder(source=family.source, dtype="bf16").weight_dtype("fp32")


def test_what_overflows_in_half_precision_is_refused_it(encoder_folder: Folder) -> None:
    family = Encoder(source=str(encoder_folder("deberta")))
    assert family.weight_dtype("fp32") == "fp32"
    with pytest.raises(ConfigError, match=r"a 'deberta' overflows where it masks in bf16.*engine.precision=fp32"):
        family.weight_dtype("bf16")


def test_torchs_own_files_are_read_in_both_forms_and_under_old_names(encoder_folder: Folder, tmp_path: Path) -> None:
    """Google's BERT has LayerNorm.gamma and .beta and its other tasks' heads; clinical ones are in the old form."""
    _, wanted = opened(encoder_folder())
    tensors = {
        f"bert.{name}".replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for name, value in load_file(encoder_folder() / "model.safetensors").items()
    }
    tensors |= {
        "cls.predictions.bias": torch.ones(7),
        "cls.seq_relationship.weight": torch.ones(2, 32),
        "bert.embeddings.position_ids": torch.arange(PLACES)[None],
    }
    for zipped in (True, False):
        folder = Path(shutil.copytree(encoder_folder(), tmp_path / f"zipped-{zipped}"))
        (folder / "model.safetensors").unlink()
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        family, network = opened(folder)
        found = network.state_dict()
        assert all(torch.equal(found[name], value) for name, value in wanted.state_dict().items())
        assert family.heads(network) == ("classifier",)


def test_a_pickle_that_would_run_code_is_not_opened(encoder_folder: Folder, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(encoder_folder(), tmp_path / "hostile"))
    (folder / "model.safetensors").unlink()
    torch.save({"weight": Path("/etc")}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin cannot be read as a PyTorch file of tensors alone"):
        opened(folder)


@pytest.mark.parametrize("fault", ["a layer is missing", "a layer is too much", "another width"])
def test_an_encoder_that_is_not_whole_is_refused(encoder_folder: Folder, tmp_path: Path, fault: str) -> None:
    folder = Path(shutil.copytree(encoder_folder("deberta-v2"), tmp_path / "broken"))
    tensors = load_file(folder / "model.safetensors")
    if fault == "a layer is missing":
        tensors = {name: value for name, value in tensors.items() if "rel_embeddings" not in name}
        said = r"1 of \d+ tensors are missing, first 'deberta.encoder.rel_embeddings.weight'"
    elif fault == "a layer is too much":
        tensors["encoder.layer.2.output.dense.bias"] = torch.ones(32)
        said = r"1 tensor belongs elsewhere, first 'encoder.layer.2.output.dense.bias'"
    else:
        tensors["encoder.layer.1.output.dense.bias"] = torch.ones(31)
        said = r"1 tensors have another shape than the config asks for"
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ModelError, match=said):
        opened(folder)


def test_its_identity_changes_with_its_weights_and_its_tokenizer_alone(encoder_folder: Folder, tmp_path: Path) -> None:
    first = Encoder(source=str(encoder_folder())).identity()
    folder = Path(shutil.copytree(encoder_folder(), tmp_path / "copy"))
    (folder / "README.md").write_text("notes")
    assert Encoder(source=str(folder)).identity() == first
    tensors = load_file(folder / "model.safetensors")
    tensors["pooler.dense.bias"] += 1
    save_file(tensors, folder / "model.safetensors")
    assert Encoder(source=str(folder)).identity()["text"] == first["text"]
    assert Encoder(source=str(folder)).identity()["network"] != first["network"]
