"""musubi-tuner's choice of times and of experts, as a density over [0, 1] and a range of it."""

from collections.abc import Mapping
from math import exp

from weft.errors import ConfigError
from weft.importers.draft import Draft
from weft.importers.musubi_model import Base
from weft.importers.values import Theirs

METHODS = (
    "sigma", "uniform", "sigmoid", "shift", "flux_shift", "flux2_shift", "ideogram4_shift", "qwen_shift",
    "krea2_shift", "logsnr", "qinglong_flux", "qinglong_qwen",
)  # fmt: skip
SCHEMES = ("logit_normal", "mode", "cosmap", "sigma_sqrt", "none")
# mu is a line through two (tokens of a frame, mu); the shift is exp(mu). musubi's trainer_base.py.
LINES: Mapping[str, tuple[tuple[int, float], tuple[int, float]]] = {
    "flux_shift": ((256, 0.5), (4096, 1.15)),
    "qinglong_flux": ((256, 0.5), (4096, 1.15)),
    "qwen_shift": ((256, 0.5), (8192, 0.9)),
    "qinglong_qwen": ((256, 0.5), (8192, 0.9)),
    "krea2_shift": ((256, 0.5), (6400, 1.15)),
}
USUAL = (960, 544)  # musubi's resolution where a dataset names none


def put_times(theirs: Theirs, draft: Draft, size: tuple[int, int] | None) -> None:
    """The section `objective`. size: width and height of the data, for densities that follow it."""
    draft.assume("objective.kind", "flow-matching", "musubi's loss: the velocity's squared error")
    method = theirs.choice("timestep_sampling", METHODS, "sigma")
    scheme = theirs.choice("weighting_scheme", SCHEMES, "none")
    if scheme in ("cosmap", "sigma_sqrt"):
        draft.set("objective.weighting", scheme.replace("_", "-"), "weighting_scheme", theirs=scheme)
    if method == "sigma":
        _sigma(theirs, draft, scheme)
    else:
        _named(theirs, draft, method, size)
        if scheme in ("logit_normal", "mode"):
            draft.drop("weighting_scheme", scheme, "Its density belongs to timestep_sampling sigma; musubi ignores it.")
    _range(theirs, draft, method)
    for key in ("logit_mean", "logit_std", "sigmoid_scale", "discrete_flow_shift", "preserve_distribution_shape"):
        if key in theirs.left:
            draft.drop(key, theirs.take(key), f"It has no part in timestep_sampling {method}.")


def _sigma(theirs: Theirs, draft: Draft, scheme: str) -> None:
    """musubi's default looks a time up in a table that nothing shifts."""
    said = "timestep_sampling" in theirs
    kind = {"logit_normal": "logit-normal"}.get(scheme, "uniform")
    if said:
        draft.set("objective.timesteps.kind", kind, "timestep_sampling", theirs="sigma")
    else:
        draft.assume("objective.timesteps.kind", kind, "musubi's default, sigma: not shifted")
    if scheme == "logit_normal":
        mean, std = theirs.number("logit_mean", 0.0) or 0.0, theirs.number("logit_std", 1.0)
        draft.set("objective.timesteps.mean", -mean + 0.0, "logit_mean", "its table begins with noise", mean)
        draft.set("objective.timesteps.std", std, "logit_std")
    if scheme == "mode":
        draft.warn("weighting_scheme mode: Weft has no such density; this run draws times uniformly.")
    shift = theirs.number("discrete_flow_shift", 1.0)
    told = f" discrete_flow_shift {shift:g} has no effect with it." if shift != 1 else ""
    if kind == "uniform":
        draft.warn(
            f"timestep_sampling {'is' if said else 'is not given, so it is'} sigma, and musubi then trains all times "
            f"alike.{told} Its guides advise shift; here: objective.timesteps: {{kind: shift, shift: "
            f"{shift if shift != 1 else 5:g}}}."
        )
    if "discrete_flow_shift" in theirs:
        draft.drop("discrete_flow_shift", shift, "With timestep_sampling sigma musubi ignores it.")


