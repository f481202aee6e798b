"""Smaller ranks: against dense singular values, with what is lost told per layer and in all."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from tests.run.test_merge import adapter, deltas
from weft.cli.resize import run as resize
from weft.errors import ConfigError, ModelError
from weft.formats.adapter_file import SavedAdapter
from weft.formats.peft import PeftFolder
from weft.formats.reading import read_adapter
from weft.run.resizing import Cut, resized


@pytest.fixture
def saved(tmp_path) -> Path:
    """alpha other than rank, rsLoRA, and a convolution of another rank."""
    return PeftFolder().write(tmp_path / "a", adapter(1, 6, 2.0, 5, rslora=True))


def nearest(change: Tensor, rank: int) -> Tensor:
    u, s, vh = torch.linalg.svd(change)
    return u[:, :rank] * s[:rank] @ vh[:rank]


def test_each_layer_becomes_the_nearest_of_the_rank(saved, tmp_path, capsys):
    assert resize([str(saved), "--rank", "2", "--out", str(tmp_path / "out")]) == 0
    given, made = read_adapter(saved), read_adapter(tmp_path / "out")
    before = deltas(given)
    assert (made.rank, made.conv_rank, made.scale, made.rslora) == (2, 2, 1.0, False)
    cut = norm = 0.0
    for path, change in deltas(made).items():
        assert_close(change, nearest(before[path], 2), rtol=1e-5, atol=1e-6)
        values = torch.linalg.svdvals(before[path])
        cut, norm = cut + float(values[2:].square().sum()), norm + float(values.square().sum())
    said = capsys.readouterr().out
    assert "rank 2 on 3 layers" in said and f"of the change {(cut / norm) ** 0.5:.2%} is lost" in said
    assert read_adapter(tmp_path / "out" / "pytorch_lora_weights.safetensors").rank == 2
    told = json.loads(made.metadata["weft.resized"])
    assert told["from"] == {"rank": given.rank, "alpha": given.alpha, "rslora": given.rslora}
    assert told["asked"] == {"rank": 2}
    assert made.metadata["weft.base"] == "abc" and made.metadata["weft.step"] == "1"


def known_spectrum(values: list[float]) -> SavedAdapter:
    """Layers whose change has the given singular values; the second's are all alike."""
    chance = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(n, len(values), generator=chance))[0] for n in (9, 12))
    tensors = {}
    for path, own in (("blocks.0.attn1.to_q", values), ("blocks.1.ffn.net.2", [1.0] * len(values))):
        tensors[f"{path}.lora_A.weight"] = right.mT.clone()
        tensors[f"{path}.lora_B.weight"] = left * torch.tensor(own)
    return SavedAdapter(tensors, len(values), float(len(values)))


@pytest.mark.parametrize(("energy", "ranks"), [(0.79, (1, 4)), (0.81, (2, 5)), (0.94, (2, 5)), (0.9999, (4, 5))])
def test_energy_gives_each_layer_the_smallest_rank_that_keeps_it(energy, ranks):
    """Squares 16, 3, .64, .36, 0: sums of 80 %, 95 %, 98.2 % and all; five alike: 20 % each."""
    made = resized(Path("a"), known_spectrum([4.0, 3**0.5, 0.8, 0.6, 1e-9]), Cut(energy=energy))
    assert tuple(made.ranks.values()) == ranks and made.adapter.rank == max(ranks)
    for path, lost in made.lost.items():
        assert lost**2 <= 1 - energy + 1e-6
        assert made.adapter.tensors[f"{path}.lora_A.weight"].shape == (max(ranks), 12)


def test_a_largest_rank_stands_above_the_energy(tmp_path, capsys):
    saved = PeftFolder().write(tmp_path / "a", known_spectrum([4.0, 2.0, 1.0, 0.5]))
    assert resize([str(saved), "--energy", "0.99", "--max-rank", "3", "--all", "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "rank 3 on 2 layers" in said and " 50.00%  rank 3    blocks.1.ffn.net.2" in said


def test_a_run_of_two_experts_is_resized_as_a_whole(tmp_path):
    for name in ("high", "low"):
        one = adapter(1, 4, 2.0, metadata={"weft.expert": name})
        PeftFolder().write(tmp_path / "run" / f"adapter_{name}", one)
    resize([str(tmp_path / "run"), "--rank", "1", "--out", str(tmp_path / "out")])
    assert [read_adapter(tmp_path / "out" / f"adapter_{name}").rank for name in ("high", "low")] == [1, 1]


def test_a_change_by_nothing_stays_nothing():
    zero = known_spectrum([0.0, 0.0, 0.0])
    made = resized(Path("a"), zero, Cut(energy=0.9))
    assert made.ranks["blocks.0.attn1.to_q"] == 1 and made.lost["blocks.0.attn1.to_q"] == 0


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--rank", "6"], "has rank 6 already; expected a whole number from 1 to 5"),
        (["--rank", "0"], "--rank: expected a whole number of at least 1"),
        (["--energy", "1.2"], "--energy: expected a share between 0 and 1"),
        (["--rank", "2", "--max-rank", "3"], "--max-rank goes with --energy"),
        (["--energy", "0.9", "--max-rank", "0"], "--max-rank: expected a whole number"),
    ],
)
def test_impossible_wishes_are_refused(options, words, saved, tmp_path):
    with pytest.raises(ConfigError, match=words):
        resize([str(saved), *options, "--out", str(tmp_path / "out")])


def test_a_dora_and_other_kinds_are_refused_with_the_way_round(tmp_path):
    plain = adapter(1, 4, 2.0)
    magnitudes = {f"{path}.lora_magnitude_vector": torch.ones(9) for path in plain.paths}
    dora = SavedAdapter({**plain.tensors, **magnitudes}, 4, 2.0, dora=True)
    oft = SavedAdapter({f"{path}.oft_R.weight": torch.zeros(3, 6) for path in plain.paths}, 0, 0.0, kind="oft",
                       options={"oft_block_size": 4})  # fmt: skip
    for name, one, why in (("DoRA", dora, "depends on the weights of the base"), ("oft", oft, "it is no LoRA")):
        saved = PeftFolder().write(tmp_path / name, one)
        with pytest.raises(ModelError, match=rf"of kind {name}: .*{why}.*then weft extract"):
            resize([str(saved), "--rank", "1", "--out", str(tmp_path / "out")])
