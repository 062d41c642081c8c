#!/usr/bin/env python3
"""What torch, transformers, peft and galore-torch take for a training step on a GPU: prints one JSON line.

    peer_gpu.py MODEL_DIR [--method lora|qlora|full|galore] [--variant eager|compiled|liger] [--workload NAME]
                [--batch 4] [--seq 2048] [--dtype bf16|f32] [--checkpointing] [--device cuda] [--warmup 3] [--steps 10]

MODEL_DIR needs nothing but a config.json: weights and tokens are random and made on the device. The work is that of
`lowrank-bench step --random`: adapters of rank 16 on all linear layers in the type of the model, AdamW without decay, no
clipping, every position a target; GaLore with rank hidden / 4 and a gap of 200, whose SVDs fall into the first warm-up step
and are timed apart. A step is forward, backward, update, zero.

Model FLOPs are counted as in crates/trainer/src/bin/lowrank-bench/flops.rs: 6 a matrix weight and token where it is trained,
4 where it is frozen, 6 a number of an adapter; embeddings are looked up, a tied head is multiplied; causal scores count
half; nothing counts twice for being computed again.

Needs torch, transformers, peft; qlora bitsandbytes, galore galore-torch, --variant liger liger-kernel. What is missing, or
does not fit on the card, is said in a line with `error` instead of numbers, and the exit status is 0.
"""
import argparse
import importlib.util
import json
import statistics
import sys
import time
import types

