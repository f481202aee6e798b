"""What `weft show` says of an adapter beside its numbers."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from weft.cli.show import facts_of
from weft.formats.adapter_file import SavedAdapter
from weft.formats.peft import PeftFolder


def test_a_folder_says_which_files_for_other_programs_are_in_it(tmp_path: Path):
    tensors = {f"a.lora_{half}.weight": torch.zeros(2, 2) for half in "AB"}
    adapter = PeftFolder().write(tmp_path / "a", SavedAdapter(tensors, rank=2, alpha=2.0))
    assert "beside it" not in facts_of(adapter)
    save_file({}, adapter / "pytorch_lora_weights.safetensors")
    assert facts_of(adapter)["beside it"] == ["pytorch_lora_weights.safetensors, for diffusers"]
