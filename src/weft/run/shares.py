"""What of the weights and of the adapters is in the memory of one of several processes, by arithmetic."""

from collections.abc import Mapping

from weft.engines.deepspeed import DeepSpeed
from weft.engines.parallel import Layout
from weft.engines.residency import RING, Residence, streamed_blocks, together
from weft.run.config import RunConfig

ALONE = Layout()
STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "custom": 8}  # of optimizer state for each trainable parameter
GATHERED = 2  # blocks that FSDP2 holds whole at a time: one is computed with while the next one comes
# DeepSpeed keeps whole what it needs again within 10^9 numbers (stage3_max_reuse_distance): before the turn from the
# forward to the backward pass these are the last 5 * 10^8. It fetches 5 * 10^7 ahead (stage3_prefetch_bucket_size).
REUSED, AHEAD = 5 * 10**8, 5 * 10**7

ByBlock = Mapping[int | None, int]


def weights_of(config: RunConfig, by_block: ByBlock, memory: int | None, layout: Layout) -> tuple[int, int]:
    """Bytes of frozen weights on the device of one process, and in its host memory. by_block: of one network. memory:
    bytes of the device, where that is known."""
    engine, experts = config.engine, len(config.family.experts)
    if isinstance(engine, DeepSpeed) and engine.zero == 3:
        part = -(-sum(by_block.values()) // layout.world)
        whole = min(sum(by_block.values()), (REUSED + AHEAD) * bytes_of_number(config, by_block))
        return (whole, part) if engine.offload_parameters else (part + whole, 0)
    if layout.shard > 1:
        return sharded(by_block, experts, layout.shard * layout.sequence), 0
    return divided(by_block, engine.residence(), experts, memory)


def bytes_of_number(config: RunConfig, by_block: ByBlock) -> int:
    """Of a frozen weight as it lies in memory, rounded up."""
    numbers = sum(p.numel() for p in config.family.skeleton().parameters())
    return -(-sum(by_block.values()) // max(1, numbers))


def sharded(by_block: ByBlock, experts: int, processes: int) -> int:
    """A part of all networks, and of the one that is asked what stands outside of blocks and some blocks whole."""
    part = -(-experts * sum(by_block.values()) // processes)
    blocks = [size for block, size in by_block.items() if block is not None]
    return part + by_block.get(None, 0) + min(GATHERED, len(blocks)) * max(blocks, default=0)


def divided(by_block: ByBlock, residence: Residence, experts: int, memory: int | None) -> tuple[int, int]:
    """Of so many networks with so many bytes in each block: what is on a device with so much memory, and what waits."""
    numbers = streamed_blocks(sum(block is not None for block in by_block), residence.stream_blocks)
    streaming = [by_block[number] for number in numbers]
    staying = sum(by_block.values()) - sum(streaming)
    ring = min(RING, len(numbers)) * max(streaming, default=0)
    if experts == 1 or together(residence.experts, experts * staying, memory):
        return experts * staying + ring, experts * sum(streaming)
    return staying + ring, experts * (sum(streaming) + staying)


def adapter_bytes(config: RunConfig, trained: Mapping[str, int], layout: Layout = ALONE) -> tuple[int, int]:
    """Weights, gradients, optimizer state and moving average of what is trained, on the device of one process and in
    its host memory. trained: parameters of each role; gradients are there of one at a time."""
    engine, numbers = config.engine, sum(trained.values())
    shown = config.objective.shown(config.family.experts) if config.ema else ()
    average = 4 * sum(count for role, count in trained.items() if role in shown)
    if isinstance(engine, DeepSpeed):  # beside weights and gradients it has a part of both, and the moments of that
        parts = {role: -(-count // layout.world) for role, count in trained.items()}
        moved, own = 8 * sum(parts.values()) + moments(config, parts), 8 * numbers + average
        return (own, moved) if engine.offload_optimizer else (own + moved, 0)
    processes = layout.shard * layout.sequence if layout.shard > 1 else 1
    gradients = 4 * max(trained.values(), default=0)
    return -(-(4 * numbers + gradients + moments(config, trained) + average) // processes), 0


def moments(config: RunConfig, trained: Mapping[str, int]) -> int:
    """Bytes of the optimizers' states."""
    return sum(count * STATE_BYTES[config.optimizer_of(role).kind] for role, count in trained.items())
