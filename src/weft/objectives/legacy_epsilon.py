"""Noise prediction on square-root mixtures, as trainers of older diffusion models do it: a legacy, kept by name."""

from typing import TYPE_CHECKING, Literal

from weft.objectives.flow_matching import FlowMatching, Question, conditions

if TYPE_CHECKING:
    from torch import Tensor

    from weft.contracts import Batch, Model


class LegacyEpsilon(FlowMatching):
    """The network's output is taken for the noise, on x = sqrt(1-t) data + sqrt(t) noise. Ho et al. 2020,
    arXiv:2006.11239, eq. 4, with 1-t for alpha-bar.

    Wan and HunyuanVideo predict the velocity: an adapter that is trained so fights the model, and samples of it are
    noise. It stands here to read and to compare runs that were made so.
    """

    kind: Literal["legacy-epsilon"] = "legacy-epsilon"

    def errors(self, model: "Model", batch: "Batch", question: Question) -> "Tensor":
        """Mean squared error of the noise of each item, (B,), summed in fp32, over the frames that are not given."""
        from weft.contracts import Denoise
        from weft.math.flow import per_item

        latents, given = batch["latents"].float(), question.given(batch)
        t = per_item(question.t.float(), latents)
        x = (1 - t).sqrt() * latents + t.sqrt() * question.noise.float()
        if given is not None:
            x = x.where(~given[:, None, :, None, None], latents)
        asked = Denoise(x, question.t, conditions(batch), given, question.expert)
        return question.mean(batch, (model.velocity(asked).float() - question.noise.float()).square())
