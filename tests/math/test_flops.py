"""The formulas of a step's FLOP and least time, against a table that was computed apart, and against arithmetic."""

from collections.abc import Callable

import pytest

from weft.math.flops import (
    H200,
    Attention,
    Block,
    Linear,
    Rates,
    Stage,
    Work,
    decoder_blocks,
    hunyuan_blocks,
    practical_seconds,
    strict_seconds,
    wan_blocks,
    work_of,
)

RANK, TEXT, WORDS = 32, 512, 151936
TERA = 1e12


def everywhere(block: int, name: str) -> int:
    return RANK


def wan(layers: int, width: int, ffn: int, cell: int) -> Callable[[int, int, int], Work]:
    def of(frames: int, height: int, high: int) -> Work:
        tokens = ((frames - 1) // 4 + 1) * (height // cell // 2) * (high // cell // 2)
        return work_of(wan_blocks(layers, width, ffn, tokens, TEXT), everywhere, before=True)

    return of


def hunyuan(frames: int, height: int, high: int) -> Work:
    tokens = ((frames - 1) // 4 + 1) * (height // 16) * (high // 16)
    return work_of(hunyuan_blocks(20, 40, 3072, 12288, tokens, 256), everywhere, before=True)


def qwen(layers: int, width: int, ffn: int, heads: int) -> Callable[[int, int], Work]:
    def of(tokens: int, document: int) -> Work:
        head = [Linear("head", tokens, width, WORDS)]
        return work_of(decoder_blocks(layers, width, ffn, (heads, 8, 128), tokens, document), everywhere, head, True)

    return of


SMALL, MIDDLE, LARGE = wan(30, 1536, 8960, 8), wan(30, 3072, 14336, 16), wan(40, 5120, 13824, 8)
QWEN_SMALL, QWEN = qwen(28, 1024, 3072, 16), qwen(36, 4096, 12288, 32)
# Of one step at batch 1 and rank 32 on all linear layers, in TFLOP and seconds, each number as it was rounded: linear
# and attention forward; the same backward, attention as it is run; model; run without, with selective, with full
# recomputation; the strict least times of these three; the practical ones.
TABLE = [
    (SMALL, (1, 480, 832), "4.05 0.60", "3.90 1.49", "10.1", "10.4 13.4 13.9", ".013 .017 .018", ".017 .022 .022"),
    (SMALL, (1, 1024, 1024), "10.4 3.48", "10.2 8.70", "32.0", "33.8 41.5 44.6", ".043 .052 .056", ".055 .068 .073"),
    (SMALL, (81, 480, 832), "82 201", "82 502", "774", "875 935 1133", "1.11 1.18 1.43", "1.50 1.60 1.91"),
    (SMALL, (81, 720, 1280), "189 1061", "189 2651", "3577", "4108 4247 5301", "5.20 5.38 6.71", "7.10 7.33 8.98"),
    (SMALL, (121, 720, 1280), "279 2306", "279 5765", "7502", "8655 8861 11157", "11.0 11.2 14.1", "15.0 15.3 18.9"),
    (MIDDLE, (1, 1024, 1024), "9.47 .58", "8.89 1.45", "20.6", "20.8 28.0 28.3", ".026 .035 .036", ".030 .041 .041"),
    (MIDDLE, (81, 480, 832), "72 26", "71 66", "225", "238 291 316", ".30 .37 .40", ".37 .45 .49"),
    (MIDDLE, (81, 704, 1280), "161 129", "160 323", "717", "782 900 1026", ".99 1.14 1.30", "1.26 1.44 1.63"),
    (MIDDLE, (121, 704, 1280), "237 279", "237 699", "1324", "1464 1638 1912", "1.85 2.07 2.42", "2.40 2.66 3.09"),
    (LARGE, (1, 480, 832), "39 2.7", "37 6.6", "85.9", "87 119 121", ".11 .15 .15", ".12 .17 .17"),
    (LARGE, (1, 1024, 1024), "100 16", "98 39", "248", "255 335 349", ".32 .42 .44", ".37 .48 .50"),
    (LARGE, (81, 480, 832), "785 893", "783 2232", "4272", "4719 5341 6220", "5.97 6.76 7.87", "7.66 8.53 9.90"),
    (LARGE, (81, 720, 1280), "1810 4714", "1807 11784", "17816", "20173 21605 26287",
     "25.5 27.3 33.3", "33.9 35.9 43.2"),
    (LARGE, (121, 720, 1280), "2670 10250", "2668 25624", "36172", "41297 43411 53613", "52 55 68", "70 73 89"),
    (hunyuan, (1, 1024, 1024), "59 14", "59 35", "163", "170 206 220", ".21 .26 .28", ".26 .31 .34"),
    (hunyuan, (81, 480, 832), "449 804", "449 2009", "3326", "3728 4008 4812", "4.7 5.1 6.1", "6.2 6.7 7.9"),
    (hunyuan, (81, 720, 1280), "1031 4242", "1031 10606", "14830", "16951 17595 21837",
     "21.5 22.3 27.6", "28.9 29.9 36.5"),
    (hunyuan, (121, 720, 1280), "1520 9225", "1520 23062", "30775", "35387 36336 45561", "45 46 58", "61 62 77"),
    (QWEN_SMALL, (4096, 4096), "4.88 1.92", "4.88 4.81", "16.0", "17.0 20.0 22.0", ".022 .025 .028", ".028 .033 .036"),
    (QWEN_SMALL, (16384, 1024), "19.5 1.9", "19.5 4.8", "46.8", "47.8 60 62", ".060 .076 .078", ".076 .096 .099"),
    (QWEN, (4096, 4096), "62 5", "62 12", "141", "143 186 191", ".18 .24 .24", ".21 .27 .27"),
    (QWEN, (16384, 1024), "248 5", "248 12", "519", "522 693 698", ".66 .88 .88", ".73 .97 .98"),
]  # fmt: skip
WAYS = ("none", "selective", "full")


def agrees(said: str, number: float) -> bool:
    """Whether a number is what was rounded, with one unit of its last digit to spare for how the table was made."""
    digits = len(said.partition(".")[2])
    return abs(float(said) - number) <= 1.5 * 10**-digits + 5e-4 * number


@pytest.mark.parametrize("row", TABLE, ids=lambda row: " ".join(map(str, row[1])))
def test_every_row_of_the_table_of_steps_comes_out(row) -> None:
    model, shape, forward, backward, total, run, strict, practical = row
    work = model(*shape)
    at = H200.products
    found = [
        *zip(forward.split(), (work.linear_forward / TERA, work.attention_forward / TERA), strict=True),
        *zip(backward.split(), (work.linear_backward / TERA, 1.25 * work.attention_backward / TERA), strict=True),
        (total, work.model / TERA),
        *zip(run.split(), (work.hardware(way) / TERA for way in WAYS), strict=True),
        *zip(strict.split(), (work.hardware(way) / at for way in WAYS), strict=True),
        *zip(practical.split(), (practical_seconds(work, H200, way) for way in WAYS), strict=True),
    ]
    assert [(said, number) for said, number in found if not agrees(said, number)] == []
    assert strict_seconds(work, H200) == work.hardware() / at


def test_nothing_is_computed_backward_below_the_lowest_adapter() -> None:
    blocks = wan_blocks(4, 8, 16, 10, 5)
    work = work_of(blocks, lambda number, name: 2 if (number, name) == (2, "attn2.to_v") else 0)
    alone = wan_blocks(1, 8, 16, 10, 5)
    one = work_of(alone, lambda *_: 0, before=True)
    # Of block 2 the layers behind that value: its attention, its output and the feed-forward; of block 3 all.
    behind = 2 * 10 * 8 * 8 + 2 * 2 * 10 * 8 * 16
    assert work.linear_forward == 4 * one.linear_forward
    assert work.linear_backward == one.linear_backward + behind
    assert work.attention_backward == one.attention_backward + 8 * 10 * 5 * 8
    assert work.lora == 4 * 5 * 2 * (8 + 8) + 2 * 5 * 2 * (8 + 8) - 2 * 5 * 2 * 8


def test_what_a_text_encoder_gave_wants_no_gradient_and_the_first_block_s_input_neither() -> None:
    width, tokens, text = 8, 10, 5
    first, second = (work_of(wan_blocks(n, width, 16, tokens, text), everywhere) for n in (1, 2))
    told, own = 2 * 2 * text * width * width, 3 * 2 * tokens * width * width
    assert first.linear_forward - first.linear_backward == told + own
    assert second.linear_backward - first.linear_backward == first.linear_forward - told


def test_recomputation_runs_all_but_the_last_layer_twice_and_selective_keeps_self_attention() -> None:
    work = work_of(wan_blocks(1, 8, 16, 10, 5), everywhere, before=True)
    lora = work.lora / 3  # its forward pass; a text's adapters have a smaller backward
    linear, attention, moved = work.again("full")
    assert linear == pytest.approx(work.linear_forward - 2 * 10 * 8 * 16 + lora, rel=0.02)
    assert attention == work.attention_forward
    assert work.again("selective")[1] == attention - 4 * 10 * 10 * 8
    assert moved == 2 * 10 * (18 * 8 + 2 * 16)
    assert work.again("none") == (0, 0, 0.0)


def test_the_head_of_words_counts_for_learned_tokens_alone() -> None:
    blocks = decoder_blocks(1, 8, 16, (2, 1, 4), 12, 6)
    with_head = work_of(blocks, everywhere, [Linear("head", 5, 8, 100)])
    without = work_of(blocks, everywhere)
    assert with_head.model - without.model == 2 * (2 * 5 * 8 * 100)
    assert with_head.again("full") == without.again("full")


def test_an_adapter_on_a_frozen_input_saves_the_gradient_of_that_input() -> None:
    block = Block((Stage((Linear("a", 7, 8, 9, fixed=True),)),))
    assert work_of([block], lambda *_: 2).lora == 6 * 7 * 2 * (8 + 9) - 2 * 7 * 2 * 8
    assert work_of([block], lambda *_: 0) == Work(linear_forward=2 * 7 * 8 * 9)


def test_times_add_up_at_the_rates_of_a_device() -> None:
    block = Block((Stage((Linear("a", 10, 10, 10),), Attention(10, 10, 10)),), moved=100.0)
    work = work_of([block], lambda *_: 0, before=True)
    rates = Rates(products=1000.0, attention_forward=500.0, attention_backward=250.0, copies=10.0)
    assert practical_seconds(work, rates) == pytest.approx(4000 / 1000 + 4000 / 500 + 10000 / 250 + 260 / 10)
    assert strict_seconds(work, rates) == pytest.approx((4000 + 4000 + 10000) / 1000)
    assert work.times(3) == work + work + work
