"""The models gpuplan can emulate, by shape: what a step reads and computes follows from these numbers alone.

Shapes are those of the models' published `config.json`. `role` says what a request gets back: a `decoder` streams
tokens, a `classifier` answers once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from gpuplan.errors import unknown_name


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A transformer. Sizes are counts of elements; weights and KV cache take `bytes_per_element` each."""

    name: str
    role: Literal["decoder", "classifier"]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    gated_ffn: bool
    vocabulary: int
    context_tokens_max: int
    bytes_per_element: float = 2
    kv_bytes_per_element: float = 2

    @property
    def head_size(self) -> int:
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linear operators: QKV, attention output, FFN."""
        head = self.hidden // self.heads
        attention = self.hidden * (self.heads + 2 * self.kv_heads) * head + self.hidden * self.hidden
        return attention + self.hidden * self.ffn * (3 if self.gated_ffn else 2)

    @property
    def weights_bytes(self) -> int:
        """Layers, embedding and (for decoders) an output head of the same size."""
        tables = self.vocabulary * self.hidden * (2 if self.role == "decoder" else 1)
        return int((self.layers * self.layer_parameters + tables) * self.bytes_per_element)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of every layer for one token; zero for a model that keeps none."""
        if self.role != "decoder":
            return 0
        return int(2 * self.layers * self.kv_heads * self.head_size * self.kv_bytes_per_element)


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("llama-2-7b", "decoder", 32, 4096, 32, 32, 11008, True, 32000, 4096),
        ModelShape("llama-2-13b", "decoder", 40, 5120, 40, 40, 13824, True, 32000, 4096),
        ModelShape("llama-2-70b", "decoder", 80, 8192, 64, 8, 28672, True, 32000, 4096),
        ModelShape("llama-3-8b", "decoder", 32, 4096, 32, 8, 14336, True, 128256, 8192),
        ModelShape("llama-3-70b", "decoder", 80, 8192, 64, 8, 28672, True, 128256, 8192),
        ModelShape("mistral-7b", "decoder", 32, 4096, 32, 8, 14336, True, 32000, 32768),
        ModelShape("qwen2.5-7b", "decoder", 28, 3584, 28, 4, 18944, True, 152064, 32768),
        ModelShape("bert-base", "classifier", 12, 768, 12, 12, 3072, False, 30522, 512),
        ModelShape("minilm-l6", "classifier", 6, 384, 12, 12, 1536, False, 30522, 512),
        # The built-in classifier is a pooled embedding and a two-layer perceptron; on an emulated card it is timed
        # as the one-layer encoder below, which costs more: a bound, not an estimate.
        ModelShape("sentiment", "classifier", 1, 256, 4, 4, 1024, False, 4096, 2048),
    )
}


def shape(name: str, *, key: str = "models") -> ModelShape:
    """The model shape of that name. Raises InputError with the nearest known names."""
    found = SHAPES.get(name.lower())
    if found is None:
        raise unknown_name("model shape", name, SHAPES, key=key)
    return found
