#!/usr/bin/env python3
"""What peft takes for a training step on the CPU: prints one JSON line.

    peer_cpu.py MODEL_DIR [--method full|lora|dora|vera|randlora] [--dtype f32|bf16] [--checkpointing] [--batch 2] [--seq 256] [--threads 2]
                          [--warmup 2] [--steps 8]

Full AdamW, or an adapter of rank 16 on all linear layers, sdpa attention, torch's AdamW, random tokens. A step is forward, backward,
update, zero. `import_rss_gib` is the part of the peak that was there once the libraries were loaded, before the model.
"""
import argparse
import json
import os
import resource
import statistics
import time


def peak_rss_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def load(args):
    import torch
    from peft import LoraConfig, RandLoraConfig, VeraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, logging

    logging.disable_progress_bar()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    import_rss = peak_rss_gib()
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=dtype, attn_implementation="sdpa").train()
    if args.checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    if args.method != "full":
        common = {"r": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
        config = {
            "lora": lambda: LoraConfig(lora_alpha=32, **common),
            "dora": lambda: LoraConfig(lora_alpha=32, use_dora=True, **common),
            "vera": lambda: VeraConfig(**common),
            "randlora": lambda: RandLoraConfig(randlora_alpha=320, **common),
        }[args.method]()
        model = get_peft_model(model, config, autocast_adapter_dtype=False)
    return model, import_rss


def run(args):
    model, import_rss = load(args)
    import torch

    params = [param for param in model.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4)
    tokens = torch.randint(3, model.config.vocab_size, (4, args.batch, args.seq))
    seconds = {"step": [], "forward": [], "backward": [], "optimizer": []}
    for step in range(args.warmup + args.steps):
        ids = tokens[step % 4]
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        after_forward = time.perf_counter()
        loss.backward()
        after_backward = time.perf_counter()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        end = time.perf_counter()
        spent = (end - start, after_forward - start, after_backward - after_forward, end - after_backward)
        for times, value in zip(seconds.values(), spent):
            times.append(value)
    steady = {name: times[args.warmup:] for name, times in seconds.items()}
    median = statistics.median(steady["step"])
    return {
        "program": f"peft {args.method}" + (", checkpointing" if args.checkpointing else ""),
        "dtype": args.dtype, "batch": args.batch, "seq": args.seq, "threads": args.threads, "steps": args.steps,
        "s_per_step": round(median, 3), "s_min": round(min(steady["step"]), 3), "s_max": round(max(steady["step"]), 3),
        "tokens_per_s": round(args.batch * args.seq / median, 1),
        **{f"{part}_s": round(statistics.median(steady[part]), 3) for part in ("forward", "backward", "optimizer")},
        "peak_rss_gib": round(peak_rss_gib(), 2), "import_rss_gib": round(import_rss, 2),
        "trainable": sum(param.numel() for param in params), "loss_last": round(loss.item(), 3),
        "load_1min": round(os.getloadavg()[0], 2), "version": versions(),
    }


def versions():
    from importlib.metadata import version

    return " ".join(f"{name} {version(name)}" for name in ("torch", "transformers", "peft"))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", choices=["full", "lora", "dora", "vera", "randlora"], default="lora")
    parser.add_argument("--dtype", choices=["f32", "bf16"], default="f32")
    parser.add_argument("--checkpointing", action="store_true", help="recompute blocks in the backward pass")
    for name, default in (("batch", 2), ("seq", 256), ("threads", 2), ("warmup", 2), ("steps", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    print(json.dumps(run(parser.parse_args())), flush=True)


if __name__ == "__main__":
    main()
