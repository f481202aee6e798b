"""Write the tables of docs/performance.md from benchmarks/results anew: python docs/performance_tables.py"""

import json
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).with_name("performance.md")
RESULTS = DOCUMENT.parents[1] / "benchmarks" / "results"
HALF = "bf16 autocast, fp32 adapters"
WAYS = {
    "no adapter": "the library's block, no adapter",
    "library + PEFT": "library + PEFT",
    "fused alone": "`adapter.fused` alone",
    "lean alone": "the lean block alone",
    "lean + fused": "both: the default",
}
Row = Sequence[object]


def read(name: str) -> Any:
    """The figures in a file; None where nobody has measured them."""
    path = RESULTS / name
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def table(head: Row, rows: Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def missing(command: str) -> str:
    return f"Not measured yet: `{command}`."


def machine(figures: Any) -> str:
    """Where and when figures were taken, with the versions that they depend on."""
    versions = ", ".join(f"{name} {number}" for name, number in figures["versions"].items() if name != "weft")
    return f"{figures['processor']}, {versions}, {figures['date']}."


# ---- Tables ---------------------------------------------------------------------------------------------------------


def counts() -> str:
    figures = read("ablation-cpu.json")
    if figures is None:
        return missing("python benchmarks/ablation.py --json benchmarks/results/ablation-cpu.json")
    parts = []
    for model, kinds in figures["rows"].items():
        rows = []
        for name, row in kinds[HALF].items():
            forth, back = row["forward"], row["backward"]
            rows.append([
                WAYS[name], f"{row['saved_nd']:.1f}", f"{forth['operations']} / {back['operations']}",
                f"{forth['pointwise_nd']:.0f} / {back['pointwise_nd']:.0f}",
                f"{forth['products_nd']:.0f} / {back['products_nd']:.0f}",
            ])  # fmt: skip
        head = [model, "kept, Nd", "operators", "pointwise, Nd", "in and out of products, Nd"]
        parts.append(table(head, rows))
    optimizer = figures["optimizer_operations"]
    told = ", ".join(f"{name} {number}" for name, number in optimizer.items())
    parts.append(f"Operators of clipping, moving and clearing 600 tensors: {told}.")
    timed = figures["seconds"]
    times = timed["wan block, fp32"]
    told = ", ".join(f"{WAYS[name]} {1e3 * value:.0f}" for name, value in times.items())
    parts.append(
        f"One thread's processor time of a Wan block in fp32, {timed['tokens']} tokens, forward and backward, the "
        f"least of {timed['rounds']} rounds, in ms: {told}."
    )
    return "\n\n".join([*parts, machine(figures)])


def compiled() -> str:
    command = "python benchmarks/compiled_blocks.py --json benchmarks/results/compiled-blocks-cpu.json"
    figures = read("compiled-blocks-cpu.json")
    if figures is None:
        return missing(command)
    row = figures["rows"][HALF]
    rows = [
        [
            budget, each["saved_nd"], f"{each['products_twice']} of {row['products']}", each["self_attention_twice"],
            each["cross_attention_twice"],
            *(" / ".join(f"{part[kind]:.0f}" for part in each["moved_nd"]) for kind in ("own", "all")),
        ]
        for budget, each in row["budgets"].items()
    ]  # fmt: skip
    head = ["`engine.activation_budget`", "kept, Nd", "large products done twice", "self-attention twice",
            "cross-attention twice", "moved by own kernels, Nd, forward / backward", "moved by all"]  # fmt: skip
    return f"{table(head, rows)}\n\n{figures['case']}; {machine(figures)}"


def predicted() -> str:
    figures = read("ablation-cpu.json")
    if figures is None:
        return missing("python benchmarks/ablation.py --json benchmarks/results/ablation-cpu.json")
    rows = [
        [case, WAYS[name], each["device_ms"], each["host_ms"], each["kept_gib"], found["least_ms"]]
        for case, found in figures["predicted"]["cases"].items()
        for name, each in found.items()
        if name != "least_ms"
    ]
    head = ["[predicted] case", "way, eager", "device, ms", "host, ms", "kept, GiB", "`t_practical`, ms"]
    return table(head, rows)


def curves() -> str:
    figures = read("loss-curves-cpu.json")
    if figures is None:
        return missing("python -m benchmarks.loss_curves --json benchmarks/results/loss-curves-cpu.json")
    models, lines = figures["rows"], dict[tuple[str, str, str], list[str]]()
    for number, kinds in enumerate(models.values()):
        for precision, backends in kinds.items():
            for backend, rows in backends.items():
                for name, row in rows.items():
                    cells = lines.setdefault((precision, backend, name), [""] * len(models))
                    cells[number] = _distance(row)
    rows = [[*key, *cells] for key, cells in lines.items() if any(cells)]
    head = ["precision", "backend", "on", *models]
    real = figures.get("inductor")
    told = f" Compiled by inductor, Wan: {real['loss']:.0e}, {real['weights']:.0e}." if real else ""
    return f"{table(head, rows)}\n\n{figures['steps']} steps; {machine(figures)}{told}"


def _distance(row: dict[str, Any]) -> str:
    """Of losses and weights; of half precision also how far from fp32."""
    far = row.get("from_fp32")
    own = "" if "loss" not in row else "0" if row["loss"] == row["weights"] == 0 else _pair(row)
    return own if far is None else f"{own} ({_pair(far)} from fp32)".strip()


def _pair(of: dict[str, float]) -> str:
    return f"{of['loss']:.0e}, {of['weights']:.0e}"


def bars() -> str:
    return table(["what", "bar", "measured", "command, each with `--json benchmarks/results/...`"], list(_bars()))


def _bars() -> Iterator[Row]:
    block = _block("Wan block", read("block-counts.json"), ("15 Nd", "70 / 110", "100 / 170 Nd"))
    yield from ([*row, "`benchmarks/block_counts.py`"] for row in block)
    layer = _block("Qwen3 layer", read("text-counts.json"), ("15 Nd", "- / 130", "- / 300 Nd"))
    yield from ([*row, "`benchmarks/text_counts.py`"] for row in layer)
    yield ["kept per Wan block, compiled, budget 0.5", "13.5 Nd", *_compiled(read("compiled-blocks-cpu.json"))]
    yield ["bytes of a compiled Wan block, products too, forward / backward", "110 / 150 Nd",
           *_moved(read("compiled-blocks-cpu.json"))]  # fmt: skip
    yield ["LoRA forward + backward ÷ frozen linear, r = 32", "1.10", *_lora(read("lora-path-cpu.json"))]
    yield ["own loop ÷ bare loop", "1.02", *_loop(read("overhead-cpu.json"))]
    yield ["optimizer, clip, clear: 600 tensors", "2.5 ms", *_optimizer(read("optimizer-cpu.json"))]
    yield ["cached clips", "800/s, 5 x a DataLoader", *_data(read("data-path-cpu.json"))]
    yield ["packed rows of text", "0.26 M tokens/s: Qwen3 0.6B at `t_practical`", *_text(read("text-path-cpu.json"))]
    yield ["a checkpoint holds up training", "10 ms", *_stall(read("checkpoints-cpu.json"))]


def _block(what: str, figures: Any, wanted: tuple[str, str, str]) -> list[list[object]]:
    if figures is None:
        return [[f"counts of a {what}", "", "not measured yet"]]
    row = figures["rows"][f"weft lean, native, {HALF}"]
    forth, back = row["forward"], row["backward"]
    kept, operators, moved = wanted
    return [
        [f"kept per {what}, eager", kept, f"{row['saved_nd']:.2f} Nd"],
        [f"operators per {what}, forward / backward", operators, f"{forth['operations']} / {back['operations']}"],
        [f"pointwise bytes per {what}, forward / backward", moved,
         f"{forth['pointwise_nd']:.0f} / {back['pointwise_nd']:.0f} Nd"],
    ]  # fmt: skip


def _compiled(figures: Any) -> tuple[str, str]:
    command = "`benchmarks/compiled_blocks.py`"
    if figures is None:
        return "not measured yet", command
    row = figures["rows"][HALF]
    kept, less = (row["budgets"][budget] for budget in ("0.5", "0.4"))
    told = (
        f"{kept['saved_nd']} Nd, {kept['saved_nd'] - 1:.2f} of them made in the block; at 0.4 {less['saved_nd']} Nd, "
        f"with {less['products_twice']} of {row['products']} large products done twice"
    )
    return told, command


def _moved(figures: Any) -> tuple[str, str]:
    command = "`benchmarks/compiled_blocks.py`"
    if figures is None:
        return "not measured yet", command
    budgets = figures["rows"][HALF]["budgets"]
    told = []
    for budget in ("1", "0.5"):
        passes = [f"{each['all']:.0f}" for each in budgets[budget]["moved_nd"]]
        told.append(f"{' / '.join(passes)} Nd at budget {budget}")
    return ", ".join(told), command


def _lora(figures: Any) -> tuple[str, str]:
    if figures is None:
        return "not measured yet", "`benchmarks/lora_path.py`"
    told = [
        f"{case.partition(',')[0]}: {each['variants']['native, fused']['ratio']:.2f} (PEFT "
        f"{each['variants']['peft, its own']['ratio']:.2f}, least {each['least_by_flops']:.2f})"
        for case, each in figures["cases"].items()
        if case.endswith("rank 32")
    ]
    return "; ".join(told), "`benchmarks/lora_path.py`"


def _loop(figures: Any) -> tuple[str, str]:
    if figures is None:
        return "not measured yet", "`benchmarks/overhead.py`"
    told = [
        f"{name.removeprefix('weft, ')} {row['ratio']:.3f} ({row['ratio_p25']:.2f} to {row['ratio_p75']:.2f})"
        for name, row in figures["loops"].items()
        if name.startswith("weft")
    ]
    return "; ".join(told), "`benchmarks/overhead.py`"


def _optimizer(figures: Any) -> tuple[str, str]:
    if figures is None:
        return "not measured yet", "`benchmarks/optimizer.py`"
    told = [
        f"{each['numbers'] / 1e6:.1f} M numbers: {each['ms']['weft']['min']:.1f} ms (torch fused "
        f"{each['ms']['torch fused']['min']:.1f}, foreach {each['ms']['torch foreach']['min']:.1f})"
        for each in figures["cases"].values()
    ]
    return "; ".join(told), "`benchmarks/optimizer.py`"


def _data(figures: Any) -> tuple[str, str]:
    if figures is None:
        return "not measured yet", "`benchmarks/data_path.py`"
    told = []
    for case, speeds in figures["clips_per_second"].items():
        ours, share = speeds["weft, shards"]["best"], speeds["weft, shards"]["of_the_bytes"]
        none, *workers = (speeds[f"DataLoader, {number} workers"]["best"] for number in range(3))
        told.append(
            f"{case}: {ours:.0f}/s, {share:.0%} of it its bytes alone, {ours / none:.1f} x a DataLoader without "
            f"workers, {ours / max(workers):.0f} x one with"
        )
    return "; ".join(told), "`benchmarks/data_path.py`"


def _text(figures: Any) -> tuple[str, str]:
    if figures is None:
        return "not measured yet", "`benchmarks/text_path.py`"
    speeds = {name: each["best"] for name, each in figures["rows_per_second"].items()}
    told = ", ".join(f"{name} {speed:,.0f}" for name, speed in speeds.items() if name != "weft")
    return (
        f"{speeds['weft']:,.0f} rows/s of {figures['rows_of']:,} tokens, {figures['tokens_per_second'] / 1e6:.0f} M "
        f"tokens/s with packing ({told})"
    ), "`benchmarks/text_path.py`"


def _stall(figures: Any) -> tuple[str, str]:
    if figures is None:
        return "not measured yet", "`benchmarks/checkpoints.py`"
    alone = figures["results"][0]["background"]
    return f"the call returns after {1e3 * alone['call_s']:.0f} ms, on two busy cores", "`benchmarks/checkpoints.py`"


def float8() -> str:
    figures = read("float8-error-cpu.json")
    if figures is None:
        return missing("weft bench; see benchmarks/float8_error.py")
    rows = [
        [name, row["product_median"], row["gradient_median"], row["adapter_cosine"], row["worst_cosine"]]
        for name, row in figures["ways"].items()
    ]
    head = ["products in", "error of a product", "error of its input's gradient", "cosine of all adapter gradients",
            "of the worst tensor"]  # fmt: skip
    return table(head, rows)


def low_rank() -> str:
    figures = read("lora-path-cpu.json")
    if figures is None:
        return missing("python benchmarks/lora_path.py --rounds 15 --json benchmarks/results/lora-path-cpu.json")
    names = next(iter(figures["cases"].values()))["variants"]
    rows = [[name, *(f"{case['variants'][name]['ratio']:.3f}" for case in figures["cases"].values())] for name in names]
    told = table(["÷ the bare layer", *figures["cases"]], rows)
    return f"{told}\n\n{figures['tokens']} tokens, fp32; {machine(figures)}"


def head() -> str:
    figures = read("head-losses-cpu.json")
    if figures is None:
        return missing("python benchmarks/head_losses.py --json benchmarks/results/head-losses-cpu.json")
    cases = figures["cases"]
    titles = [f"{case} (logits: {figures['logits_mib'][case]:,} MiB)" for case in cases]
    rows = [
        [name, *(f"{case[name]['peak_mib']:,} MiB, {case[name]['seconds']:.1f} s" for case in cases.values())]
        for name in next(iter(cases.values()))
    ]
    return f"{table(['forward and backward', *titles], rows)}\n\n{figures['case']}; {machine(figures)}"


def clips() -> str:
    figures = read("data-path-cpu.json")
    if figures is None:
        return missing("python benchmarks/data_path.py --json benchmarks/results/data-path-cpu.json")
    cases = figures["clips_per_second"]
    rows = [
        [name, *(f"{case[name]['best']:,.0f} ({case[name]['median']:,.0f})" for case in cases.values())]
        for name in next(iter(cases.values()))
    ]
    return f"{table(['clips/s, best round (median)', *cases], rows)}\n\n{figures['case']}; {machine(figures)}"


TABLES: dict[str, Callable[[], str]] = {
    "bars": bars, "counts": counts, "compiled": compiled, "predicted": predicted, "curves": curves, "float8": float8,
    "low rank": low_rank, "head": head, "clips": clips,
}  # fmt: skip


def renewed(text: str) -> str:
    """The document with each table between its marks written anew."""
    for name, made in TABLES.items():
        begin, end = f"<!-- table: {name} -->", "<!-- end of table -->"
        pattern = re.escape(begin) + ".*?" + re.escape(end)
        text = re.sub(pattern, lambda match, made=made: f"{begin}\n\n{made()}\n\n{end}", text, flags=re.DOTALL)  # noqa: B023
    return text


if __name__ == "__main__":
    DOCUMENT.write_text(renewed(DOCUMENT.read_text("utf-8")), "utf-8")