def _named(theirs: Theirs, draft: Draft, method: str, size: tuple[int, int] | None) -> None:
    if method in ("uniform", "sigmoid"):
        draft.set("objective.timesteps.kind", method, "timestep_sampling")
        if method == "sigmoid" and "sigmoid_scale" in theirs:
            draft.set("objective.timesteps.scale", theirs.number("sigmoid_scale"), "sigmoid_scale")
    elif method == "shift":
        shift = theirs.number("discrete_flow_shift")
        draft.set("objective.timesteps.kind", "shift", "timestep_sampling")
        if shift is None:
            draft.assume("objective.timesteps.shift", 1.0, "musubi's default: no shift at all")
            draft.warn("discrete_flow_shift is not given, and 1 shifts nothing. Wan takes 3 to 5, HunyuanVideo 7.")
        else:
            draft.set("objective.timesteps.shift", shift, "discrete_flow_shift")
        if "sigmoid_scale" in theirs:
            draft.set("objective.timesteps.scale", theirs.number("sigmoid_scale"), "sigmoid_scale")
    elif method == "logsnr":
        mean, std = theirs.number("logit_mean", 0.0) or 0.0, theirs.number("logit_std", 1.0) or 1.0
        draft.set("objective.timesteps.kind", "logit-normal", "timestep_sampling", theirs=method)
        # t = sigmoid(-lambda / 2), lambda normal(mean, std)
        draft.set("objective.timesteps.mean", -mean / 2 + 0.0, "logit_mean", "logit(t) is -log-SNR / 2", mean)
        draft.set("objective.timesteps.std", std / 2, "logit_std", "logit(t) is -log-SNR / 2", std)
    elif method in LINES:
        shift = round(exp(_on_line(method, size or USUAL)), 3)
        width, height = size or USUAL
        draft.set("objective.timesteps.kind", "shift", "timestep_sampling", theirs=method)
        draft.assume("objective.timesteps.shift", shift, f"{method} at {width}x{height}")
        draft.warn(
            f"timestep_sampling {method}: musubi's shift follows each item's size. This run has one for all, "
            f"{shift:g}, that of {width}x{height}."
        )
    else:
        draft.assume("objective.timesteps.kind", "uniform", f"Weft has no {method}")
        draft.warn(f"timestep_sampling {method} is for image models and is not here; this run draws times uniformly.")


