"""The rows, most important first, and the seconds that each may take."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RowPlan:
    function: str  # module:generator
    about: str
    seconds: float = 60.0


def _plan(function: str, about: str, seconds: float = 60.0) -> RowPlan:
    return RowPlan(function=f"benchmarks.gpu.{function}", about=about, seconds=seconds)


ROWS = {
    "checks": _plan("correctness:checks", "every technique on CUDA equals the CPU; sharding; offload", 90),
    "kernels": _plan("attention:kernels", "varlen, sink and chunked attention against the plain form", 45),
    "flex": _plan("attention:flex", "softcap by compiled flex_attention against the plain form"),
    "offload": _plan("offload:rows", "offloaded block inputs: equal bits, and what they cost"),
    "memory": _plan("memory:forecast", "measured peaks against `treering plan`, six configurations"),
    "lora": _plan("steps:lora", "tokens per second of a whole 8B shape with LoRA", 100),
    "osft": _plan("steps:osft", "a step of OSFT, three forms, against full fine-tuning", 60),
    "experts": _plan("experts:rows", "a mixture layer next to transformers' grouped_mm, and with adapters", 20),
    "qlora": _plan("quantized:whole", "tokens per second and memory of a whole 8B shape in NF4 with LoRA", 45),
    "formats": _plan("quantized:formats", "a step of LoRA on weights in each number format", 45),
    "decode": _plan("quantized:decode", "reading packed weights next to a plain copy of as many bytes", 20),
    "codecs": _plan("exchange:codecs", "8-bit messages of Ulysses next to a plain copy", 30),
    "packed": _plan("exchange:packed", "packed attention next to torch's with a dense mask", 20),
    "influence": _plan("influence:rows", "rows of an index next to forward and backward", 45),
    "products": _plan("projection:products", "float32 products of operators in four ways", 20),
    "projection": _plan("projection:rows", "projecting V of each matrix, in three forms", 20),
    "loss": _plan("loss:rows", "the tiled loss against the plain one and Liger's", 45),
    "tiles": _plan("tiles:rows", "MLP and block tiles inside recompute", 45),
    "sums": _plan("long:sums", "a head's gradient added inside its product next to after it", 25),
    "unread": _plan("long:unread", "tiles without results that nothing reads next to all of them", 20),
    "waits": _plan("long:waits", "host time of a forward, trained positions found on the host or the device", 20),
    "prefetch": _plan("long:prefetch", "block inputs copied back one, two or three blocks ahead", 45),
    "pinned": _plan("long:pinned", "pinned memory allocated for all blocks at once next to in pieces", 20),
    "varying": _plan("memory:varying", "reserved memory when lengths vary", 40),
    "compile": _plan("steps:compiled", "compiled blocks next to plain ones"),
    "longest": _plan("longest:rows", "the longest sequence that an 8B shape can be trained on"),
    "watchdog": _plan("heartbeat:rows", "the watchdog next to NCCL", 30),
}


def plan_of(name: str) -> RowPlan:
    """Return the plan of a row. `module:function` is a row as well, with little time: tests name theirs so."""
    return RowPlan(function=name, about="", seconds=2.0) if ":" in name else ROWS[name]


def order(name: str) -> int:
    """Return the place of a row in the table."""
    return list(ROWS).index(name) if name in ROWS else len(ROWS)
