"""Memory of the autoencoders at real sizes, counted on fake tensors: what a clip takes to be encoded and decoded.

The real AutoencoderKLWan of Wan 2.1 runs with shapes and without storage, and the bytes that live at a time are
followed to their peak; its weights are not in it. Usage: python benchmarks/encoding_memory.py [--json FILE]
"""

import argparse
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import AutoencoderKLWan
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.families.known import VAES
from weft.run.rehearsal import LiveBytes

CASES = {
    "one clip": {},
    "two clips at once (data.encoder_batch: 2)": {"items": 2},
    "one clip, family.vae_tiling": {"tiling": True},
}


def peaks(frames: int, height: int, width: int, items: int = 1, tiling: bool = False) -> dict[str, int]:
    """Bytes at the peak of encoding pixels (items, 3, F, H, W) in fp32, and of decoding their latents."""
    found = {}
    with FakeTensorMode(), torch.no_grad():
        vae: Any = AutoencoderKLWan.from_config(dict(VAES["wan-2.1"])).eval()
        if tiling:
            vae.enable_tiling()
        pixels = torch.empty(items, 3, frames, height, width)
        with LiveBytes() as live:
            latents = vae.encode(pixels, return_dict=False)[0].mode()
        found["encode"] = live.peak
        with LiveBytes() as live:
            vae.decode(latents, return_dict=False)
        found["decode"] = live.peak
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", default="832x480x81", help="WIDTHxHEIGHTxFRAMES")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    width, height, frames = map(int, arguments.size.split("x"))
    found = {name: peaks(frames, height, width, **case) for name, case in CASES.items()}
    print("| | encode, GiB | decode, GiB |\n| --- | --- | --- |")
    for name, row in found.items():
        print(f"| {name} | {row['encode'] / 2**30:.2f} | {row['decode'] / 2**30:.2f} |")
    facts = {"vae": "Wan 2.1", "size": arguments.size, "precision": "fp32", "torch": torch.__version__,
             "diffusers": diffusers.__version__, "date": datetime.now(UTC).date().isoformat()}  # fmt: skip
    if arguments.json:
        arguments.json.write_text(json.dumps({"facts": facts, "bytes": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
