#!/usr/bin/env python3
"""Markdown report of GPU results: JSON lines of `lowrank-bench`, the peers and `scripts/gpu.sh` on standard input.

    table_gpu.py [--title TEXT]

Which lines there are decides which sections there are; a program that failed or is missing has its reason in the table.
"""
import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path


def commit():
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent)
    return done.stdout.strip()


def number(value, digits=1):
    return "" if value is None else f"{value:,.{digits}f}".replace(",", " ")


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|" + " --- |" * len(header))
    for row in rows:
        print("| " + " | ".join(str(cell).replace("|", "/").replace("\n", " ") for cell in row) + " |")
    print()


def of(lines, kind):
    return [line for line in lines if line.get("bench") == kind]


def grouped(lines, *keys):
    groups = {}
    for line in lines:
        groups.setdefault(tuple(str(line.get(key)) for key in keys), []).append(line)
    return groups


def with_compiler(line):
    return f"{line['device']}, {line['compiler']}" if line.get("compiler") else line["device"]


def print_machine(lines):
    own = sorted({line["commit"] for line in lines if line.get("commit")})
    print(f"Commit {commit() or ', '.join(own) or 'unknown'}" + (f"; binaries: {', '.join(own)}" if own else "") + ".")
    for line in of(lines, "machine"):
        print(f"{line['what']}: {line['value']}.")
    versions = sorted({line["version"] for line in lines if line.get("version")}, key=len)
    if versions:
        print(f"Peers: {versions[-1]}.")
    print()


def print_checks(lines):
    checks = of(lines, "check")
    if not checks:
        return
    print("## Correctness\n\nEach kernel against the CPU in f32, odd and even sizes; reference cases of torch and peft.\n")
    rows = []
    for (device, compiler, dtype), group in grouped(checks, "device", "compiler", "dtype").items():
        wrong = [f"{line['kernel']} ({line['sizes']})" for line in group if not line["ok"]]
        rows.append((f"{device}, {compiler}", f"kernels, {dtype}", f"{len(group) - len(wrong)} of {len(group)}", "; ".join(wrong)))
    for (device,), group in grouped(of(lines, "golden"), "device").items():
        wrong = [line["line"] for line in group if line["line"].startswith("failed")]
        passed = sum(line["line"].startswith("passed") for line in group)
        rows.append((device, "reference cases", f"{passed} of {len(group)}", "; ".join(wrong)))
    table(("device", "what", "passed", "failed"), rows)


def print_steps(lines):
    steps = of(lines, "step")
    if not steps:
        return
    peaks = {(line["device"], line["compiler"]): line["tflops"] for line in of(lines, "peaks")}
    print("## Training steps\n\nMedian of the steps after warming up. Memory is what the allocator reserved. The last columns "
          "compare tokens/s and memory with the peer that is best at each.\n")
    rows = []
    for (workload, batch, seq, dtype), group in grouped(steps, "workload", "batch", "seq", "dtype").items():
        peers = [line for line in group if "compiler" not in line and "error" not in line]
        fastest = max((line["tokens_per_s"] for line in peers), default=None)
        memories = [line["peak_device_gib"] for line in peers if line.get("peak_device_gib")]
        for program, runs in grouped(group, "program", "device", "compiler").items():
            good = [run for run in runs if "error" not in run]
            name = program[0] + (f", {program[2]}" if program[2] != "None" else "")
            what = f"{workload}, {batch} x {seq}, {dtype}"
            if not good:
                rows.append((what, name, runs[0]["error"], "", "", "", "", "", "", "", ""))
                continue
            tokens, memory = (statistics.median(run[key] or 0 for run in good) for key in ("tokens_per_s", "peak_device_gib"))
            rate = statistics.median(run["model_tflops"] for run in good)
            peak = peaks.get((program[1], program[2]))
            host, launches = (statistics.median(run.get(key) or 0 for run in good) for key in ("host_s", "launches"))
            is_ours = program[2] != "None"
            rows.append((
                what, name, number(1e3 * statistics.median(run["s_per_step"] for run in good)),
                number(1e3 * host) if host else "", number(launches, 0) if launches else "", number(tokens, 0),
                number(rate), f"{100 * rate / peak:.0f} %" if peak else "", number(memory, 2) if memory else "",
                f"{tokens / fastest:.2f}" if is_ours and fastest else "",
                f"{memory / min(memories):.2f}" if is_ours and memories and memory else "",
            ))
    table(("work", "program", "ms", "of which host", "launches", "tokens/s", "model TFLOP/s", "of the GEMM peak", "peak GiB", "speed : best peer",
           "memory : best peer"), rows)


def print_gemm(lines):
    products = of(lines, "gemm")
    if not products:
        return
    ours = list(grouped([line for line in products if line.get("compiler")], "device", "compiler"))
    print("## Matrix products\n\nTFLOP/s, median; x [t, d_in], W [d_out, d_in], dy [t, d_out].\n")
    rows = []
    for (layer, product, shape, dtype), group in grouped(products, "layer", "product", "shape", "dtype").items():
        torch = [line["tflops"] for line in group if line["program"] == "torch"]
        best = statistics.median(torch) if torch else None
        row = [layer, product, shape, dtype, number(best)]
        for key in ours:
            rates = [line["tflops"] for line in group if (line["device"], line.get("compiler")) == key]
            rate = statistics.median(rates) if rates else None
            row.append(number(rate) + (f" ({100 * rate / best:.0f} %)" if rate and best else ""))
        rows.append(row)
    table(["layer", "product", "t, d_in, d_out", "dtype", "torch", *(", ".join(key) for key in ours)], rows)


def print_kernels(lines):
    for (device, compiler), group in grouped(of(lines, "kernel"), "device", "compiler").items():
        print(f"## Kernels on {device}, {compiler}\n")
        for line in of(lines, "peaks"):
            if (line["device"], line["compiler"]) == (device, compiler):
                print(f"Measured peaks: copy {number(line['gb_per_s'], 0)} GB/s, {line['dtype']} product of 8192 "
                      f"{number(line['tflops'], 0)} TFLOP/s. The floor of a kernel follows from these.\n")
        table(("kernel", "sizes", "shape", "dtype", "us", "floor us", "of floor", "bound by", "GB/s", "TFLOP/s"), [
            (line["kernel"], line["sizes"], line["shape"], line["dtype"], number(line["us"]), number(line["floor_us"]),
             f"{100 * line['share_of_floor']:.0f} %", line["bound"], number(line["gb_per_s"], 0), number(line["tflops"]))
            for line in group])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--title", default="Results on a graphics card")
    args = parser.parse_args()
    lines = [json.loads(text) for text in sys.stdin if text.startswith("{")]
    if not lines:
        sys.exit("error: no results on standard input")
    print(f"# {args.title}\n")
    print_machine(lines)
    print_checks(lines)
    print_steps(lines)
    print_gemm(lines)
    print_kernels(lines)
    failures = of(lines, "failure")
    if failures:
        print("## What did not run\n")
        table(("command", "why"), [(line["command"], line["why"]) for line in failures])


if __name__ == "__main__":
    main()
