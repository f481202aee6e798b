"""What a training step of adapters on a frozen network must compute and move: FLOP, bytes, and the least time for them.

Letters: T tokens of a linear layer i -> o, r rank of its adapter, Nq and Nk queries and keys of attention of width d. A
multiplication with its addition is 2 FLOP. Forward: linear 2 T i o, adapter 2 T r (i + o), attention 4 Nq Nk d.
Backward: linear 2 T i o for its input alone, and nothing where no adapter stands before it; adapter 4 T r (i + o);
attention 8 Nq Nk d, and 10 as kernels run it that compute the scores once more. Gradients of frozen weights are never
computed.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields

BACKWARD_MOVES = 1.6  # bytes of the backward pass beside matrix products and attention, against those of the forward
HALF = 2  # bytes of a number in half precision


@dataclass(frozen=True)
class Linear:
    """A frozen linear layer. fixed: its input is data, such as a text's encoding, and wants no gradient."""

    name: str
    tokens: int
    inputs: int
    outputs: int
    fixed: bool = False

    @property
    def forward(self) -> int:
        return 2 * self.tokens * self.inputs * self.outputs


@dataclass(frozen=True)
class Attention:
    """queries see a share of keys: all, half where each sees those before it. kept: selective recomputation keeps its
    answer."""

    queries: int
    keys: int
    width: int
    share: float = 1.0
    kept: bool = True

    @property
    def forward(self) -> int:
        return round(4 * self.queries * self.keys * self.width * self.share)


@dataclass(frozen=True)
class Stage:
    """Linear layers side by side, and the attention that is computed of their answers."""

    linears: tuple[Linear, ...]
    attention: Attention | None = None


@dataclass(frozen=True)
class Block:
    """Stages in their order. moved: bytes that a forward pass reads and writes beside products and attention, at the
    least."""

    stages: tuple[Stage, ...]
    moved: float = 0.0