def _on_line(method: str, size: tuple[int, int]) -> float:
    (low, at_low), (high, at_high) = LINES[method]
    tokens = (size[0] // 16) * (size[1] // 16)
    return at_low + (tokens - low) * (at_high - at_low) / (high - low)


def _range(theirs: Theirs, draft: Draft, method: str) -> None:
    low, high = theirs.number("min_timestep"), theirs.number("max_timestep")
    if low is None and high is None:
        return
    bottom, top = (low or 0) / 1000, (1000 if high is None else high) / 1000
    names = " and ".join(key for key in ("min_timestep", "max_timestep") if key in theirs)
    if not 0 <= bottom < top <= 1:
        at = theirs.place("min_timestep" if "min_timestep" in theirs else "max_timestep")
        swapped = " They look swapped." if bottom > top else ""
        raise ConfigError(
            f"{at}: {names} say {bottom * 1000:g} to {top * 1000:g}. Expected were numbers from 0 to 1000 that "
            f"rise.{swapped}"
        )
    keeps = theirs.flag("preserve_distribution_shape")
    note = "" if keeps or method == "sigma" else "musubi squeezes the density into the range; here it is cut"
    draft.set("objective.times", [bottom, top], names, note, f"{bottom * 1000:g}, {top * 1000:g}")
    if method == "sigma":
        draft.warn(
            f"{names}: with timestep_sampling sigma musubi counts from the noisy end, so it trained times "
            f"{1 - top:g} to {1 - bottom:g}. This run trains {bottom:g} to {top:g}, as it is written. For musubi's: "
            f"objective.times: [{1 - top:g}, {1 - bottom:g}]."
        )
    if high is not None and high <= 1:
        draft.warn(f"max_timestep {high:g}: musubi counts from 0 to 1000, so this is almost no time at all.")


# ---- Experts --------------------------------------------------------------------------------------------------------


def put_experts(theirs: Theirs, draft: Draft, base: Base) -> None:
    """Which of two networks is trained, and from which files. Call after `put_times`."""
    low, high = theirs.text("dit"), theirs.text("dit_high_noise")
    boundary = theirs.number("timestep_boundary")
    if base.boundary is None:
        if high is not None:
            raise ConfigError(
                f"{theirs.place('dit_high_noise')}: the task has one network, and dit_high_noise names a second one. "
                "musubi's tasks with two are t2v-A14B and i2v-A14B."
            )
        if boundary is not None:
            draft.drop("timestep_boundary", boundary, "The task has one network.")
        if theirs.flag("offload_inactive_dit"):
            draft.drop("offload_inactive_dit", True, "The task has one network.")
        return
    if boundary is not None:
        _put_boundary(theirs, draft, boundary, base.boundary)
    if theirs.flag("offload_inactive_dit"):
        draft.set("engine.experts", "one", "offload_inactive_dit", theirs=True)
    if high is not None:
        draft.set("family.expert", "both", "dit_high_noise", "an adapter for each; musubi trains one for both", high)
        draft.set("family.files.high", high, "dit_high_noise")
        if low is not None:
            draft.set("family.files.low", low, "dit")
        if low is not None and _named_for(low) == "high" and _named_for(high) == "low":
            draft.warn("dit and dit_high_noise look swapped: dit is the low network, and its file calls itself high.")
        draft.warn(
            "family.expert: both trains two adapters, in turns of objective.turn steps. musubi trains one that both "
            "networks share; that does not exist here."
        )
        return
    _put_one(draft, low, draft.get("objective.times"), base.boundary)


def _named_for(path: str) -> str | None:
    """The expert that a file calls itself."""
    name = path.replace("\\", "/").rpartition("/")[2].lower()
    return "high" if "high" in name else "low" if "low" in name else None


def _put_boundary(theirs: Theirs, draft: Draft, boundary: float, usual: float) -> None:
    value = boundary / 1000 if boundary > 1 else boundary
    if not 0 < value < 1:
        raise theirs.refused("timestep_boundary", "a number between 0 and 1000")
    if abs(value - usual) > 0.05:
        draft.warn(f"timestep_boundary {boundary:g}: the model was made for {usual * 1000:g}.")
    draft.set("family.boundary", value, "timestep_boundary", theirs=boundary)


def _put_one(draft: Draft, network: str | None, times: list[float] | None, boundary: float) -> None:
    """One of the two, told by its times, else by the name of its file."""
    by_name = _named_for(network or "")
    by_times = None
    if times is not None:
        by_times = "low" if times[1] <= boundary + 0.03 else "high" if times[0] >= boundary - 0.03 else None
    expert = by_times or by_name
    if by_times and by_name and by_times != by_name:
        draft.warn(f"min_timestep and max_timestep are those of the {by_times} expert, but dit is {network}.")
        expert = by_name
    if expert is None:
        draft.ask("family.expert", "low", "high or low: which of the two networks dit is")
        expert = "low"
    else:
        draft.assume("family.expert", expert, "the expert that dit is")
    if network is not None:
        draft.set(f"family.files.{expert}", network, "dit")
    if times is None:
        draft.warn(
            f"min_timestep and max_timestep are not given, so musubi trains the {expert} expert on all times. Weft "
            f"trains it on its own, {'below' if expert == 'low' else 'from'} {boundary:g}."
        )
