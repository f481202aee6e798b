"""Which kernels a language model's layers run on: a config section."""

from typing import Literal

from pydantic import Field

from weft.section import Section


class Kernels(Section):
    """Each is the model's own code (eager) or a faster one of the same numbers. One that is not there is an error."""

    layer: Literal["auto", "eager", "fused"] = Field(
        default="auto",
        description="fused: a layer is computed by Weft's own code, equal to rounding, which keeps the inputs of its "
        "norms, attention and activation alone, and has no gradients of gradients; auto: fused where it fits the model "
        "and no kernel of norms, mlp or rotary but auto and fused was chosen; eager: the model's own code",
    )
    attention: Literal["auto", "eager", "sdpa", "flex", "flash"] = Field(
        default="auto",
        description="auto: torch's sdpa where the model can, else eager; sdpa attends to packed texts one by one where "
        "they are long; flex: torch's block masks, whose memory does "
        "not grow with the square of a row, training on a GPU only; flash: flash-attn's varlen kernel, half precision "
        "on a GPU",
    )
    cross_entropy: Literal["auto", "eager", "chunked", "liger"] = Field(
        default="auto",
        description="chunked: of learned tokens alone, some at a time, the logits of all never exist; liger: so "
        "too, by Liger's kernel; eager: all logits; auto: chunked, but eager for a model whose head Weft does not know",
    )
    rms_norm: Literal["auto", "eager", "fused", "liger"] = Field(
        default="auto", description="fused: torch's own operator; auto: fused where it fits the model's norm"
    )
    mlp: Literal["auto", "eager", "fused", "liger"] = Field(
        default="auto",
        description="SwiGLU or GeGLU; fused: keeps two tensors for the backward pass in place of three; auto: fused "
        "where it fits the model's layers",
    )
    rotary: Literal["auto", "eager", "fused", "liger"] = Field(
        default="auto", description="fused: no copies of turned halves; auto: eager"
    )
