"""The `adapter:` section: scales, learning rates, and what it refuses."""

import subprocess
import sys
from math import sqrt

import pytest
from pydantic import ValidationError

from weft.adapters.lora import Lora


def test_without_an_alpha_the_scale_is_1():
    assert Lora(rank=32).scale == 1


def test_scale_is_alpha_over_rank_and_with_rslora_over_its_root():
    assert Lora(rank=64, alpha=32).scale == 0.5
    assert Lora(rank=64, alpha=32, rslora=True).scale == 4.0
    assert Lora(rank=8, rslora=True).scale == 8 / sqrt(8)


def test_lora_plus_raises_the_learning_rate_of_b_alone():
    recipe = Lora(lora_plus=16)
    assert recipe.lr_factor("blocks.0.attn1.to_q.lora_B.weight") == 16
    assert recipe.lr_factor("blocks.0.attn1.to_q.lora_A.weight") == 1
    assert recipe.lr_factor("blocks.0.attn1.to_q.lora_magnitude_vector") == 1
    assert Lora().lr_factor("blocks.0.attn1.to_q.lora_B.weight") == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"rank": 0}, "rank"),
        ({"alpha": 0}, "alpha"),
        ({"rank_dropout": 1.0}, "rank_dropout"),
        ({"lora_plus": 0}, "lora_plus"),
        ({"targets": ()}, "nothing would be trained"),
        ({"targets": ("to_q", " ")}, "a pattern is empty"),
        ({"dora": True, "rank_dropout": 0.1, "max_norm": 1.0}, "dora does not go with rank_dropout, max_norm"),
        ({"dropout": 0.1}, "dropout"),
    ],
)
def test_impossible_recipes_are_refused_by_name(fields, words):
    with pytest.raises(ValidationError, match=words):
        Lora(**fields)


def test_parsing_and_matching_import_neither_torch_nor_peft():
    code = (
        "import sys; from weft import plugins; import weft.formats.describe;"
        "kinds = [kind for kind in plugins.section_types('adapter').values() if 'targets' in kind.model_fields];"
        "reports = [kind(targets='to_q').match({'a.to_q': (64, 64)}, {}, {}) for kind in kinds];"
        "counts = [kind().trainable(report) for kind, report in zip(kinds, reports)];"
        "sys.exit(any(m in sys.modules for m in ('torch', 'peft', 'numpy')))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
