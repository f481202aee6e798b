"""Where single parts of a model lie, when they are not where the source has them."""

from pathlib import Path

from pydantic import Field

from weft.section import Section

_OF_TWO = "of a model with two networks"


class Files(Section):
    """Files and folders that stand in for parts of the source, such as those repackaged for ComfyUI."""

    transformer: Path | None = Field(
        default=None, description="weights of the transformer, where the model has one; a folder of shards or one file"
    )
    high: Path | None = Field(default=None, description=f"weights for noisy times, {_OF_TWO}")
    low: Path | None = Field(default=None, description=f"weights for times near data, {_OF_TWO}")
    vae: Path | None = Field(default=None, description="weights of the video autoencoder")
    text_encoder: Path | None = Field(default=None, description="weights of UMT5, or of HunyuanVideo's Llama")
    text_encoder_2: Path | None = Field(default=None, description="weights of HunyuanVideo's CLIP text encoder")
    image_encoder: Path | None = Field(default=None, description="weights of the CLIP image encoder of Wan 2.1 I2V")
    tokenizer: Path | None = Field(default=None, description="folder of the text encoder's tokenizer")
    tokenizer_2: Path | None = Field(default=None, description="folder of the second text encoder's tokenizer")
    scheduler: Path | None = Field(default=None, description="folder with a scheduler_config.json, or that file")

    def given(self) -> dict[str, Path]:
        """Part -> path, of the parts that are named here."""
        return {
            name: path.expanduser() for name in type(self).model_fields if (path := getattr(self, name)) is not None
        }
