"""Writes config_reference.json: config.json files and what transformers makes of them.

    pip install torch transformers        (made with torch 2.15.0, transformers 5.23.0)
    python3 crates/models/tests/config_reference.py

For each case: the config as a checkpoint would have it, and the names and shapes of the model's parameters, the rotary
frequencies and attention factor of each layer, the window of each layer, scales, caps, ties and special tokens. Models are
built on the meta device, so sizes cost nothing.
"""

import copy
import json
import pathlib
import tempfile

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256, pad_token_id=None)
LLAMA = dict(SIZES, model_type="llama", architectures=["LlamaForCausalLM"])
MISTRAL = dict(SIZES, model_type="mistral", architectures=["MistralForCausalLM"])
QWEN2 = dict(SIZES, model_type="qwen2", architectures=["Qwen2ForCausalLM"])
QWEN3 = dict(SIZES, model_type="qwen3", architectures=["Qwen3ForCausalLM"])
GEMMA2 = dict(SIZES, model_type="gemma2", architectures=["Gemma2ForCausalLM"], num_hidden_layers=5)
GEMMA3 = dict(SIZES, model_type="gemma3_text", architectures=["Gemma3ForCausalLM"], num_hidden_layers=7)
LLAMA3 = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


CASES = {
    "llama plain, old spelling": dict(LLAMA, rope_theta=500000, rope_scaling=None, eos_token_id=[2, 5, 7]),
    "llama plain, new spelling": dict(LLAMA, rope_parameters=dict(rope_type="default", rope_theta=250000.0)),
    "llama absent keys": without(LLAMA, "num_key_value_heads", "max_position_embeddings"),
    "llama null keys": dict(LLAMA, num_key_value_heads=None, head_dim=None, eos_token_id=None, bos_token_id=None),
    "llama biases": dict(LLAMA, attention_bias=True, mlp_bias=True, tie_word_embeddings=True),
    "llama one key head, wide heads": dict(LLAMA, num_key_value_heads=1, head_dim=64, rms_norm_eps=1e-5),
    "llama linear, type": dict(LLAMA, rope_scaling=dict(type="linear", factor=2.5)),
    "llama3": dict(LLAMA, head_dim=64, rope_theta=500000.0, rope_scaling=dict(LLAMA3, rope_type="llama3")),
    "llama3, new spelling": dict(LLAMA, head_dim=128, max_position_embeddings=131072,
                                 rope_parameters=dict(LLAMA3, factor=32.0, original_max_position_embeddings=8192,
                                                      rope_type="llama3", rope_theta=500000.0)),
    "llama3, small theta": dict(LLAMA, head_dim=16, rope_scaling=dict(LLAMA3, rope_type="llama3")),
    "mistral default window": MISTRAL,
    "mistral window": dict(MISTRAL, sliding_window=16, head_dim=16),
    "mistral no window": dict(MISTRAL, sliding_window=None, rope_theta=1000000.0),
    "mistral absent kv heads": dict(without(MISTRAL, "num_key_value_heads"), num_attention_heads=16),
    "mistral yarn": dict(MISTRAL, head_dim=128, rope_theta=1000000.0, rope_scaling=YARN),
    "qwen2": QWEN2,
    "qwen2 absent kv heads": dict(without(QWEN2, "num_key_value_heads"), num_attention_heads=32, hidden_size=64),
    "qwen2 window from layer 1": dict(QWEN2, use_sliding_window=True, sliding_window=8, max_window_layers=1),
    "qwen2 window, default start": dict(QWEN2, use_sliding_window=True, sliding_window=8, num_hidden_layers=30),
    "qwen2 layer types": dict(QWEN2, use_sliding_window=True, sliding_window=8,
                              layer_types=["sliding_attention", "full_attention"]),
    "qwen2 window switched off": dict(QWEN2, use_sliding_window=False, sliding_window=8, max_window_layers=1),
    "qwen2 yarn": dict(QWEN2, head_dim=64, rope_scaling=YARN, tie_word_embeddings=True),
    "qwen2 yarn, mscale": dict(QWEN2, head_dim=64, rope_scaling=dict(YARN, mscale=0.707, mscale_all_dim=1.5)),
    "qwen2 yarn, attention factor": dict(QWEN2, head_dim=64, rope_scaling=dict(YARN, attention_factor=0.75)),
    "qwen2 yarn, betas, not truncated": dict(QWEN2, head_dim=64, max_position_embeddings=32768,
                                             rope_scaling=dict(YARN, original_max_position_embeddings=4096, beta_fast=20,
                                                               beta_slow=2, truncate=False)),
    "qwen2 yarn, null factor": dict(QWEN2, head_dim=32, rope_scaling=dict(YARN, factor=None)),
    "qwen2 yarn, empty ramp": dict(QWEN2, head_dim=32, rope_scaling=dict(YARN, original_max_position_embeddings=4)),
    "qwen2 yarn, whole ramp": dict(QWEN2, head_dim=128, max_position_embeddings=32768, rope_theta=1000000.0,
                                   rope_scaling=dict(YARN, original_max_position_embeddings=32768)),
    "qwen2 yarn, step": dict(QWEN2, head_dim=64, rope_scaling=dict(YARN, original_max_position_embeddings=4096,
                                                                   beta_fast=4, beta_slow=4, truncate=False)),
    "qwen3": QWEN3,
    "qwen3 biases, tied": dict(QWEN3, head_dim=16, attention_bias=True, tie_word_embeddings=True),
    "gemma2": GEMMA2,
    "gemma2 other scalars": dict(GEMMA2, head_dim=16, query_pre_attn_scalar=24, attn_logit_softcapping=None,
                                 final_logit_softcapping=20.0, sliding_window=8, attention_bias=True),
    "gemma3": GEMMA3,
    "gemma3 old spelling": dict(GEMMA3, head_dim=16, query_pre_attn_scalar=20, rope_theta=500000.0,
                                rope_local_base_freq=20000.0, rope_scaling=dict(rope_type="linear", factor=8.0),
                                sliding_window=16, sliding_window_pattern=3),
    "gemma3 new spelling": dict(GEMMA3, head_dim=16, sliding_window=16, num_hidden_layers=3,
                                layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                                rope_parameters=dict(
                                    full_attention=dict(rope_type="linear", factor=4.0, rope_theta=300000.0),
                                    sliding_attention=dict(rope_type="default", rope_theta=30000.0))),
    "gemma3 absent special tokens": without(GEMMA3, "pad_token_id"),
    "gemma3 caps": dict(GEMMA3, final_logit_softcapping=12.5, attention_bias=True, tie_word_embeddings=False),
}


