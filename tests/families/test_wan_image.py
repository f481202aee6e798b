"""How a first frame is told in channels: the tensors of the official code, of diffusers' pipeline, and of ours."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import AutoencoderKLWan, WanImageToVideoPipeline, WanTransformer3DModel
from PIL import Image
from torch import Tensor
from torch.testing import assert_close

from weft.contracts import Denoise
from weft.errors import ConfigError, ModelError
from weft.families.wan import Wan
from weft.families.wan_network import with_image
from weft.families.weights import HERE

CPU = torch.device("cpu")
FRAMES, HEIGHT, WIDTH = 9, 32, 48  # of pixels; latents are 3 x 4 x 6
KINDS = ["i2v21", "i2v22"]


@pytest.fixture(params=KINDS)
def family(request, wan_folder) -> Wan:
    return Wan(source=str(wan_folder(request.param)))


@pytest.fixture(scope="module")
def pixels() -> Tensor:
    """(2, 3, 9, 32, 48) in [-1, 1], from whole levels of brightness as a clip's are."""
    levels = torch.randint(0, 256, (2, 3, FRAMES, HEIGHT, WIDTH), generator=torch.Generator().manual_seed(0))
    return levels / 127.5 - 1


@pytest.fixture
def question(family) -> Denoise:
    torch.manual_seed(4)
    told = dict(family.conditions(2, 3, 4, 6))
    told["text"] = told["text"][:, :5]
    return Denoise(torch.randn(2, 16, 3, 4, 6), torch.tensor([0.8333, 0.02]), told)


def pipeline_of(family: Wan, encoders) -> WanImageToVideoPipeline:
    eyes = encoders.eyes
    return WanImageToVideoPipeline(
        tokenizer=None, text_encoder=None, vae=encoders.vae, scheduler=None,
        image_processor=eyes.processor if eyes else None, image_encoder=eyes.model if eyes else None,
        transformer=family.load("fp32", "default", HERE),
    )  # fmt: skip


