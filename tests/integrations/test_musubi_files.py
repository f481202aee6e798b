"""Files of weft.integrations.musubi: names, dtypes, hashes, what is read back, merging, and what is imported."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import weft.integrations.musubi as musubi
from tests.integrations.small_wan import WanModel, question
from tests.integrations.test_musubi_training import BACKENDS, network_on, randomized
from tests.integrations.trainer import Run, arguments, train
from weft.errors import ModelError
from weft.formats.consumers import use_of
from weft.formats.reading import read_adapter
from weft.integrations.musubi_network import MusubiNetwork
from weft.names.modules import modules
from weft.run.changes import change_of

LAYERS = [f"{kind}_attn_{name}" for kind in ("self", "cross") for name in "qkvo"] + ["ffn_0", "ffn_2"]


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def saved(tmp_path: Path, dtype: torch.dtype | None = torch.float32, **kwargs: str) -> tuple[MusubiNetwork, Path]:
    network, path = randomized(network_on(WanModel(), **kwargs)), tmp_path / "adapter.safetensors"
    network.save_weights(str(path), dtype, {"ss_seed": "42"})
    return network, path


@BACKENDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_has_the_names_shapes_and_dtypes_of_musubis_own(tmp_path: Path, backend: str, dtype: torch.dtype):
    tensors = load_file(saved(tmp_path, dtype, backend=backend)[1])
    # networks/lora.py, lines 15-18 and 69-84: down (r, in), up (out, r), and a number for alpha.
    expected: dict[str, tuple[int, ...]] = {}
    for i in range(2):
        for name in LAYERS:
            inner, out = {"ffn_0": (24, 40), "ffn_2": (40, 24)}.get(name, (24, 24))
            layer = f"lora_unet_blocks_{i}_{name}"
            expected[f"{layer}.alpha"] = ()
            expected[f"{layer}.lora_down.weight"], expected[f"{layer}.lora_up.weight"] = (4, inner), (out, 4)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {dtype}
    assert {float(tensors[key]) for key in tensors if key.endswith("alpha")} == {2.0}


def test_the_header_holds_what_the_trainer_gave_and_hashes_of_the_tensors(tmp_path: Path):
    network, path = saved(tmp_path)
    raw = path.read_bytes()
    start = 8 + int.from_bytes(raw[:8], "little")
    found = header(path)
    assert found["ss_seed"] == "42" and set(found) - {"format"} == {"ss_seed", "sshs_model_hash", "sshs_legacy_hash"}
    assert found["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    again = tmp_path / "again.safetensors"
    network.save_weights(str(again), torch.float32, {**found, "sshs_model_hash": "of another file"})
    assert header(again) == found


def test_an_alpha_that_the_dtype_cannot_hold_is_not_rounded(tmp_path: Path):
    _, path = saved(tmp_path, torch.bfloat16, rslora="True")
    tensors = load_file(path)
    alpha = tensors["lora_unet_blocks_0_ffn_0.alpha"]
    assert tensors["lora_unet_blocks_0_ffn_0.lora_up.weight"].dtype == torch.bfloat16
    assert alpha == 4.0 and alpha.dtype == torch.bfloat16  # 2 sqrt 4
    network = randomized(network_on(WanModel(), dim=3, rslora="True"))
    network.save_weights(str(path), torch.bfloat16, None)
    alpha = load_file(path)["lora_unet_blocks_0_ffn_0.alpha"]
    assert alpha.dtype == torch.float32 and float(alpha) == pytest.approx(2 * 3**0.5, rel=1e-7)


@BACKENDS
def test_a_file_is_continued_with_its_own_scale_and_that_is_said(
    tmp_path: Path, backend: str, caplog: pytest.LogCaptureFixture
):
    earlier, path = saved(tmp_path, backend=backend)
    asked, transformer, other = question(0), WanModel(), WanModel()
    network = network_on(transformer, alpha=16.0, backend=backend)
    info = network.load_weights(str(path))
    assert not info.missing_keys and not info.unexpected_keys
    assert {layer.scale for layer in network.unet_loras} == {0.5}
    assert "its alpha 2 counts, and not the 16 of --network_alpha" in caplog.text
    again = network_on(other, backend=backend)
    again.load_state_dict(earlier.state_dict())
    assert torch.equal(transformer(**asked), other(**asked))


def test_what_a_file_lacks_or_has_too_much_is_told(tmp_path: Path):
    _, path = saved(tmp_path)
    tensors = load_file(path)
    moved = {key.replace("blocks_1", "blocks_7"): tensor for key, tensor in tensors.items()}
    save_file(moved, path)
    info = network_on(WanModel()).load_weights(path)
    assert len(info.missing_keys) == len(info.unexpected_keys) == 30
    assert info.unexpected_keys[0].startswith("lora_unet_blocks_7")


def test_files_that_cannot_be_continued_are_refused(tmp_path: Path):
    network, path = saved(tmp_path)
    with pytest.raises(ModelError, match="Give --network_dim the file's rank"):
        network_on(WanModel(), dim=8).load_weights(path)
    save_file({"diffusion_model.blocks.0.self_attn.q.lora_A.weight": torch.zeros(4, 24)}, path)
    with pytest.raises(ModelError, match="weft convert"):
        network.load_weights(path)
    for name in ("adapter.pt", "adapter.ckpt"):
        with pytest.raises(ModelError, match=r"\.safetensors"):
            network.load_weights(tmp_path / name)
        with pytest.raises(ModelError, match=r"\.safetensors"):
            network.save_weights(tmp_path / name, None, None)
    path.write_bytes(path.read_bytes()[:40])
    with pytest.raises(ModelError, match="no whole safetensors file"):
        network.load_weights(path)
    with pytest.raises(ModelError, match="no such file"):
        network.load_weights(tmp_path / "absent.safetensors")


def mixed(tmp_path: Path) -> dict[str, Tensor]:
    """Weights whose layers differ in rank and alpha."""
    draw = torch.Generator().manual_seed(0)
    weights = {}
    for rank, alpha, name in (
        (2, 4.0, "blocks_0_self_attn_q"),
        (6, 1.5, "blocks_1_ffn_0"),
        (3, None, "blocks_1_ffn_2"),
    ):
        inner, out = {"blocks_1_ffn_0": (24, 40), "blocks_1_ffn_2": (40, 24)}.get(name, (24, 24))
        weights[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, inner, generator=draw)
        weights[f"lora_unet_{name}.lora_up.weight"] = torch.randn(out, rank, generator=draw)
        if alpha is not None:
            weights[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return weights


@BACKENDS
def test_a_network_is_made_of_weights_with_each_layers_rank_and_alpha(tmp_path: Path, backend: str):
    weights, transformer = mixed(tmp_path), WanModel()
    network = musubi.create_arch_network_from_weights(1.0, weights, unet=transformer, backend=backend)
    network.apply_to(None, transformer, apply_text_encoder=False, apply_unet=True)
    sizes = {layer.path: (layer.lora_dim, layer.scale) for layer in network.unet_loras}
    assert sizes == {"blocks.0.self_attn.q": (2, 2.0), "blocks.1.ffn.0": (6, 0.25), "blocks.1.ffn.2": (3, 1.0)}
    network.load_state_dict(weights, strict=False)
    merged = WanModel()
    musubi.create_arch_network_from_weights(1.0, weights, unet=merged, for_inference=True).merge_to(
        None, merged, weights
    )
    asked = question(0)
    torch.testing.assert_close(transformer(**asked), merged(**asked), rtol=1e-4, atol=1e-4)  # as large as 40


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merging_is_w_plus_multiplier_scale_b_a_rounded_once(tmp_path: Path, dtype: torch.dtype):
    weights, transformer, bare = mixed(tmp_path), WanModel().to(dtype), WanModel().to(dtype)
    network = musubi.create_arch_network_from_weights(0.5, weights, unet=transformer, for_inference=True)
    assert network.is_mergeable()
    network.merge_to(None, transformer, weights, device="cpu", non_blocking=True)
    down, up = (weights[f"lora_unet_blocks_0_self_attn_q.lora_{end}.weight"].double() for end in ("down", "up"))
    expected = bare.blocks[0].self_attn.q.weight.double() + 0.5 * 2.0 * up @ down
    half = torch.finfo(dtype).eps  # of a number of size one; sums of two products come before the rounding
    torch.testing.assert_close(transformer.blocks[0].self_attn.q.weight.double(), expected, rtol=half, atol=1e-6)
    changed = {key for key, t in transformer.state_dict().items() if not torch.equal(t, bare.state_dict()[key])}
    assert changed == {f"blocks.{path}.weight" for path in ("0.self_attn.q", "1.ffn.0", "1.ffn.2")}


def test_base_weights_are_merged_before_a_new_network_is_made(tmp_path: Path):
    weights, path = mixed(tmp_path), tmp_path / "earlier.safetensors"
    save_file(weights, path)
    run = Run(arguments(base_weights=[str(path)]), WanModel())
    train(run, steps=1)
    merged = WanModel()
    network = musubi.create_arch_network_from_weights(0.5, weights, unet=merged, for_inference=True)
    network.merge_to(None, merged, weights, torch.float32, "cpu")
    assert all(torch.equal(t, merged.state_dict()[key]) for key, t in run.transformer.state_dict().items())


def test_weights_of_which_nothing_fits_are_refused(tmp_path: Path):
    network = network_on(WanModel())
    with pytest.raises(ModelError, match="none of the file's 3 tensors"):
        layer = "lora_unet_single_blocks_0_linear1"
        network.merge_to(None, None, {f"{layer}.{end}": torch.zeros(2, 2) for end in ("lora_down.weight", "a", "b")})
    for key in ("lora_unet_blocks_0_ffn_0.hada_w1_a", "transformer.blocks.0.attn1.to_q.lora_A.weight"):
        with pytest.raises(ModelError, match="weft convert FILE --to musubi"):
            musubi.create_arch_network_from_weights(1.0, {key: torch.zeros(2, 2)}, unet=WanModel())


def test_a_scaled_fp8_base_is_not_merged_into():
    transformer = WanModel()
    network = network_on(transformer)
    transformer.blocks[0].self_attn.q.register_buffer("scale_weight", torch.ones(1))
    with pytest.raises(ModelError, match="scaled fp8"):
        network.backup_weights()


@BACKENDS
def test_weights_are_folded_in_and_given_back_bit_for_bit(backend: str):
    transformer, asked = WanModel().bfloat16(), question(0)
    asked = {key: tensor.bfloat16() if key != "t" else tensor for key, tensor in asked.items()}
    before = {key: tensor.clone() for key, tensor in transformer.state_dict().items()}
    network = randomized(network_on(transformer, backend=backend))
    network.set_multiplier(0.25)
    adapted = transformer(**asked)
    network.backup_weights()
    network.pre_calculation()
    network.pre_calculation()  # from the kept weights, not from those that hold the change
    folded = transformer(**asked)
    assert (folded - adapted).norm() < 0.1 * adapted.norm()  # the weights were rounded to eight bits
    network.restore_weights()
    assert all(torch.equal(tensor, before[key]) for key, tensor in transformer.state_dict().items())
    network.set_enabled(True)
    assert torch.equal(transformer(**asked), adapted)


@BACKENDS
def test_the_multiplier_scales_every_layer(backend: str):
    transformer, asked = WanModel(), question(0)
    bare = transformer(**asked)
    network = randomized(network_on(transformer, backend=backend))
    whole = transformer(**asked)
    for multiplier, expected in ((0.0, bare), (1.0, whole)):
        network.set_multiplier(multiplier)
        torch.testing.assert_close(transformer(**asked), expected, rtol=0, atol=0)


@BACKENDS
def test_dora_is_saved_with_its_magnitudes_and_continued(tmp_path: Path, backend: str):
    transformer, asked = WanModel(), question(0)
    bare = transformer(**asked)
    network = network_on(transformer, backend=backend, dora="True")
    torch.testing.assert_close(transformer(**asked), bare, rtol=1e-5, atol=1e-5)  # lengths over themselves
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.mul_(1.1) if name.endswith("dora_scale") else parameter.add_(0.05)
    path = tmp_path / "dora.safetensors"
    network.save_weights(path, torch.float32, {})
    weights = load_file(path)
    assert weights["lora_unet_blocks_0_ffn_0.dora_scale"].shape == (40, 1)
    again = WanModel()
    network_on(again, backend=backend, dora="True").load_weights(path)
    assert torch.equal(again(**asked), transformer(**asked))
    linear, x = transformer.blocks[0].ffn[0], torch.randn(2, 24)
    layer = network.unet_loras[8]
    turned = linear.weight + layer.delta(layer.lora_down.weight, layer.lora_up.weight, layer.scale)
    rows = turned * (layer.dora_scale / turned.norm(dim=1))[:, None]
    torch.testing.assert_close(linear(x), x @ rows.T + linear.bias, rtol=1e-5, atol=1e-5)
    assert not network.is_mergeable()
    for weights_sd in (weights, {}):
        with pytest.raises(ModelError, match="weft merge"):
            network.merge_to(None, transformer, weights_sd)


def test_dora_is_refused_on_weights_in_fp8():
    transformer = WanModel()
    linear = transformer.blocks[0].ffn[0]
    linear.weight = torch.nn.Parameter(linear.weight.to(torch.float8_e4m3fn), requires_grad=False)
    with pytest.raises(ModelError, match=r"'blocks\.0\.ffn\.0'.*fp8"):
        network_on(transformer, dora="True")


def test_musubis_environment_needs_neither_diffusers_nor_what_reads_videos():
    """In a fresh interpreter in which those cannot be imported."""
    code = (
        "import sys, json\n"
        "for name in ('diffusers', 'av', 'ftfy', 'PIL', 'datasets', 'rich'): sys.modules[name] = None\n"
        "import weft.integrations.musubi\n"
        "print(json.dumps(sorted({name.partition('.')[0] for name in sys.modules if sys.modules[name]})))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {"torch", "peft", "safetensors"} <= set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("kind", [{}, {"rslora": "True"}, {"dora": "True"}])
def test_weft_reads_the_change_that_was_trained(tmp_path: Path, kind: dict[str, str]):
    network, path = saved(tmp_path, **kind)
    adapter = read_adapter(path)
    assert len(adapter.paths) == len(network.unet_loras)
    for layer in network.unet_loras:
        (canonical,) = modules("wan").parts[layer.path]
        change = change_of(adapter, canonical)
        assert change.factors is not None
        made = change.factors[0] @ change.factors[1]
        expected = layer.delta(layer.lora_down.weight, layer.lora_up.weight, layer.scale)
        assert (made - expected).norm() <= 1e-6 * expected.norm()
        assert layer.dora_scale is None or torch.equal(change.magnitude.float(), layer.dora_scale)


@pytest.mark.parametrize("program", ["musubi", "comfyui"])
def test_other_programs_take_every_key(tmp_path: Path, program: str):
    network, path = saved(tmp_path, torch.bfloat16)
    use = use_of(program, path, "wan")
    assert not use.ignored and not use.faults and set(use.layers) == {layer.path for layer in network.unet_loras}
