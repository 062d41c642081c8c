#!/usr/bin/env python3
"""Markdown table of `scripts/bench.sh galore`: JSON lines on standard input, one per run.

    table_galore.py CONFIG.json --batch 8 --seq 256 [--gap 200] <results

Measured times stand beside what the flops of each method predict (a multiply-add is 2 flops; T tokens in a step; linear
layers m x n; r is the rank). Per step:

    full AdamW                     6 T m n
    GaLore on dense gradients      6 T m n + 4 m n r                  projection and update
    projected GaLore               4 T m n + 2 T r (m + n) + 2 m n r  update

With 6 T h v for the head and 6 h T^2 / B per layer for causal attention (B sequences), which are the same for all. Not
counted: norms, activations, softmax, loss, the optimiser's own passes over memory, the sketch of the gradient norm (8 more
columns in the basis), refreshes.
"""
import argparse
import json
import os
import re
import statistics
import sys

from table import commit, machine

FULL, INPUT = "lowrank, full AdamW", "lowrank, projected GaLore, input side"
TORCH_GALORE = "galore-torch GaLoreAdamW, std side"


def describe(run):
    """Label, method in the sense of `step_flops`, and rank of one line."""
    text = run["program"]
    rank = run.get("rank") or int((re.search(r"\brank = (\d+)", text) or [0, 0])[1])
    if text.startswith("galore-torch"):
        return TORCH_GALORE, "dense", rank
    if not text.startswith("lowrank"):
        return text, "full", 0
    if "galore" not in text:
        return FULL, "full", 0
    if "exact = true" in text:
        return "lowrank, exact GaLore, std side", "dense", rank
    return ("lowrank, projected GaLore, std side" if '"std"' in text else INPUT), "projected", rank


class Shape:
    def __init__(self, config, batch, seq):
        self.hidden, self.vocab, self.layers = config["hidden_size"], config["vocab_size"], config["num_hidden_layers"]
        self.batch, self.seq, self.tokens = batch, seq, batch * seq
        heads, ffn = config["num_attention_heads"], config["intermediate_size"]
        width = config.get("head_dim") or self.hidden // heads
        queries, values = heads * width, (config.get("num_key_value_heads") or heads) * width
        hidden = self.hidden
        block = [(hidden, queries), (hidden, values), (hidden, values), (queries, hidden)]
        self.linear = (block + [(hidden, ffn), (hidden, ffn), (ffn, hidden)]) * self.layers
        self.attention_width = queries

    def linear_flops(self, method, rank):
        """Of one step."""
        total = 0
        for m, n in self.linear:
            r = min(rank, m, n)
            if method == "full":
                total += 6 * self.tokens * m * n
            elif method == "dense":
                total += 6 * self.tokens * m * n + 4 * m * n * r
            else:
                total += 4 * self.tokens * m * n + 2 * self.tokens * r * (m + n) + 2 * m * n * r
        return total

    def other_flops(self):
        """Head and causal attention, of one step."""
        attention = 6 * self.layers * self.attention_width * self.tokens * self.seq
        return 6 * self.tokens * self.hidden * self.vocab + attention

    def step_flops(self, method, rank):
        return self.linear_flops(method, rank) + self.other_flops()

    def gradient_mib(self, rank=None, side=None):
        """All gradients of the linear layers in f32, dense or of a rank."""
        values = 0
        for m, n in self.linear:
            if rank is None:
                values += m * n
            else:
                values += min(rank, m, n) * (n if side == "input" or m <= n else m)
        return values * 4 / 2**20


class Program:
    def __init__(self, label, method, rank, runs, shape):
        self.label, self.method, self.rank, self.runs = label, method, rank, runs
        self.seconds = self.median("s_per_step")
        self.flops = shape.step_flops(method, rank)

    def median(self, key):
        values = [run[key] for run in self.runs if run.get(key) is not None]
        return statistics.median(values) if values else None

    def refresh_share(self, gap):
        return (self.median("refresh_all_s") or 0.0) / (gap * self.seconds)


def ratio(program, yardstick, key):
    return f"{getattr(program, key) / getattr(yardstick, key):.2f}" if yardstick else "-"


