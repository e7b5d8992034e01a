"""The models gpuplan can emulate, by shape: what a step reads and computes follows from these numbers alone.

Shapes are those of the models' published `config.json`; `from_config` reads any other one. `role` says what a request
gets back: a `decoder` streams tokens, a `classifier` answers once.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from gpuplan.errors import InputError, unknown_name


@dataclass(frozen=True, slots=True)
class ModelShape:
    """A transformer. Sizes are counts of elements; each weight takes `bytes_per_element`.

    With `experts` in every layer, `ffn` is the size of one of them, a router sends each token through
    `experts_per_token`, and all tokens go through one more FFN of size `shared_ffn` where there is one.
    """

    name: str
    role: Literal["decoder", "classifier", "embedder"]
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    ffn: int
    gated_ffn: bool
    vocabulary: int
    context_tokens_max: int
    bytes_per_element: float = 2
    head_size: int | None = None
    """Elements of one attention head where that is not hidden / heads."""
    tied_embeddings: bool = False
    """Whether a decoder's output head is its embedding and takes no memory of its own."""
    kv_bytes_per_element: float = 2
    """Of the KV cache, which servers keep in fp16 beside quantised weights unless told otherwise."""
    experts: int = 0
    """0: dense, which one expert is too."""
    experts_per_token: int = 0
    shared_ffn: int = 0

    @property
    def is_mixture(self) -> bool:
        """Whether tokens choose among experts."""
        return self.experts > 1

    @property
    def head(self) -> int:
        """Elements of one attention head."""
        return self.head_size or self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Weights of one layer's linear operators: QKV, attention output, FFN; of a mixture, router and all experts."""
        return self._layer_parameters(self.experts)

    @property
    def active_layer_parameters(self) -> int:
        """Those of them that one token meets."""
        return self._layer_parameters(self.experts_per_token)

    def _layer_parameters(self, experts: int) -> int:
        attention = self.hidden * self.head * (2 * self.heads + 2 * self.kv_heads)
        ffn = self.hidden * (3 if self.gated_ffn else 2)
        if not self.is_mixture:
            return attention + ffn * self.ffn
        return attention + self.hidden * self.experts + ffn * (experts * self.ffn + self.shared_ffn)

    @property
    def weights_bytes(self) -> int:
        """Layers, embedding and (for decoders, unless tied) an output head of the same size."""
        tables = self.vocabulary * self.hidden * (2 if self.role == "decoder" and not self.tied_embeddings else 1)
        return int((self.layers * self.layer_parameters + tables) * self.bytes_per_element)

    @property
    def kv_bytes_per_token(self) -> int:
        """Keys and values of every layer for one token; zero for a model that keeps none."""
        if self.role != "decoder":
            return 0
        return int(2 * self.layers * self.kv_heads * self.head * self.kv_bytes_per_element)


SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("llama-2-7b", "decoder", 32, 4096, 32, 32, 11008, True, 32000, 4096),
        ModelShape("llama-2-13b", "decoder", 40, 5120, 40, 40, 13824, True, 32000, 4096),
        ModelShape("llama-2-70b", "decoder", 80, 8192, 64, 8, 28672, True, 32000, 4096),
        ModelShape("llama-3-8b", "decoder", 32, 4096, 32, 8, 14336, True, 128256, 8192),
        ModelShape("llama-3-70b", "decoder", 80, 8192, 64, 8, 28672, True, 128256, 8192),
        ModelShape("llama-3.1-8b", "decoder", 32, 4096, 32, 8, 14336, True, 128256, 131072),
        ModelShape("llama-3.1-70b", "decoder", 80, 8192, 64, 8, 28672, True, 128256, 131072),
        ModelShape("codellama-34b", "decoder", 48, 8192, 64, 8, 22016, True, 32000, 16384),
        ModelShape("mistral-7b", "decoder", 32, 4096, 32, 8, 14336, True, 32000, 32768),
        ModelShape("mistral-nemo", "decoder", 40, 5120, 32, 8, 14336, True, 131072, 128000, head_size=128),
        ModelShape("yi-34b", "decoder", 60, 7168, 56, 8, 20480, True, 64000, 4096),
        ModelShape("qwen2.5-7b", "decoder", 28, 3584, 28, 4, 18944, True, 152064, 32768),
        ModelShape("qwen2.5-72b", "decoder", 80, 8192, 64, 8, 29568, True, 152064, 32768),
        ModelShape("qwen3-14b", "decoder", 40, 5120, 40, 8, 17408, True, 151936, 40960),
        ModelShape(
            "mixtral-8x7b", "decoder", 32, 4096, 32, 8, 14336, True, 32000, 32768, experts=8, experts_per_token=2
        ),
        ModelShape(
            "mixtral-8x22b", "decoder", 56, 6144, 48, 8, 16384, True, 32768, 65536, experts=8, experts_per_token=2
        ),
        ModelShape(
            "qwen3-30b-a3b",
            "decoder",
            48,
            2048,
            32,
            4,
            768,
            True,
            151936,
            40960,
            2,
            128,
            experts=128,
            experts_per_token=8,
        ),
        ModelShape("internlm-20b", "decoder", 60, 5120, 40, 40, 13824, True, 103168, 4096),
        ModelShape("phi-2", "decoder", 32, 2560, 32, 32, 10240, False, 51200, 2048),
        ModelShape("bert-base", "classifier", 12, 768, 12, 12, 3072, False, 30522, 512),
        ModelShape("minilm-l6", "classifier", 6, 384, 12, 12, 1536, False, 30522, 512),
        # The built-in classifier is a pooled embedding and a two-layer perceptron; on an emulated card it is timed
        # as the one-layer encoder below, which costs more: a bound, not an estimate.
        ModelShape("sentiment", "classifier", 1, 256, 4, 4, 1024, False, 4096, 2048),
        # The built-in decoder is built to these very sizes, in fp32.
        ModelShape(
            "tiny-chat", "decoder", 4, 640, 10, 2, 1280, True, 260, 2048, bytes_per_element=4, kv_bytes_per_element=4
        ),
        ModelShape("embed", "embedder", 3, 256, 4, 4, 1024, False, 8192, 512, bytes_per_element=4),
    )
}