@torch.no_grad()
def official_channels(vae: AutoencoderKLWan, first: Tensor) -> Tensor:
    """The 20 channels of one picture (3, H, W), as Wan's image2video.py writes them down."""
    mask = torch.zeros(1, FRAMES, HEIGHT // 8, WIDTH // 8)
    mask[:, 0] = 1
    mask = torch.concat([mask[:, :1].repeat_interleave(4, dim=1), mask[:, 1:]], dim=1)
    mask = mask.view(1, (FRAMES + 3) // 4, 4, HEIGHT // 8, WIDTH // 8).transpose(1, 2)[0]  # (4, f, h, w)
    video = torch.concat([first[:, None], torch.zeros(3, FRAMES - 1, HEIGHT, WIDTH)], dim=1)
    latents = vae.encode(video[None]).latent_dist.mean[0]
    mean, std = (torch.tensor(v).view(-1, 1, 1, 1) for v in (vae.config.latents_mean, vae.config.latents_std))
    return torch.concat([mask, (latents - mean) / std])


def test_noise_mask_and_image_are_the_36_channels_of_the_official_code(family, pixels):
    encoders = family.encoders(CPU, lambda module: module)
    x = torch.randn(2, 16, 3, 4, 6)
    told = encoders.given(pixels)
    ours = with_image(x, told["image"])
    assert ours.shape == (2, 36, 3, 4, 6)
    assert torch.equal(ours[:, :16], x)
    for item in range(2):
        assert_close(ours[item, 16:], official_channels(encoders.vae, pixels[item, :, 0]))


def test_noise_mask_and_image_are_what_diffusers_pipeline_prepares(family, pixels):
    encoders = family.encoders(CPU, lambda module: module)
    pipeline = pipeline_of(family, encoders)
    x = torch.randn(1, 16, 3, 4, 6)
    with torch.no_grad():
        latents, condition = pipeline.prepare_latents(
            pixels[:1, :, 0], 1, 16, HEIGHT, WIDTH, FRAMES, torch.float32, CPU, latents=x
        )
    assert_close(with_image(x, encoders.given(pixels[:1])["image"]), torch.cat([latents, condition], 1))


def test_what_is_told_depends_on_the_first_frame_and_on_the_number_of_frames_alone(family, pixels):
    encoders = family.encoders(CPU, lambda module: module)
    others = torch.cat([pixels[:, :, :1], torch.rand(2, 3, FRAMES - 1, HEIGHT, WIDTH)], dim=2)
    told, again = encoders.given(pixels), encoders.given(others)
    assert set(told) == ({"image", "clip"} if family.has_eyes else {"image"})
    assert all(torch.equal(told[name], again[name]) for name in told)


def test_the_frames_behind_the_picture_are_gray_and_not_black(family, pixels):
    encoders = family.encoders(CPU, lambda module: module)
    black = torch.cat([pixels[:, :, :1], -torch.ones(2, 3, FRAMES - 1, HEIGHT, WIDTH)], dim=2)
    assert (encoders.given(pixels)["image"] - encoders.latents(black)).abs().max() > 1e-3


def test_clip_sees_the_first_frame_as_in_diffusers_pipeline(wan_folder, pixels):
    family = Wan(source=str(wan_folder("i2v21")))
    encoders = family.encoders(CPU, lambda module: module)
    picture = Image.fromarray(((pixels[0, :, 0] + 1) * 127.5).round().byte().permute(1, 2, 0).numpy())
    with torch.no_grad():
        expected = pipeline_of(family, encoders).encode_image(picture, CPU)
    clip = encoders.given(pixels)["clip"]
    assert clip.shape == (2, 257, 16)
    assert_close(clip[:1], expected)
    assert (clip[0] - clip[1]).abs().max() > 1e-4  # each item its own


def test_a_text_to_video_model_is_told_nothing_of_a_first_frame(wan, pixels):
    assert wan.encoders(CPU, lambda module: module).given(pixels) == {}
    assert wan.image == "none" and "image" not in wan.conditions(1, 3, 4, 6)


@torch.no_grad()
def test_the_velocity_is_the_networks_answer_to_36_channels(family, question):
    network = family.load("fp32", "default", HERE)
    plain = WanTransformer3DModel.from_pretrained(f"{family.source}/transformer")
    mask = torch.zeros(2, 4, 3, 4, 6)
    mask[:, :, 0] = 1
    text = question.cond["text"]
    text = torch.cat([text, torch.zeros(2, family.tokens_of_text - 5, text.shape[2])], 1)
    expected = plain(
        torch.cat([question.x, mask, question.cond["image"]], 1), 1000 * question.t, text,
        encoder_hidden_states_image=question.cond.get("clip"), return_dict=False,
    )[0]  # fmt: skip
    assert_close(family.forward(network, question), expected, rtol=1e-5, atol=1e-6)  # 1000 t is rounded once


@torch.no_grad()
def test_each_item_of_a_batch_has_its_own_picture(family, question):
    network = family.load("fp32", "default", HERE)
    both = family.forward(network, question)
    for i in range(2):
        part = slice(i, i + 1)
        told = {name: tensor[part] for name, tensor in question.cond.items()}
        assert_close(both[part], family.forward(network, Denoise(question.x[part], question.t[part], told)))
    swapped = replace(question, cond={**question.cond, "image": question.cond["image"].flip(0)})
    assert (family.forward(network, swapped) - both).abs().max() > 1e-3


def test_models_that_clip_looks_for_have_512_text_tokens_whatever_the_tokenizer_says(wan_folder):
    source = str(wan_folder("i2v21"))
    assert Wan(source=source).tokens_of_text == 512
    with pytest.raises(ConfigError, match=r"family\.text_length: 64, .* 512 text tokens alone"):
        Wan(source=source, text_length=64).tokens_of_text  # noqa: B018


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"in_channels": 48}, "takes 48 channels and gives 16.* no control or inpainting"),
        ({"pos_embed_seq_len": 514}, "from a first frame to a last one"),
    ],
)
def test_models_that_are_given_more_than_a_first_frame_are_refused(wan_folder, tmp_path, change, reason):
    made = tmp_path / "other"
    shutil.copytree(wan_folder("i2v21"), made)
    config = made / "transformer" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | change))
    with pytest.raises(ModelError, match=reason):
        Wan(source=str(made)).geometry()


def test_latents_of_an_image_to_video_model_are_cached_apart(wan_folder, wan):
    """Its entries hold more than those of a text-to-video model with the same autoencoder."""
    texts, images = (Wan(source=str(wan_folder(kind))).identity()["latents"] for kind in ("t2v", "i2v22"))
    assert texts != images