GIB = 2**30
RANK = 16
LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def dtype_of(args):
    import torch

    return {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[args.dtype]


def make_base(args):
    """The model with random weights, made where they stay."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if args.variant == "liger":
        from liger_kernel.transformers import apply_liger_kernel_to_llama

        apply_liger_kernel_to_llama()
    config = AutoConfig.from_pretrained(args.model)
    config.use_cache = False
    config.max_position_embeddings = max(config.max_position_embeddings, args.seq)
    with torch.device("meta" if args.method == "qlora" else args.device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype_of(args), attn_implementation="sdpa")
    return model, config


def fill_quantised(model, args):
    """Puts NF4 layers with double quantisation in place of the linear ones; every other parameter becomes random."""
    import bitsandbytes
    import torch

    dtype = dtype_of(args)
    for name, module in list(model.named_modules()):
        if not name.endswith(LINEAR):
            continue
        parent, leaf = name.rsplit(".", 1)
        weight = torch.randn(module.out_features, module.in_features, dtype=dtype, device=args.device) * 0.02
        quantised = bitsandbytes.nn.Linear4bit(
            module.in_features, module.out_features, bias=False, compute_dtype=dtype, quant_type="nf4",
            compress_statistics=True)
        quantised.weight = bitsandbytes.nn.Params4bit(
            weight.cpu(), requires_grad=False, quant_type="nf4", compress_statistics=True)
        setattr(model.get_submodule(parent), leaf, quantised.to(args.device))
    for module in model.modules():
        for name, param in list(module.named_parameters(recurse=False)):
            if param.is_meta:
                value = torch.empty(param.shape, dtype=param.dtype, device=args.device)
                value.fill_(1.0) if value.dim() == 1 else value.normal_(0.0, 0.02)
                setattr(module, name, torch.nn.Parameter(value, requires_grad=False))
    model.tie_weights()
    rotary = model.model.rotary_emb
    model.model.rotary_emb = type(rotary)(model.config).to(args.device)
    model.is_loaded_in_4bit = True


def add_adapter(model, args):
    from peft import LoraConfig, get_peft_model

    if args.checkpointing:
        model.enable_input_require_grads()
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, lora_dropout=0.0, target_modules=list(LINEAR), task_type="CAUSAL_LM")
    model = get_peft_model(model, config, autocast_adapter_dtype=False)
    for param in model.parameters():
        if param.requires_grad:
            param.data = param.data.to(dtype_of(args))
    return model


def import_galore():
    """galore-torch imports bitsandbytes, which only its 8-bit optimiser uses: an empty module will do for the others."""
    if importlib.util.find_spec("bitsandbytes") is None:
        for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object
    import galore_torch

    return galore_torch.GaLoreAdamW


def make_optimizer(args, model, config):
    import torch

    trained = [param for param in model.parameters() if param.requires_grad]
    if args.method != "galore":
        return torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0, fused=args.device.startswith("cuda"))
    low = [param for name, param in model.named_parameters() if name.endswith("_proj.weight")]
    known = {id(param) for param in low}
    managed = {"params": low, "rank": config.hidden_size // 4, "update_proj_gap": 200, "scale": 0.25, "proj_type": "std"}
    plain = {"params": [param for param in trained if id(param) not in known]}
    return import_galore()([plain, managed], lr=1e-4, no_deprecation_warning=True)


def flops_per_token(args, config, matrix_weights, adapter_numbers):
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    scores = 12 * config.num_hidden_layers * config.num_attention_heads * head_dim * args.seq / 2
    if args.method in ("full", "galore"):
        return 6 * matrix_weights + scores
    return 4 * matrix_weights + 6 * adapter_numbers + scores


def count_matrix_weights(model, config):
    """Before layers are quantised, which changes the number of their parameters."""
    weights = sum(p.numel() for name, p in model.named_parameters() if p.dim() == 2 and "embed_tokens" not in name)
    return weights + (config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0)


def run(args):
    import torch

    torch.manual_seed(0)
    is_cuda = args.device.startswith("cuda")
    synchronize = torch.cuda.synchronize if is_cuda else (lambda: None)
    model, config = make_base(args)
    matrix_weights = count_matrix_weights(model, config)
    if args.method == "qlora":
        fill_quantised(model, args)
    model.train()
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    adapter_numbers = 0
    if args.method in ("lora", "qlora"):
        model = add_adapter(model, args)
        adapter_numbers = sum(param.numel() for param in model.parameters() if param.requires_grad)
    optimizer = make_optimizer(args, model, config)
    stepped = torch.compile(model) if args.variant == "compiled" else model
    tokens = torch.randint(3, config.vocab_size, (4, args.batch, args.seq), device=args.device)
    seconds = []
    for step in range(args.warmup + args.steps):
        if step == args.warmup and is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        synchronize()
        start = time.perf_counter()
        ids = tokens[step % 4]
        loss = stepped(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        seconds.append(time.perf_counter() - start)
    steady = seconds[args.warmup:]
    median, count = statistics.median(steady), args.batch * args.seq
    flops = flops_per_token(args, config, matrix_weights, adapter_numbers) * count
    return {
        "s_per_step": median, "s_min": min(steady), "s_max": max(steady), "tokens_per_s": count / median,
        "model_tflops": flops / median / 1e12, "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        # the pools of Burn count as what torch reserves
        "peak_device_gib": torch.cuda.max_memory_reserved() / GIB if is_cuda else None,
        "peak_in_use_gib": torch.cuda.max_memory_allocated() / GIB if is_cuda else None,
        "first_step_s": seconds[0], "loss_last": round(loss.item(), 4),
        "device": torch.cuda.get_device_name() if is_cuda else "cpu",
    }


def versions():
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for name in ("torch", "transformers", "peft", "bitsandbytes", "liger-kernel", "galore-torch"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            pass
    return ", ".join(found)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", choices=["lora", "qlora", "full", "galore"], default="lora")
    parser.add_argument("--variant", choices=["eager", "compiled", "liger"], default="eager")
    parser.add_argument("--workload", help="name of the work in the tables, the same as ours")
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    parser.add_argument("--device", default="cuda")
    for name, default in (("batch", 4), ("seq", 2048), ("warmup", 3), ("steps", 10)):
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.warmup < 1 or args.steps < 1:
        parser.error("--warmup and --steps must be at least 1: the first step compiles and has the SVDs")
    names = {"lora": "peft", "qlora": "peft + bitsandbytes", "full": "torch AdamW", "galore": "galore-torch"}
    recompute = ", checkpointing" if args.checkpointing else ""
    line = {"bench": "step", "program": f"{names[args.method]}, {args.variant}{recompute}", "workload": args.workload,
            "batch": args.batch, "seq": args.seq, "dtype": args.dtype}
    try:
        line.update(run(args))
    except Exception as error:  # one line each, whatever a library does
        line["error"] = f"{type(error).__name__}: {str(error).strip()[:200]}"
    print(json.dumps({**line, "version": versions()}), flush=True)


if __name__ == "__main__":
    main()
