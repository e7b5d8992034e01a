"""Model shapes: those in the library, and what a Hugging Face config.json says."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gpuplan.errors import InputError
from gpuplan.hardware.shapes import SHAPES, ModelShape, from_config, shape

# As published, without the keys that say nothing of the shape.
LLAMA_3 = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_act": "silu",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "max_position_embeddings": 8192,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "tie_word_embeddings": False,
    "vocab_size": 128256,
}
QWEN_72B = {
    **LLAMA_3,
    "_name_or_path": "Qwen/Qwen2.5-72B-Instruct",
    "architectures": ["Qwen2ForCausalLM"],
    "model_type": "qwen2",
    "hidden_size": 8192,
    "intermediate_size": 29568,
    "max_position_embeddings": 32768,
    "num_attention_heads": 64,
    "num_hidden_layers": 80,
    "vocab_size": 152064,
}
PHI_2 = {
    "_name_or_path": "microsoft/phi-2",
    "architectures": ["PhiForCausalLM"],
    "hidden_act": "gelu_new",
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "max_position_embeddings": 2048,
    "model_type": "phi",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 32,
    "tie_word_embeddings": False,
    "vocab_size": 51200,
}
INTERNLM_20B = {
    "architectures": ["InternLMForCausalLM"],
    "bias": False,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "intermediate_size": 13824,
    "max_position_embeddings": 4096,
    "model_type": "internlm",
    "num_attention_heads": 40,
    "num_hidden_layers": 60,
    "vocab_size": 103168,  # and no num_key_value_heads: as many as heads
}
MIXTRAL = {
    **LLAMA_3,
    "architectures": ["MixtralForCausalLM"],
    "max_position_embeddings": 32768,
    "model_type": "mixtral",
    "num_experts_per_tok": 2,
    "num_local_experts": 8,
    "vocab_size": 32000,
}
QWEN3_30B_A3B = {
    **LLAMA_3,
    "architectures": ["Qwen3MoeForCausalLM"],
    "decoder_sparse_step": 1,
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "mlp_only_layers": [],
    "model_type": "qwen3_moe",
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
}
QWEN2_57B_A14B = {
    **QWEN3_30B_A3B,
    "architectures": ["Qwen2MoeForCausalLM"],
    "head_dim": None,
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "max_position_embeddings": 32768,
    "model_type": "qwen2_moe",
    "moe_intermediate_size": 2560,
    "num_attention_heads": 28,
    "num_experts": 64,
    "num_hidden_layers": 28,
    "shared_expert_intermediate_size": 20480,
}
GPT_OSS_20B = {
    **LLAMA_3,
    "architectures": ["GptOssForCausalLM"],
    "experts_per_token": 4,
    "head_dim": 64,
    "hidden_size": 2880,
    "intermediate_size": 2880,
    "max_position_embeddings": 131072,
    "model_type": "gpt_oss",
    "num_attention_heads": 64,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 24,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "vocab_size": 201088,
}
BERT = {
    "architectures": ["BertForMaskedLM"],
    "hidden_act": "gelu",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "max_position_embeddings": 512,
    "model_type": "bert",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "vocab_size": 30522,
}


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (LLAMA_3, "llama-3-8b"),
        (QWEN_72B, "qwen2.5-72b"),
        (PHI_2, "phi-2"),
        (INTERNLM_20B, "internlm-20b"),
        (MIXTRAL, "mixtral-8x7b"),
        (QWEN3_30B_A3B, "qwen3-30b-a3b"),
        ({**BERT, "tie_word_embeddings": True}, "bert-base"),
        ({**LLAMA_3, "intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768,
          "model_type": "mistral", "architectures": ["MistralForCausalLM"]}, "mistral-7b"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_published_config_gives_the_library_s_shape(config: dict[str, Any], name: str) -> None:
    read = from_config(config)
    ours = shape(name)
    assert replace(read, name=name) == replace(ours, tied_embeddings=read.tied_embeddings)
    assert (read.weights_bytes, read.kv_bytes_per_token) == (ours.weights_bytes, ours.kv_bytes_per_token)


def test_what_a_config_leaves_unsaid_is_its_family_s_default() -> None:
    gpt2 = from_config(
        {
            "architectures": ["GPT2LMHeadModel"],
            "activation_function": "gelu_new",
            "model_type": "gpt2",
            "n_embd": 768,
            "n_head": 12,
            "n_inner": None,
            "n_layer": 12,
            "n_positions": 1024,
            "vocab_size": 50257,
        }
    )
    assert gpt2 == ModelShape("gpt2", "decoder", 12, 768, 12, 12, 3072, False, 50257, 1024, tied_embeddings=True)
    assert gpt2.weights_bytes / 2 == pytest.approx(124e6, rel=0.01), "the output head is the embedding"
    gemma = {**LLAMA_3, "model_type": "gemma", "hidden_act": "gelu_pytorch_tanh", "head_dim": 256}
    del gemma["tie_word_embeddings"]
    read = from_config(gemma)
    assert (read.gated_ffn, read.tied_embeddings, read.head_size, read.head) == (True, True, 256, 256)
    assert read.kv_bytes_per_token == 2 * 32 * 8 * 256 * 2
    assert from_config({**BERT, "architectures": None}).role == "classifier"
    assert from_config({**LLAMA_3, "architectures": ["LlamaForSequenceClassification"]}).role == "classifier"


@pytest.mark.parametrize(
    ("config", "experts", "per_token", "billions"),
    [(QWEN2_57B_A14B, 64, 8, 57.4), (GPT_OSS_20B, 32, 4, 20.9)],
    ids=lambda value: value["model_type"] if isinstance(value, dict) else "",
)
def test_a_mixture_s_config_gives_all_its_weights(
    config: dict[str, Any], experts: int, per_token: int, billions: float
) -> None:
    read = from_config(config)
    assert (read.experts, read.experts_per_token) == (experts, per_token)
    assert read.shared_ffn == config.get("shared_expert_intermediate_size", 0)
    assert read.weights_bytes / 2e9 == pytest.approx(billions, rel=0.005)


def test_shared_experts_are_one_ffn() -> None:
    shared = {"n_routed_experts": 64, "n_shared_experts": 2, "moe_intermediate_size": 1408, "num_experts_per_tok": 6}
    read = from_config({**LLAMA_3, **shared, "first_k_dense_replace": 0})
    assert (read.experts, read.ffn, read.shared_ffn) == (64, 1408, 2816)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": None}, "hidden_size is missing"),
        ({"intermediate_size": None}, "intermediate_size is missing"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers is no count (got 'many')"),
        ({"vocab_size": True}, "vocab_size is no count"),
        ({"num_local_experts": 8}, "num_experts_per_tok is missing"),
        ({"num_experts": 8, "num_experts_per_tok": 9}, "9 experts a token are more than there are"),
        ({"n_routed_experts": 64, "num_experts_per_tok": 6, "first_k_dense_replace": 1}, "a mixture with dense layers"),
        ({"num_experts": 64, "num_experts_per_tok": 6, "decoder_sparse_step": 2}, "a mixture with dense layers"),
        ({"num_experts": 64, "num_experts_per_tok": 6, "mlp_only_layers": [0]}, "a mixture with dense layers"),
        ({"n_routed_experts": 256, "kv_lora_rank": 512}, "latent attention (kv_lora_rank) is not supported"),
    ],
)
def test_a_config_that_says_too_little_names_the_key(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError) as caught:
        from_config({**LLAMA_3, **changes})
    assert str(caught.value).startswith(f"config.json: {said}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "billions"),
    [("qwen2.5-72b", 72.7), ("codellama-34b", 33.7), ("internlm-20b", 20.1), ("phi-2", 2.78), ("llama-3.1-70b", 70.6)],
)
def test_weights_are_as_many_as_the_model_s_card_says(name: str, billions: float) -> None:
    assert SHAPES[name].weights_bytes / 2e9 == pytest.approx(billions, rel=0.01)
