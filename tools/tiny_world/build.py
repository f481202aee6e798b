"""Rebuild a pipeline like the shipped one from nothing: autoencoder, decoder, base, measurement."""

import os
import subprocess
import sys
from pathlib import Path

STAGES = ("train_vae.py", "train_decoder.py", "train_base.py", "measure.py")
RANKS = 2  # processes of one thread each


def main() -> None:
    for stage in STAGES:
        print(f"== {stage}", flush=True)
        script = str(Path(__file__).with_name(stage))
        launcher = [] if stage == "measure.py" else ["-m", "torch.distributed.run", "--nproc-per-node", str(RANKS)]
        subprocess.run([sys.executable, *launcher, script], check=True, env=os.environ | {"OMP_WAIT_POLICY": "PASSIVE"})


if __name__ == "__main__":
    main()