@dataclass(frozen=True)
class Work:
    """FLOP of a step, and bytes moved beside products and attention. again_*: what full recomputation runs twice;
    of attention selective recomputation keeps again_kept."""

    linear_forward: int = 0
    linear_backward: int = 0
    attention_forward: int = 0
    attention_backward: int = 0  # 8 Nq Nk d
    lora: int = 0
    moved: float = 0.0
    again_linear: int = 0
    again_attention: int = 0
    again_kept: int = 0
    again_moved: float = 0.0

    def __add__(self, other: "Work") -> "Work":
        return Work(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def times(self, number: int) -> "Work":
        """Of so many micro-batches."""
        return Work(*(number * getattr(self, field.name) for field in fields(self)))

    @property
    def model(self) -> int:
        """Whatever it is computed with: what MFU counts."""
        return self.linear_forward + self.linear_backward + self.attention_forward + self.attention_backward + self.lora

    def hardware(self, recompute: str = "none") -> int:
        """As it is run. recompute: none, selective or full."""
        scores = self.attention_backward // 4  # 2 Nq Nk d
        return self.model + scores + sum(self.again(recompute)[:2])

    def again(self, recompute: str) -> tuple[int, int, float]:
        """FLOP of products, FLOP of attention, and bytes, that recomputation adds."""
        if recompute == "none":
            return 0, 0, 0.0
        kept = self.again_kept if recompute == "selective" else 0
        return self.again_linear, self.again_attention - kept, self.again_moved


def work_of(
    blocks: Iterable[Block], rank: Callable[[int, str], int], head: Sequence[Linear] = (), before: bool = False
) -> Work:
    """One micro-batch forward and backward. rank: of the adapter on the named layer of a numbered block, 0 for none.
    head: layers behind the blocks, that are never run again. before: whether something that is trained stands in front.

    Below the lowest adapter nothing is computed backward, and nothing twice.
    """
    total, lives = Work(), before
    for number, block in enumerate(blocks):
        own, lives = _of_block(block, lambda name, number=number: rank(number, name), lives)
        total += own
    for linear in head:
        total += Work(linear_forward=linear.forward, linear_backward=linear.forward if lives else 0)
    return total


def _of_block(block: Block, rank: Callable[[str], int], lives: bool) -> tuple[Work, bool]:
    """The work of a block, and whether its answer has a gradient. lives: whether its input has one."""
    linear = backward = forward_a = backward_a = kept = first = later = 0
    for stage in block.stages:
        after = lives
        for each in stage.linears:
            wanted, r = lives and not each.fixed, rank(each.name)
            linear += each.forward
            backward += each.forward if wanted else 0
            if r:
                after = True
                both = 2 * each.tokens * r * (each.inputs + each.outputs)
                first += both
                later += 2 * both - (0 if wanted else 2 * each.tokens * r * each.inputs)
        if stage.attention is not None:
            seen = stage.attention.forward
            forward_a += seen
            backward_a += 2 * seen if after else 0
            kept += seen if stage.attention.kept else 0
        lives = after
    last = sum(each.forward for each in block.stages[-1].linears)
    moved = block.moved * (1 + (BACKWARD_MOVES if lives else 0))
    again = (linear - last + first, forward_a, kept, block.moved) if lives else (0, 0, 0, 0.0)
    return Work(linear, backward, forward_a, backward_a, first + later, moved, *again), lives


# ---- Blocks of families -------------------------------------------------------------------------------------------


def wan_blocks(
    layers: int, width: int, ffn: int, video: int, text: int, items: int = 1, picture: int = 0
) -> list[Block]:
    """Wan: self-attention, attention to text (and to a picture's tokens), feed-forward. Tokens are of one item."""
    n, seen = items * video, items * text
    cross = Attention(n, text, width, kept=False)
    told = [Linear(f"attn2.to_{name}", seen, width, width, fixed=True) for name in "kv"]
    stages = [
        Stage(tuple(Linear(f"attn1.to_{name}", n, width, width) for name in "qkv"), Attention(n, video, width)),
        Stage((Linear("attn1.to_out.0", n, width, width),)),
        Stage((Linear("attn2.to_q", n, width, width), *told), cross),
    ]
    if picture:
        shown = tuple(Linear(f"attn2.add_{name}_proj", items * picture, width, width, fixed=True) for name in "kv")
        stages.append(Stage(shown, Attention(n, picture, width, kept=False)))
    stages += [
        Stage((Linear("attn2.to_out.0", n, width, width),)),
        Stage((Linear("ffn.net.0.proj", n, width, ffn),)),
        Stage((Linear("ffn.net.2", n, ffn, width),)),
    ]
    return [Block(tuple(stages), HALF * n * (18 * width + 2 * ffn))] * layers


def hunyuan_blocks(
    doubles: int, singles: int, width: int, ffn: int, video: int, text: int, items: int = 1
) -> list[Block]:
    """HunyuanVideo: blocks with a stream each for video and text, and joint attention; then blocks of one stream."""
    n, m, both = items * video, items * text, items * (video + text)
    joint, moved = Attention(both, video + text, width), HALF * both * (14 * width + 2 * ffn)
    streams = [("to_q", "to_k", "to_v", "to_out.0", "ff", n),
               ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out", "ff_context", m)]  # fmt: skip

    def of_both(make: Callable[..., Iterable[Linear]]) -> tuple[Linear, ...]:
        return tuple(linear for stream in streams for linear in make(*stream))

    double = Block(
        (
            Stage(of_both(lambda q, k, v, o, ff, t: [Linear(f"attn.{x}", t, width, width) for x in (q, k, v)]), joint),
            Stage(of_both(lambda q, k, v, o, ff, t: [Linear(f"attn.{o}", t, width, width)])),
            Stage(of_both(lambda q, k, v, o, ff, t: [Linear(f"{ff}.net.0.proj", t, width, ffn)])),
            Stage(of_both(lambda q, k, v, o, ff, t: [Linear(f"{ff}.net.2", t, ffn, width)])),
        ),
        moved,
    )
    beside = (*(Linear(f"attn.to_{x}", both, width, width) for x in "qkv"), Linear("proj_mlp", both, width, ffn))
    single = Block((Stage(beside, joint), Stage((Linear("proj_out", both, width + ffn, width),))), moved)
    return [double] * doubles + [single] * singles


def decoder_blocks(
    layers: int, width: int, ffn: int, heads: tuple[int, int, int], tokens: int, document: int
) -> list[Block]:
    """A decoder of text with gated feed-forward. heads: of queries, of keys, and the width of one. document: tokens of
    each of the conversations that are packed into rows."""
    queries, keys, own = heads
    causal = Attention(tokens, document, queries * own, share=0.5)
    stages = (
        Stage(
            (
                Linear("self_attn.q_proj", tokens, width, queries * own),
                Linear("self_attn.k_proj", tokens, width, keys * own),
                Linear("self_attn.v_proj", tokens, width, keys * own),
            ),
            causal,
        ),
        Stage((Linear("self_attn.o_proj", tokens, queries * own, width),)),
        Stage((Linear("mlp.gate_proj", tokens, width, ffn), Linear("mlp.up_proj", tokens, width, ffn))),
        Stage((Linear("mlp.down_proj", tokens, ffn, width),)),
    )
    return [Block(stages, HALF * tokens * (12 * width + 3 * ffn))] * layers


# ---- Times --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rates:
    """What a device reaches: FLOP/s of products and of attention forward and backward, and bytes/s of a copy (read and
    written bytes together)."""

    products: float
    attention_forward: float
    attention_backward: float
    copies: float


# Products and copies of random numbers on an H200; attention as FlashAttention-3 reaches it at long sequences (Shah et
# al. 2024, arXiv:2407.08608, figures 5 and 6).
H200 = Rates(790e12, 640e12, 550e12, 4.3e12)


def strict_seconds(work: Work, rates: Rates) -> float:
    """All FLOP without recomputation at the rate of products: no way to compute a step is faster."""
    return work.hardware() / rates.products


def practical_seconds(work: Work, rates: Rates, recompute: str = "none") -> float:
    """Products, attention and moved bytes one after another, each at its own rate. The backward pass of attention is
    timed by the 10 Nq Nk d that it runs."""
    linear, attention, moved = work.again(recompute)
    products = work.linear_forward + work.linear_backward + work.lora + linear
    return (
        products / rates.products
        + (work.attention_forward + attention) / rates.attention_forward
        + 1.25 * work.attention_backward / rates.attention_backward
        + (work.moved + moved) / rates.copies
    )