def number(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"


def print_table(programs, shape, gap):
    full, torch_galore = programs.get(FULL), programs.get(TORCH_GALORE)
    has_device_memory = any(program.median("peak_device_gib") for program in programs.values())
    heads = ["program", "s/step", "range", "tokens/s", "linear GFLOP/token", "with head, attention", "GFLOP/s",
             "time : our full AdamW, predicted", "measured", "time : galore-torch without SVD, predicted", "measured",
             "peak GiB", *(["device peak GiB"] if has_device_memory else []), "gradient MiB", "optimiser MiB",
             "refresh of all s", f"refresh share, gap {gap}"]
    print("| " + " | ".join(heads) + " |")
    print("|" + " --- |" * len(heads))
    for program in programs.values():
        times = [run["s_per_step"] for run in program.runs]
        refresh = program.median("refresh_all_s") or 0.0
        cells = [
            program.label, f"{program.seconds:.3f}", f"{min(times):.3f} - {max(times):.3f}",
            number(program.median("tokens_per_s"), 0),
            f"{shape.linear_flops(program.method, program.rank) / shape.tokens / 1e9:.3f}",
            f"{program.flops / shape.tokens / 1e9:.3f}", f"{program.flops / program.seconds / 1e9:.0f}",
            ratio(program, full, "flops"), ratio(program, full, "seconds"),
            ratio(program, torch_galore, "flops"), ratio(program, torch_galore, "seconds"),
            number(program.median("peak_rss_gib"), 2),
            *([number(program.median("peak_device_gib"), 2)] if has_device_memory else []),
            number(program.median("gradient_mib"), 1), number(program.median("optimizer_mib"), 1),
            f"{refresh:.2f}" if refresh > 0.0 else "-",
            f"{100 * program.refresh_share(gap):.2f} %" if refresh > 0.0 else "-",
        ]
        print("| " + " | ".join(cells) + " |")


def verdict(is_met):
    return "met" if is_met else "missed"


def print_targets(programs, shape, gap):
    projected, full, torch_galore = programs.get(INPUT), programs.get(FULL), programs.get(TORCH_GALORE)
    if projected is None:
        return
    print("\nTargets of projected GaLore, input side:\n")
    for yardstick, name, limit in ((full, "our full AdamW", 0.85), (torch_galore, "galore-torch without SVD", 0.60)):
        if yardstick is not None:
            value = projected.seconds / yardstick.seconds
            print(f"- step time : {name}: {value:.3f}, at most {limit:.2f}: {verdict(value <= limit)}")
    share = projected.refresh_share(gap)
    print(f"- refreshes at gap {gap}: {100 * share:.2f} % of the steps' time, less than 1 %: {verdict(share < 0.01)}")
    measured = [(program, program.median("gradient_mib")) for program in (projected, full) if program is not None]
    text = ", ".join(f"{program.label} {number(value, 1)} MiB" for program, value in measured)
    print(f"- gradients, the most at a time: {text}. All gradients of the linear layers together would be "
          f"{shape.gradient_mib():.1f} MiB dense and {shape.gradient_mib(projected.rank, 'input'):.1f} MiB of rank "
          f"{projected.rank}; the head's is {4 * shape.hidden * shape.vocab / 2**20:.1f} MiB, dense in all programs.")
    if full is not None:
        print(f"\nFull AdamW in this engine, {full.seconds:.3f} s, minus projected GaLore: the flops predict "
              f"{full.seconds * (1 - projected.flops / full.flops):.3f} s at the same rate, measured are "
              f"{full.seconds - projected.seconds:.3f} s.")


def print_notes(programs):
    devices = sorted({run["device"] for program in programs.values() for run in program.runs if run.get("device")})
    if len({device.split(" ")[0].split(":")[0] for device in devices}) > 1:
        print("\nNot all programs ran on the same device (" + "; ".join(devices) + "): ratios across devices say nothing.")
    else:
        print("\nDevice: " + "; ".join(devices) + ".")
    for program in programs.values():
        run = program.runs[0]
        if "version" in run:
            held = program.median("optimizer_held_mib")
            print(f"\n{program.label}: {run['version']}; {number(program.median('import_rss_gib'), 2)} GiB of its peak is "
                  f"there once the libraries are loaded; the memory behind its optimiser's values is {number(held, 1)} MiB.")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--seq", type=int, required=True)
    parser.add_argument("--gap", type=int, default=200)
    args = parser.parse_args()
    with open(args.config, encoding="utf-8") as file:
        shape = Shape(json.load(file), args.batch, args.seq)
    groups = {}
    for line in sys.stdin:
        if line.startswith("{"):
            run = json.loads(line)
            groups.setdefault(describe(run), []).append(run)
    if not groups:
        sys.exit("error: no results on standard input")
    programs = {key[0]: Program(*key, runs, shape) for key, runs in groups.items()}
    ranks = ", ".join(str(rank) for rank in sorted({program.rank for program in programs.values() if program.rank}))
    name = os.path.basename(os.path.dirname(os.path.abspath(args.config)))
    print(f"{name}, {args.batch} x {args.seq} tokens, rank {ranks or 'none'}, f32. Commit {commit()}; {machine()}; "
          f"load {os.getloadavg()[0]:.1f} at the end, 1 minute; alternating, runs of each: "
          f"{max(len(runs) for runs in groups.values())}.\n")
    print_table(programs, shape, args.gap)
    print_targets(programs, shape, args.gap)
    print_notes(programs)


if __name__ == "__main__":
    main()
