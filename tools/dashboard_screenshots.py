"""Takes the pictures of docs/images: two trainings of the demo beside made-up runs, through the real dashboard.

    weft demo
    weft train weft-demo/run.yaml save.every=30 validation.every=50 samples.every=100
    weft train weft-demo/run.yaml name=zorp-rank-4 adapter.rank=4 adapter.alpha=4 save.every=30 samples.every=100
    python -m tools.dashboard_screenshots weft-demo/runs

From the repository's root; needs playwright, Chromium and Pillow.
"""

import argparse
import io
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from tests.dashboard import folders
from tests.dashboard.browser.watching import Scheme, Visit, chromium, entered, every
from tests.dashboard.serving import Dashboard

LARGEST = 250_000  # bytes of a picture, so that the repository stays small
GALLERY = ("training", "eight-gpus", "experts", "paused", "crashed", "text", "continual")


@dataclass(frozen=True)
class Picture:
    """What to show, and how large the window is."""

    name: str
    show: Callable[[Visit, Sequence[str]], None]
    scheme: Scheme = "light"
    width: int = 1280
    height: int = 800


def show_list(visit: Visit, trained: Sequence[str]) -> None:
    visit.rows()
    visit.page.wait_for_function("() => document.querySelector('.row-thumb video')?.readyState > 1")


def show_samples(visit: Visit, trained: Sequence[str]) -> None:
    visit.run(trained[0], "samples")
    visit.page.wait_for_function(every("!v.src || v.readyState > 1"))
    visit.page.get_by_test_id("scrubber").fill("0.5")
    visit.page.wait_for_function(every("!v.seeking"))
    visit.page.evaluate("document.activeElement.blur()")


def show_comparison(visit: Visit, trained: Sequence[str]) -> None:
    visit.compare(*trained)
    visit.page.wait_for_function(every("!v.src || v.readyState > 1"))


PICTURES = (
    Picture("list", show_list),
    Picture("run", lambda visit, trained: visit.run(trained[0]), height=1180),
    Picture("run-dark", lambda visit, trained: visit.run("eight-gpus"), "dark", height=1180),
    Picture("samples", show_samples, height=720),
    Picture("compare", show_comparison, height=1000),
    Picture("adapter", lambda visit, trained: visit.run(trained[0], "adapter"), height=900),
)


def gallery(runs: Path, root: Path) -> list[str]:
    """Copies what was trained beside made-up runs; its names."""
    trained = sorted(one.name for one in runs.iterdir() if (one / "events.rank0.jsonl").is_file())
    for name in trained:
        shutil.copytree(runs / name, root / name, ignore=shutil.ignore_patterns("global_step_*", "checkpoints"))
    for name in GALLERY:
        folders.GALLERY[name](root, time.time())
    return trained


def packed(png: bytes) -> bytes:
    """The picture with 256 colours, none of them mixed by dots."""
    out = io.BytesIO()
    picture = Image.open(io.BytesIO(png)).convert("RGB")
    picture.quantize(256, Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(out, "PNG", optimize=True)
    return out.getvalue()


def take(picture: Picture, visit: Visit, trained: Sequence[str], out: Path) -> None:
    picture.show(visit, trained)
    visit.page.mouse.move(0, 0)
    png = packed(visit.page.screenshot(animations="disabled"))
    if len(png) > LARGEST:
        raise SystemExit(f"{picture.name}: {len(png)} bytes, more than {LARGEST}")
    (out / f"dashboard-{picture.name}.png").write_bytes(png)
    print(f"dashboard-{picture.name}.png  {len(png)} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the pictures of the dashboard for docs/images.")
    parser.add_argument("runs", type=Path, help="the folder with the two runs")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "runs"
        root.mkdir()
        trained = gallery(arguments.runs, root)
        with Dashboard(root, Path(folder) / "state") as served, chromium() as browser:
            for picture in PICTURES:
                size = {"width": picture.width, "height": picture.height}
                visit = entered(browser, served, viewport=size, color_scheme=picture.scheme, reduced_motion="reduce")
                take(picture, visit, trained, arguments.out)
                visit.close()


if __name__ == "__main__":
    main()
