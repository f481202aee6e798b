"""How a video model divides pixels into latents and latents into tokens. Pure arithmetic, no torch."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class VideoGeometry:
    """What the data must know of a video model.

    fps: frames per second that the model was trained at. space_stride: pixels per latent cell on each side.
    time_stride: frames per latent frame after the first. patch: latent cells per token, as (frames, height, width).
    causal: the first latent frames of a clip do not depend on the frames after theirs.
    """

    fps: float
    space_stride: int
    time_stride: int
    patch: tuple[int, int, int]
    latent_channels: int
    causal: bool = True

    @property
    def side_multiple(self) -> int:
        """Height and width in pixels must divide by this: 16 for Wan 2.1, 32 for TI2V-5B."""
        return self.space_stride * self.patch[1]

    def longest_clip(self, frames: int) -> int:
        """The largest count of the form time_stride*k+1 that is not above frames; 0 when frames is 0."""
        return 0 if frames < 1 else (frames - 1) // self.time_stride * self.time_stride + 1

    def latent_shape(self, frames: int, height: int, width: int) -> tuple[int, int, int, int]:
        """(C, F, H, W) of the latents of a clip in pixels; the first frame stands alone in time."""
        return (
            self.latent_channels,
            (frames - 1) // self.time_stride + 1,
            height // self.space_stride,
            width // self.space_stride,
        )

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Tokens that the transformer sees for a clip: 480x832x81 is 32,760 for Wan 2.1."""
        _, f, h, w = self.latent_shape(frames, height, width)
        return (f // self.patch[0]) * (h // self.patch[1]) * (w // self.patch[2])
