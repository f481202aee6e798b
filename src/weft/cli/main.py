"""The command `weft`: finds the verb, runs it, and says what went wrong in one line. Imports nothing heavy."""

import os
import sys
import traceback
from collections.abc import Mapping, Sequence
from importlib import metadata

from weft import __version__, plugins
from weft.errors import ConfigError, WeftError, did_you_mean

# In the order in which one meets them. A copy of the verbs' own first sentences, so that help imports no verb.
SUMMARIES: Mapping[str, str] = {
    "demo": "train a tiny video model on this machine from end to end, in about a minute",
    "init": "write commented configs for a model and its clips, conversations or documents",
    "plan": "check a run without loading its weights: data, targets, memory, disk",
    "cache": "encode clips and captions, or tokenise conversations, ahead of training",
    "train": "train, or go on where the run stopped",
    "stop": "let a run in the background save and end",
    "sample": "make videos or replies with a trained adapter, beside the base model's",
    "show": "say what an adapter, a checkpoint, a run or a model folder holds",
    "diff": "say how two adapters were made differently",
    "verify": "compare what two adapters change, layer by layer",
    "export": "write an adapter in another program's format, and check the file",
    "convert": "turn an adapter into another format, or a checkpoint of many processes into one file",
    "merge": "put adapters into a base model, or average or add them up",
    "resize": "make an adapter's rank smaller",
    "extract": "find the adapter between a base model and a tuned one",
    "reproduce": "write the run.yaml that an adapter was trained with",
    "import": "turn another trainer's config into a run.yaml",
    "bench": "measure the speed and memory of a training step",
    "doctor": "check this machine: devices, packages, video encoding, copies to the device",
    "config": "help on every key of a run.yaml; show what a config resolves to",
    "dashboard": "watch runs in a browser",
    "report": "write one page about a run, to share",
    "ctl": "pause, sample, save or stop a running run, or change its rate",
    "launch": "write the job file that trains on Slurm, SkyPilot or Kubernetes",
    "compare": "compare runs",
}
INTERRUPTED = 130  # 128 + SIGINT, as a shell counts it
BROKEN_PIPE = 141  # 128 + SIGPIPE


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb. Exit codes: 0 done, 1 a fault of ours or a failed check, 2 something that the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = arguments[:1] == ["--debug"]
    try:
        return _dispatch(arguments[debug:])
    except WeftError as error:
        if debug:
            traceback.print_exc()
        for problem in error.problems if isinstance(error, ConfigError) else [str(error)]:
            _complain(f"error: {problem}")
        _hint(arguments[debug:])
        return 2
    except KeyboardInterrupt:
        _complain("stopped by Ctrl-C.")
        return INTERRUPTED
    except BrokenPipeError:
        # Python flushes stdout once more at exit, and would complain there.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return BROKEN_PIPE
    except ModuleNotFoundError as error:
        if (advice := _extra_of(error.name or "")) is None:
            return _fault()
        if debug:
            traceback.print_exc()
        _complain(f"error: {advice}")
        return 2
    except SystemExit as stop:  # argparse
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except Exception:
        return _fault()


def _dispatch(arguments: Sequence[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
        return 0
    if arguments[0] in ("-V", "--version"):
        print(f"weft {__version__}")
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb.startswith("-"):
        raise ConfigError(f"weft has no option '{verb}'. Options of a verb stand behind it: weft train --help.")
    verbs = plugins.table("verb")
    if verb in SUMMARIES and verb not in verbs:
        raise ConfigError(f"'weft {verb}' is planned and not there yet. There are: {', '.join(verbs)}.")
    if verb not in verbs:
        raise ConfigError(f"weft has no verb '{verb}'. {did_you_mean(verb, list(verbs))}")
    result = plugins.find("verb", verb)(rest)
    sys.stdout.flush()  # here a closed pipe can still be answered
    return result


def _help() -> str:
    verbs = plugins.table("verb")
    own = [name for name in SUMMARIES if name in verbs]
    lines = [f"  {name:<10} {SUMMARIES[name]}" for name in own]
    lines += [f"  {name:<10} from {place.partition(':')[0]}" for name, place in verbs.items() if name not in own]
    return "\n".join(
        [
            "Weft trains adapters on frozen video and language models.",
            "",
            "usage: weft VERB ...      weft VERB --help tells more",
            "",
            *lines,
            "",
            "Begin with: weft doctor, weft init MODEL --data FOLDER, weft plan run.yaml, weft train run.yaml",
            "Any key of a run.yaml can be set behind it: weft train run.yaml adapter.rank=32",
            "weft --version; weft --debug VERB ... shows where an error arose.",
        ]
    )


def _hint(arguments: Sequence[str]) -> None:
    """Say whose file a verb was handed, where it is another trainer's."""
    from weft.importers.detect import hints

    for line in hints(arguments):
        _complain(line)


def _complain(line: str) -> None:
    print(line, file=sys.stderr)


def _fault() -> int:
    traceback.print_exc()
    urls = [url.partition(", ") for url in metadata.metadata("weft").get_all("Project-URL") or ()]
    tracker = next((f" at {place}" for label, _, place in urls if label.lower() == "issues"), "")
    _complain(f"This is a fault of Weft. Please report it{tracker} with the lines above and what 'weft doctor' says.")
    return 1


def _extra_of(module: str) -> str | None:
    """How to install a missing optional package; None when it is none of ours."""
    package = {"PIL": "pillow"}.get(module.partition(".")[0], module.partition(".")[0])
    for line in metadata.requires("weft") or ():
        name, _, marker = line.partition(";")
        if name.strip().partition("[")[0].rstrip("<>=!~0123456789.,* ").lower() == package.lower():
            extra = marker.partition("extra ==")[2].strip(" \"'")
            option = f"weft[{extra}]" if extra else "weft"
            return f"this needs the package '{package}', which is not installed. Run: pip install '{option}'"
    return None


if __name__ == "__main__":
    sys.exit(main())
