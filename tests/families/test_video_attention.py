"""Attention kernels of video networks: the same velocity, for one network, and refused where they are not there."""

import pytest
import torch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor, nn

from tests.small import small_wan
from weft.errors import ConfigError
from weft.families.video_attention import set_video_attention


def velocity(network: nn.Module) -> Tensor:
    chance = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 16, 3, 4, 4, generator=chance), torch.randn(1, 7, 128, generator=chance)
    with torch.no_grad():
        return network(hidden_states=x, timestep=torch.tensor([500]), encoder_hidden_states=text, return_dict=False)[0]


def test_torchs_own_kernels_give_one_velocity_and_are_chosen_for_one_network() -> None:
    torch.manual_seed(0)
    network, other = small_wan().eval(), small_wan().eval()
    before, active = velocity(network), _AttentionBackendRegistry.get_active_backend()[0]
    used: list[str] = []
    sdpa = torch.nn.functional.scaled_dot_product_attention

    def noted(*args, **kwargs):  # type: ignore[no-untyped-def]
        used.append("math" if not torch.backends.cuda.flash_sdp_enabled() else "any")
        return sdpa(*args, **kwargs)

    set_video_attention(network, "math")
    torch.nn.functional.scaled_dot_product_attention = noted
    try:
        torch.testing.assert_close(velocity(network), before, rtol=1e-5, atol=1e-5)
        assert set(used) == {"math"}
        used.clear()
        velocity(other)
        assert set(used) == {"any"}
    finally:
        torch.nn.functional.scaled_dot_product_attention = sdpa
    assert _AttentionBackendRegistry.get_active_backend()[0] == active == AttentionBackendName.NATIVE


@pytest.mark.parametrize(
    ("choice", "message"),
    [("flash", r"family.attention: 'flash' .*'weft\[flash\]'"), ("cudnn", "family.attention: 'cudnn' trains on a GPU")],
)
def test_a_kernel_that_is_not_there_is_refused(choice, message: str) -> None:  # type: ignore[no-untyped-def]
    if torch.cuda.is_available():
        pytest.skip("it may be there")
    with pytest.raises(ConfigError, match=message):
        set_video_attention(small_wan(), choice)
    with pytest.raises(ConfigError, match="fits no layer of this network"):
        set_video_attention(nn.Linear(2, 2), "math")
