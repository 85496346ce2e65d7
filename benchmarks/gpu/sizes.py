"""The shapes of every row: those of 8B models for a card, and toys that run the same code on a CPU within seconds."""

from dataclasses import dataclass, field
from typing import Any

VOCABULARIES = {"llama": 128256, "gemma": 262144}  # Qwen3's 151936 lies between them


@dataclass(frozen=True, kw_only=True)
class Sizes:
    # one model: Llama-3.1-8B's shape
    hidden: int = 4096
    inner: int = 14336
    heads: int = 32
    key_heads: int = 8
    vocabularies: dict[str, int] = field(default_factory=lambda: dict(VOCABULARIES))
    layers: int = 32  # of the whole model
    few: int = 4  # layers where the cost per layer is what is measured
    # attention
    head_width: int = 128
    documents: tuple[int, ...] = (700, 1, 2000, 129, 1266)  # shorter and longer than the window, one of one token
    window: int = 512
    attention_tokens: int = 16384
    # offload
    bitwise_tokens: int = 8192
    offload_tokens: int = 131072
    offload_document: int = 8192  # short ones: less arithmetic per byte that is copied than in one long document
    # memory
    memory_tokens: int = 8192
    varying: tuple[int, int] = (1024, 16384)  # the shortest and the longest sequence
    varying_steps: int = 40
    # steps
    lora_tokens: int = 4096
    osft_tokens: tuple[int, ...] = (4096, 16384)
    # loss and tiles
    loss_tokens: int = 8192
    loss_tiles: tuple[int, ...] = (512, 2048, 4096)
    tile_tokens: int = 32768
    tile_document: int = 4096
    # one mixture layer: Qwen3-30B-A3B's shape
    experts: int = 128
    experts_chosen: int = 8
    experts_hidden: int = 2048
    experts_inner: int = 768
    experts_tokens: int = 8192
    # the longest sequence
    longest_start: int = 131072
    longest_layers: int = 3
    longest_document: int = 8192
    longest_trained: int = 4096
    longest_most: int = 1 << 23
    longest_step: int = 16384  # the limit is searched to within so many tokens
    longest_pretended: int = 1 << 62  # what fits in a run of toy sizes
    # an index: Llama-3.2-1B's shape
    index_layers: int = 16
    index_shape: dict[str, int] = field(
        default_factory=lambda: {"hidden_size": 2048, "intermediate_size": 8192, "head_dim": 64}
    )
    index_tokens: int = 16384
    index_document: int = 512
    # how often
    rounds: int = 10

    @property
    def matrices(self) -> dict[str, tuple[int, int]]:
        """Outputs × inputs of the linears of one block, by name."""
        keys = self.hidden * self.key_heads // self.heads
        return {
            "q and o": (self.hidden, self.hidden),
            "k and v": (keys, self.hidden),
            "gate and up": (self.inner, self.hidden),
            "down": (self.hidden, self.inner),
        }

    def config(self, layers: int, **different: Any) -> Any:
        """A Llama configuration of these sizes."""
        from transformers import LlamaConfig

        settings: dict[str, Any] = {
            "vocab_size": self.vocabularies["llama"],
            "hidden_size": self.hidden,
            "intermediate_size": self.inner,
            "num_hidden_layers": layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_heads,
            "max_position_embeddings": 131072,
            "rope_theta": 500000.0,
            "rms_norm_eps": 1e-5,
            "tie_word_embeddings": False,
            "use_cache": False,
        }
        return LlamaConfig(**(settings | different))


CARD = Sizes()
TOY = Sizes(
    hidden=128,
    inner=256,
    heads=4,
    key_heads=2,
    vocabularies={"llama": 512, "gemma": 1024},
    layers=3,
    few=3,
    head_width=16,
    documents=(5, 1, 70, 13, 1, 30),
    window=8,
    attention_tokens=128,
    bitwise_tokens=64,
    offload_tokens=256,
    offload_document=64,
    memory_tokens=263,
    varying=(16, 64),
    varying_steps=4,
    lora_tokens=64,
    osft_tokens=(64, 128),
    loss_tokens=128,
    loss_tiles=(16, 32, 64),
    tile_tokens=256,
    tile_document=64,
    experts=4,
    experts_chosen=2,
    experts_hidden=64,
    experts_inner=32,
    experts_tokens=64,
    longest_start=64,
    longest_document=32,
    longest_trained=16,
    longest_most=256,
    longest_step=32,
    longest_pretended=160,
    index_layers=2,
    index_shape={},
    index_tokens=64,
    index_document=16,
    rounds=1,
)
