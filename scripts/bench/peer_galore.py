#!/usr/bin/env python3
"""What galore-torch or torch's AdamW takes for a step of training a whole model: prints one JSON line.

    peer_galore.py MODEL_DIR [--method galore|full] [--rank 0] [--gap 200] [--device cpu] [--batch 8] [--seq 256]
                   [--threads 2] [--warmup 2] [--steps 5]

MODEL_DIR needs nothing but a config.json: weights and tokens are random. f32, sdpa attention, no clipping, no decay. A step
is forward, backward, update, zero. Rank 0 is a quarter of the hidden size. The SVDs of galore-torch fall into the first step
and are timed apart, as `refresh_all_s`; warm-up steps are not counted. `gradient_mib` is all gradients together, which is
what exists after a backward pass. `optimizer_mib` counts values; `optimizer_held_mib` the memory behind them, which is more
where a basis is a view of all singular vectors.
"""
import argparse
import importlib.util
import json
import os
import resource
import statistics
import sys
import time
import types

MIB = 2**20


def peak_rss_gib():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def import_galore():
    """galore-torch imports bitsandbytes, which only its 8-bit optimiser uses: an empty module will do for the others."""
    if importlib.util.find_spec("bitsandbytes") is None:
        for name in ("bitsandbytes", "bitsandbytes.optim", "bitsandbytes.optim.optimizer"):
            sys.modules[name] = types.ModuleType(name)
        sys.modules["bitsandbytes.optim.optimizer"].Optimizer2State = object
    import galore_torch
    from galore_torch.galore_projector import GaLoreProjector

    return galore_torch.GaLoreAdamW, GaLoreProjector


def timed(function, synchronize, seconds):
    def wrapper(*args, **kwargs):
        synchronize()
        start = time.perf_counter()
        result = function(*args, **kwargs)
        synchronize()
        seconds.append(time.perf_counter() - start)
        return result

    return wrapper


def make_optimizer(args, model, rank, synchronize):
    """The optimiser, and the list that gets the seconds of each SVD."""
    import torch

    svd = []
    if args.method == "full":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.0), svd
    optimizer, projector = import_galore()
    projector.get_orthogonal_matrix = timed(projector.get_orthogonal_matrix, synchronize, svd)
    low = [param for name, param in model.named_parameters() if name.endswith("_proj.weight")]
    known = {id(param) for param in low}
    plain = [param for param in model.parameters() if id(param) not in known]
    managed = {"params": low, "rank": rank, "update_proj_gap": args.gap, "scale": 0.25, "proj_type": "std"}
    return optimizer([{"params": plain}, managed], lr=1e-4, no_deprecation_warning=True), svd


def state_bytes(optimizer):
    """Bytes of the values in the optimiser's state, and of the memory that they keep alive."""
    import torch

    values, storages = 0, {}
    for state in optimizer.state.values():
        parts = list(state.values())
        basis = getattr(state.get("projector"), "ortho_matrix", None)
        parts += basis if isinstance(basis, list) else [basis]
        for part in parts:
            if torch.is_tensor(part):
                values += part.numel() * part.element_size()
                storage = part.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return values, sum(storages.values())


def run(args):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    is_cuda = args.device.startswith("cuda") and torch.cuda.is_available()
    device = torch.device(args.device if is_cuda else "cpu")
    synchronize = (lambda: torch.cuda.synchronize(device)) if is_cuda else (lambda: None)
    import_rss = peak_rss_gib()
    config = AutoConfig.from_pretrained(args.model)
    config.use_cache = False
    rank = args.rank or max(config.hidden_size // 4, 1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").to(device).train()
    optimizer, svd = make_optimizer(args, model, rank, synchronize)
    tokens = torch.randint(3, config.vocab_size, (4, args.batch, args.seq), device=device)
    seconds = {"step": [], "forward": [], "backward": [], "optimizer": []}
    gradient_bytes = 0
    for step in range(args.warmup + args.steps):
        ids = tokens[step % 4]
        synchronize()
        start = time.perf_counter()
        loss = model(input_ids=ids, labels=ids).loss
        synchronize()
        after_forward = time.perf_counter()
        loss.backward()
        synchronize()
        after_backward = time.perf_counter()
        if step == 0:
            gradient_bytes = sum(p.grad.numel() * p.grad.element_size() for p in model.parameters() if p.grad is not None)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize()
        end = time.perf_counter()
        spent = (end - start, after_forward - start, after_backward - after_forward, end - after_backward)
        for times, value in zip(seconds.values(), spent):
            times.append(value)
    steady = {name: times[args.warmup:] for name, times in seconds.items()}
    median = statistics.median(steady["step"])
    values, held = state_bytes(optimizer)
    return {
        "program": "galore-torch GaLoreAdamW, std side" if args.method == "galore" else "torch full AdamW",
        "method": args.method, "rank": rank if args.method == "galore" else None,
        "batch": args.batch, "seq": args.seq, "threads": args.threads, "steps": args.steps,
        "s_per_step": round(median, 6), "s_min": round(min(steady["step"]), 6), "s_max": round(max(steady["step"]), 6),
        "tokens_per_s": round(args.batch * args.seq / median, 1),
        **{f"{part}_s": round(statistics.median(steady[part]), 6) for part in ("forward", "backward", "optimizer")},
        "peak_rss_gib": round(peak_rss_gib(), 3), "import_rss_gib": round(import_rss, 3),
        **({"peak_device_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)} if is_cuda else {}),
        "gradient_mib": round(gradient_bytes / MIB, 3), "optimizer_mib": round(values / MIB, 3),
        "optimizer_held_mib": round(held / MIB, 3), "refresh_all_s": round(sum(svd), 4), "refresh_count": len(svd),
        "loss_last": round(loss.item(), 4), "load_1min": round(os.getloadavg()[0], 2),
        "device": f"{device} ({torch.cuda.get_device_name(device)})" if is_cuda else f"cpu ({args.threads} threads)",
        "version": versions(args.method),
    }


def versions(method):
    from importlib.metadata import version

    names = ["torch", "transformers"] + (["galore-torch"] if method == "galore" else [])
    return " ".join(f"{name} {version(name)}" for name in names)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--method", choices=["galore", "full"], default="galore")
    parser.add_argument("--device", default="cpu", help="cuda or cuda:N; without such a device in torch the CPU is used")
    defaults = {"rank": 0, "gap": 200, "batch": 8, "seq": 256, "threads": 2, "warmup": 2, "steps": 5}
    for name, default in defaults.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.warmup < 1 or args.warmup >= args.gap:
        parser.error("--warmup must be at least 1 and less than --gap: the SVDs fall into the first step")
    print(json.dumps(run(args)), flush=True)


if __name__ == "__main__":
    main()