def shape(name: str, *, key: str = "models") -> ModelShape:
    """The model shape of that name. Raises InputError with the nearest known names."""
    found = SHAPES.get(name.lower())
    if found is None:
        raise unknown_name("model shape", name, SHAPES, key=key)
    return found


# --- Hugging Face's config.json -----------------------------------------------------------------------------------

# What families call the same number, in the order in which it is looked for.
_NAMES = {
    "layers": ("num_hidden_layers", "n_layer", "n_layers"),
    "hidden": ("hidden_size", "n_embd", "dim"),
    "heads": ("num_attention_heads", "n_head", "n_heads"),
    "ffn": ("intermediate_size", "n_inner", "hidden_dim"),
    "vocabulary": ("vocab_size",),
    "context_tokens_max": ("max_position_embeddings", "n_positions", "n_ctx"),
}
_CLASSIFIER_FAMILIES = {"bert", "distilbert", "roberta", "xlm-roberta", "camembert", "electra", "deberta-v2", "mpnet"}
# What a family's configurations may leave unsaid: the output head is tied, the FFN gated though with a GELU.
_TIED_FAMILIES = {"gpt2", "gemma", "gemma2"}
_GATED_FAMILIES = {"gemma", "gemma2"}
# Mixtures of experts. Qwen's and DeepSeek's keep the size of a dense layer in `intermediate_size`.
_EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts")
_EXPERTS_PER_TOKEN = ("num_experts_per_tok", "experts_per_token")
_EXPERT_FFN = ("moe_intermediate_size",)
_SHARED_FFN = ("shared_expert_intermediate_size", "shared_intermediate_size")
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts")


def from_config(config: Mapping[str, Any], *, key: str = "config.json") -> ModelShape:
    """The shape in a Hugging Face `config.json`, with 16-bit weights whatever the file's own type.

    Raises InputError for a key that is missing or no number, for latent attention (DeepSeek's MLA), whose KV cache has
    no heads, and for mixtures with dense layers among the others.
    """
    if config.get("kv_lora_rank"):
        raise InputError("latent attention (kv_lora_rank) is not supported", key=key, allowed="attention with KV heads")
    family = str(config.get("model_type", ""))
    names = " ".join(map(str, config.get("architectures") or ()))
    answers_once = family in _CLASSIFIER_FAMILIES if not names else "CausalLM" not in names and "LMHead" not in names
    found = {field: _number(config, alternatives, key) for field, alternatives in _NAMES.items() if field != "ffn"}
    heads, hidden = found["heads"], found["hidden"]
    kv_heads = _number(config, ("num_key_value_heads",), key, default=heads)
    # GPT-2 and the first phi write null for the usual four times.
    ffn_unsaid = 4 * hidden if "n_inner" in config else None
    activation = str(config.get("hidden_act", config.get("activation_function", "")))
    head_size = _number(config, ("head_dim",), key, default=hidden // heads)
    ffn, mixture = _NAMES["ffn"], _mixture(config, key)
    if mixture:
        ffn = (*_EXPERT_FFN, *ffn)
    return ModelShape(
        name=str(config.get("_name_or_path") or family or "own").rstrip("/").split("/")[-1],
        role="classifier" if answers_once else "decoder",
        layers=found["layers"],
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        ffn=_number(config, ffn, key, default=ffn_unsaid),
        gated_ffn=family in _GATED_FAMILIES or activation in ("silu", "swish"),
        vocabulary=found["vocabulary"],
        context_tokens_max=found["context_tokens_max"],
        head_size=None if head_size * heads == hidden else head_size,
        tied_embeddings=bool(config.get("tie_word_embeddings", family in _TIED_FAMILIES)),
        **mixture,
    )


def _mixture(config: Mapping[str, Any], key: str) -> dict[str, int]:
    """The fields that a mixture has over a dense model; none for a dense one."""
    if not any(config.get(name) for name in _EXPERTS):
        return {}
    dense = config.get("mlp_only_layers") or config.get("first_k_dense_replace")
    if dense or any((config.get(name) or 1) != 1 for name in ("decoder_sparse_step", "moe_layer_freq")):
        raise InputError(
            "a mixture with dense layers among the others is not supported", key=key, allowed="experts in every layer"
        )
    experts = _number(config, _EXPERTS, key)
    shared_ffn = _number(config, _SHARED_FFN, key, default=0)
    if not shared_ffn and (shared := _number(config, _SHARED_EXPERTS, key, default=0)):
        shared_ffn = shared * _number(config, _EXPERT_FFN, key)
    per_token = _number(config, _EXPERTS_PER_TOKEN, key)
    if per_token > experts:
        raise InputError(f"{per_token} experts a token are more than there are", key=key, allowed=f"1 to {experts}")
    return {"experts": experts, "experts_per_token": per_token, "shared_ffn": shared_ffn}


def _number(config: Mapping[str, Any], names: tuple[str, ...], key: str, *, default: int | None = None) -> int:
    name = next((name for name in names if config.get(name) is not None), None)
    if name is None:
        if default is None:
            raise InputError(f"{names[0]} is missing", key=key, allowed="a Hugging Face config.json of a transformer")
        return default
    value = config[name]
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise InputError(f"{name} is no count", key=key, value=value, allowed="a whole number above zero")
    return value
