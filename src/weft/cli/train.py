"""weft train: one run, from its config to its adapter."""

import argparse
import os
import shlex
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType


def run(argv: Sequence[str]) -> int:
    """Train. Exit code 0 when finished, 130 when stopped by Ctrl-C, 143 by SIGTERM; both saved first."""
    parser = argparse.ArgumentParser(prog="weft train", description="Train an adapter as a config says.")
    parser.add_argument("config", type=Path, help="the run's YAML")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="such as adapter.rank=32 resume=latest")
    parser.add_argument("--detach", action="store_true", help="train in the background, and return once it has begun")
    parser.add_argument(
        "--independent", action="store_true",
        help="one process for each visible GPU: each trains its own adapter, NAME_gpuN, on its share of the clips",
    )  # fmt: skip
    parser.add_argument("--processes", type=int, metavar="N", help="with --independent: so many, also without GPUs")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.processes is not None and not arguments.independent:
        parser.error("--processes belongs to --independent")
    if arguments.detach:
        from weft.cli.detached import detach

        options = ["--independent"] * arguments.independent
        options += [f"--processes={arguments.processes}"] * (arguments.processes is not None)
        return detach(arguments.config, arguments.overrides, options)
    if arguments.independent:
        from weft.cli.independent import train_independently

        return train_independently(arguments.config, arguments.overrides, arguments.processes)
    return train(arguments.config, arguments.overrides)


def train(path: Path, overrides: Sequence[str]) -> int:
    """Train in this process."""
    from weft.run.config import parse_config, read_source

    source = read_source(path, overrides)
    config = parse_config(source)

    from weft.run.listeners import Terminal
    from weft.run.start import train_run

    quiet_libraries()
    terminal = Terminal()
    request = StopRequest()
    request.listen()
    try:
        result = train_run(config, terminal, request, path.read_text(encoding="utf-8"))
    finally:
        terminal.close()
    if result.finished:
        for folder in result.adapters:
            print(f"adapter: {folder}")
        return 0
    print(f"saved at step {result.step}. To go on, run the same command again:", file=sys.stderr)
    print("  weft train " + shlex.join([str(path), *overrides]), file=sys.stderr)
    return 128 + request.signal


def quiet_libraries() -> None:
    """Keep the libraries' own bars and advice out of ours; their errors still come."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class StopRequest:
    """Remembers a Ctrl-C or SIGTERM until the step is done; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal = 0

    def __call__(self) -> bool:
        return self.signal != 0

    def listen(self) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._hear)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            raise KeyboardInterrupt
        self.signal = number
        print("\nstopping: this step is finished and saved first. Once more ends at once.", file=sys.stderr, flush=True)
