"""A folder of clips, a small deterministic encoder, and a listener that keeps what it hears."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from tests.data.clips import TINY, Recipe, captioned, make_image, make_video
from weft.data.video import VideoData
from weft.events import Event

TEXT_WIDTH = 6


class ToyEncoders:
    """A real convolution for pixels and one vector per letter for text: enough to see what the cache does with them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        s = TINY.space_stride
        self.convolution = nn.Conv3d(3, TINY.latent_channels, (1, s, s), stride=(1, s, s))
        self.letters = torch.randn(128, TEXT_WIDTH, generator=generator).bfloat16()
        with torch.no_grad():
            self.convolution.weight.normal_(generator=generator)
            self.convolution.bias.zero_()
        self.clips_encoded = 0

    def latents(self, pixels: Tensor) -> Tensor:
        self.clips_encoded += len(pixels)
        cells = self.convolution(pixels)  # (B, C, F, h, w)
        rest = cells[:, :, 1:].unflatten(2, (-1, TINY.time_stride)).mean(3) if cells.shape[2] > 1 else cells[:, :, :0]
        return torch.cat([cells[:, :, :1], rest], 2)

    def given(self, pixels: Tensor) -> Mapping[str, Tensor]:
        return {}

    def pixels(self, latents: Tensor) -> Tensor:
        raise NotImplementedError

    def text(self, captions: Sequence[str]) -> list[Mapping[str, Tensor]]:
        # The last letter stands for the end token, so that the empty caption has one, as in T5.
        return [{"text": self.letters[[*(ord(c) % 127 for c in caption), 127]]} for caption in captions]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small are slower on several threads, and far slower where cores are shared."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def encoders() -> ToyEncoders:
    return ToyEncoders()


@pytest.fixture
def heard() -> list[Event]:
    return []


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven clips and an image in two shapes; read only."""
    folder = tmp_path_factory.mktemp("clips")
    for i in range(5):
        captioned(make_video(folder / f"square_{i}.mp4", Recipe(frames=9 + i)), f"square {'very ' * i}number {i}")
    for i in range(2):
        captioned(make_video(folder / f"wide_{i}.mp4", Recipe(frames=9 + i, width=96, height=48)), f"wide {i}")
    captioned(make_image(folder / "still.png"), "a still picture")
    return folder


@pytest.fixture
def data(clips: Path, tmp_path: Path) -> VideoData:
    return VideoData.model_validate(
        {
            "sources": [{"path": clips}],
            "buckets": {"sides": [64], "frames": [5, 9]},
            "cache_folder": tmp_path / "cache",
            "batch_size": 2,
        }
    )