def rotary(model, layer_type):
    """Frequencies and attention factor that layers of this type use."""
    module = model.model.rotary_emb
    if hasattr(module, "inv_freq"):
        return module.inv_freq, module.attention_scaling
    return getattr(module, f"{layer_type}_inv_freq"), getattr(module, f"{layer_type}_attention_scaling")


def expectation(config):
    with tempfile.TemporaryDirectory() as folder:
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config))
        read = AutoConfig.from_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(read)
    # Rotary buffers made on the meta device have no values: make that module again, on the CPU.
    model.model.rotary_emb = type(model.model.rotary_emb)(read)
    kinds = getattr(read, "layer_types", None) or ["full_attention"] * read.num_hidden_layers
    everywhere = read.sliding_window if read.model_type == "mistral" else None
    attention = model.model.layers[0].self_attn
    tables = {kind: rotary(model, kind) for kind in set(kinds)}
    return {
        "tensors": {name: list(parameter.shape) for name, parameter in model.named_parameters()},
        "windows": [read.sliding_window if kind == "sliding_attention" else everywhere for kind in kinds],
        "layer_types": kinds,
        "inv_freq": {kind: [float(value) for value in table[0]] for kind, table in tables.items()},
        "attention_factor": {kind: float(table[1]) for kind, table in tables.items()},
        "attention_scale": attention.scaling,
        "tied": bool(read.tie_word_embeddings),
        "eos": read.eos_token_id,
        "bos": read.bos_token_id,
        "pad": read.pad_token_id,
        "norm_eps": read.rms_norm_eps,
        "max_position_embeddings": read.max_position_embeddings,
        "final_softcap": getattr(read, "final_logit_softcapping", None),
        "attention_softcap": getattr(read, "attn_logit_softcapping", None) if read.model_type == "gemma2" else None,
    }


def cosines_and_sines():
    """Tables of one scaled model at a few positions, the last one far out."""
    config = CASES["mistral yarn"]
    # transformers writes defaults into the dictionaries it is given.
    read = AutoConfig.for_model(**copy.deepcopy(config))
    module = transformers.models.mistral.modeling_mistral.MistralRotaryEmbedding(read)
    positions = [0, 1, 7, 255, 100_000]
    cosines, sines = module(torch.zeros(1), torch.tensor([positions]))
    half = config["head_dim"] // 2
    return {"config": config, "positions": positions,
            "cosines": cosines[0, :, :half].flatten().tolist(), "sines": sines[0, :, :half].flatten().tolist()}


def main():
    torch.set_num_threads(1)
    cases = [{"name": name, "config": config, "expected": expectation(config)} for name, config in CASES.items()]
    reference = {"torch": torch.__version__, "transformers": transformers.__version__, "cases": cases,
                 "tables": cosines_and_sines()}
    path = pathlib.Path(__file__).with_suffix(".json")
    rows = [json.dumps(case) for case in cases]
    reference["cases"] = "@"
    path.write_text(json.dumps(reference).replace('"@"', "[\n" + ",\n".join(rows) + "\n]") + "\n")


main()
