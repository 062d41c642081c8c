#!/usr/bin/env python3
"""Matrix products through torch (cuBLASLt on NVIDIA cards) on the shapes of `lowrank-bench gemm`: JSON lines.

    peer_gemm.py [--device cuda] [--dtype bf16|f16|f32] [--tokens 8192] [--quick]

Layouts are the same: x [t, d_in], W [d_out, d_in], dy [t, d_out]; forward x W^T, dx = dy W, dW = dy^T x. Windows of about
10 ms, median of 15, random values.
"""
import argparse
import json
import statistics
import time

# name, d_in, d_out: the list of crates/trainer/src/bin/lowrank-bench/gemm.rs
SHAPES = [
    ("1B q, o", 2048, 2048), ("1B k, v", 2048, 512), ("1B gate, up", 2048, 8192), ("1B down", 8192, 2048),
    ("1B head", 2048, 128256), ("8B q, o", 4096, 4096), ("8B k, v", 4096, 1024), ("8B gate, up", 4096, 14336),
    ("8B down", 14336, 4096), ("8B head", 4096, 128256),
]
QUICK_SHAPES = [("quick", 32, 64)]


def timed(call, synchronize, windows, window_seconds):
    def window(calls):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        return (time.perf_counter() - start) / calls

    for _ in range(3):
        one = window(1)
    calls = max(1, min(500, int(window_seconds / max(one, 1e-7))))
    return sorted(window(calls) for _ in range(windows))


def main():
    import torch

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=["bf16", "f16", "f32"], default="bf16")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    is_cuda = args.device.startswith("cuda")
    synchronize = torch.cuda.synchronize if is_cuda else (lambda: None)
    windows, window_seconds = (3, 0.001) if args.quick else (15, 0.01)
    dtype = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}[args.dtype]
    tokens = min(args.tokens, 16) if args.quick else args.tokens
    if is_cuda:
        torch.backends.cuda.preferred_blas_library("cublaslt")
    for layer, d_in, d_out in QUICK_SHAPES if args.quick else SHAPES:
        x, w, dy = (torch.randn(*dims, dtype=dtype, device=args.device)
                    for dims in ((tokens, d_in), (d_out, d_in), (tokens, d_out)))
        products = {"forward": lambda: x @ w.t(), "dx": lambda: dy @ w, "dW": lambda: dy.t() @ x}
        for product, call in products.items():
            seconds = timed(call, synchronize, windows, window_seconds)
            median = statistics.median(seconds)
            print(json.dumps({
                "bench": "gemm", "program": "torch", "layer": layer, "product": product, "shape": [tokens, d_in, d_out],
                "dtype": args.dtype, "ms": median * 1e3, "ms_min": seconds[0] * 1e3, "ms_max": seconds[-1] * 1e3,
                "tflops": 2 * tokens * d_in * d_out / median / 1e12, "version": f"torch {torch.__version__}",
                "device": torch.cuda.get_device_name() if is_cuda else "cpu"}), flush=True)


if __name__ == "__main__":
    main()
