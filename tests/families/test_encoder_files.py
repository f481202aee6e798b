"""A folder that is no encoder's is refused in words that say what it is and what to write."""

import json
import os
import shutil
from pathlib import Path

import pytest

from tests.small_encoders import PLACES, save_tiny_encoder
from tests.small_text import make_qwen3
from weft.errors import ConfigError, ModelError
from weft.families.encoder import Encoder
from weft.families.encoder_files import encoder_files
from weft.families.encoder_kinds import is_encoder


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_encoder(tmp_path_factory.mktemp("files") / "tiny-bert")


@pytest.fixture
def own(bert: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(bert, tmp_path / "tiny-bert"))


def changed(folder: Path, **entries: object) -> Encoder:
    """A copy beside a folder whose config says otherwise."""
    copy = folder.parent / "-".join(["changed", *entries])
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    (copy / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **entries}))
    return Encoder(source=str(copy))


def test_an_adapter_is_no_source_and_is_told_where_it_goes(tmp_path: Path) -> None:
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    for folder, said in ((tmp_path / "adapter", "is an adapter"), (tmp_path, "holds an adapter")):
        with pytest.raises(ModelError, match=rf"family.source: .* {said}, not a model. .* adapter.start_from={folder}"):
            _ = Encoder(source=str(folder)).folder


def test_a_run_folder_names_the_model_that_it_holds(bert: Path, tmp_path: Path) -> None:
    shutil.copytree(bert, tmp_path / "run" / "model")
    shutil.copytree(bert, tmp_path / "run" / "checkpoints" / "model")
    shutil.copytree(bert, tmp_path / "run" / "step_6")
    os.utime(tmp_path / "run" / "step_6" / "config.json", (1, 1))  # an earlier one
    with pytest.raises(ModelError, match=rf"Write family.source={tmp_path}/run/model, which has one"):
        _ = Encoder(source=str(tmp_path / "run")).folder


def test_a_folder_that_is_not_there_has_a_neighbour(bert: Path) -> None:
    with pytest.raises(ModelError, match=r"there is no folder .* Did you mean 'tiny-bert'\?"):
        _ = Encoder(source=str(bert.parent / "tiny-brt")).folder
    with pytest.raises(ModelError, match=r"To fetch it: hf download somebody/bert --local-dir bert"):
        _ = Encoder(source="somebody/bert").folder


def test_other_models_are_told_by_what_they_are(own: Path, tmp_path: Path) -> None:
    decoder = Encoder(source=str(make_qwen3(tmp_path / "qwen")))
    for family, said in (
        (decoder, "describes a 'qwen3', a decoder that writes text. .* family.kind=causal-lm"),
        (changed(own, model_type="brt"), "describes a 'brt', which is no encoder that Weft knows. Did you mean 'bert'"),
        (changed(own, model_type="own", auto_map={"AutoModel": "x.py"}), "brings its own Python code"),
        (changed(own, is_decoder=True), "made into a decoder"),
        (changed(own, quantization_config={"quant_method": "gptq"}), "are quantized"),
        (changed(own, _class_name="WanTransformer3DModel"), "a part of a video model"),
    ):
        with pytest.raises(ModelError, match=rf"family.source: .*{said}"):
            _ = family.source_config


def test_a_folder_is_known_for_an_encoder_by_its_config(bert: Path, own: Path, tmp_path: Path) -> None:
    assert is_encoder(bert)
    assert not is_encoder(make_qwen3(tmp_path / "qwen"))
    assert not is_encoder(tmp_path)
    assert not is_encoder(changed(own, is_decoder=True).folder)


def test_longer_documents_than_the_model_was_made_for_are_refused(bert: Path, own: Path) -> None:
    assert Encoder(source=str(bert), longest=20).context == 20
    with pytest.raises(ConfigError, match=rf"family.longest: 65 tokens, but the model was made for {PLACES}"):
        _ = Encoder(source=str(bert), longest=PLACES + 1).context
    xlnet = save_tiny_encoder(own.parent / "xlnet", "xlnet")
    with pytest.raises(ConfigError, match=r"family.longest: the model's config does not say"):
        _ = Encoder(source=str(xlnet)).context
    assert Encoder(source=str(xlnet), longest=99).context == 99


def test_a_tokenizer_must_be_there_fit_and_pad(bert: Path, own: Path, tmp_path: Path) -> None:
    assert Encoder(source=str(bert)).tokenizer()("bade zofi")["input_ids"] == [2, 6, 139, 3]
    with pytest.raises(ModelError, match=r"the tokenizer in .* has 205 words, the network 100"):
        changed(own, vocab_size=100).tokenizer()
    config = json.loads((own / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (own / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"has no padding token"):
        Encoder(source=str(own)).tokenizer()
    (own / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match=r"has no tokenizer"):
        Encoder(source=str(own)).tokenizer()


def test_weights_are_taken_from_safetensors_before_pickles_and_must_all_be_there(own: Path) -> None:
    (own / "pytorch_model.bin").write_bytes(b"")
    assert [path.name for path in encoder_files(own)] == ["model.safetensors"]
    (own / "model.safetensors").unlink()
    assert [path.name for path in encoder_files(own)] == ["pytorch_model.bin"]
    (own / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "1.bin", "b": "2.bin"}}))
    (own / "1.bin").write_bytes(b"")
    with pytest.raises(ModelError, match=r"1 of its 2 files are not there, first 2.bin"):
        encoder_files(own)
    for path in own.glob("*.bin*"):
        path.unlink()
    with pytest.raises(ModelError, match=r"has neither .safetensors files nor pytorch_model.bin"):
        encoder_files(own)


def test_tokens_of_a_document_are_not_parted_among_processes(bert: Path) -> None:
    family = Encoder(source=str(bert), labels=("a", "b"))
    with pytest.raises(ConfigError, match=r"parallel.sequence: the tokens of a document are not parted"):
        family.divide(family.skeleton(), None)  # type: ignore[arg-type]  # refused before it is looked at
