#!/usr/bin/env python3
"""Compare the low-rank optimisers on one small pre-training job, with equal tokens: the GaLore study.

    compare_galore.py                        everything; about 20 minutes on two idle CPU cores
    compare_galore.py --only fira,adamw      these variants; the report takes in the others as far as they were run
    compare_galore.py --quick                a few steps of everything: does it work? about 3 minutes
    compare_galore.py --prepare              only the model folder and the data
    compare_galore.py --report               only the report, from what was run

A variant is configs/compare/base.toml followed by configs/compare/VARIANT.toml. It runs with every learning rate of its
grid and seed 1; the rate with the lowest validation loss runs with the other seeds. A run that is complete is not
repeated, as long as its configuration is the same: stop and start as you like. Runs are in runs/compare, the report in
docs/benchmarks/galore-study.md and the raw numbers in galore-study.json beside it (--quick: in runs/compare-quick).

Needs the built program (cargo build --release), or LOWRANK_TRAIN=FILE. Python's standard library only. --jobs runs
several at a time and shares out the cores; the milliseconds per step are then not comparable.
"""
import argparse
import concurrent.futures
import datetime
import hashlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = Path("configs/compare")
MODEL = Path("models/llama-study")
SEEDS = [1, 2, 3]
STAGES = 4  # of ReLoRA
FACTOR = 2  # between neighbours of a grid, for --extend
VARIANTS = {  # name: (title, learning rates); the key of the rate follows from the optimiser of the file
    "adamw": ("AdamW, all weights", [3.75e-4, 7.5e-4, 1.5e-3]),
    "adamw-one-rate": ("AdamW, one rate for everything", [7.5e-4, 1.5e-3, 3e-3]),
    "galore-exact": ("GaLore as published", [5e-3, 1e-2, 2e-2]),
    "galore-std": ("GaLore projected, smaller side", [5e-3, 1e-2, 2e-2]),
    "galore-input": ("GaLore projected, input side", [5e-3, 1e-2, 2e-2]),
    "q-galore": ("Q-GaLore", [5e-3, 1e-2, 2e-2]),
    "dct": ("DCT-AdamW", [1.5e-3, 3e-3, 6e-3]),
    "apollo": ("APOLLO", [5e-3, 1e-2, 2e-2]),
    "apollo-mini": ("APOLLO-Mini", [5e-3, 1e-2, 2e-2]),
    "fira": ("Fira", [5e-3, 1e-2, 2e-2]),
    "ldadam": ("LDAdam", [1.5e-3, 3e-3, 6e-3]),
    "lora": ("LoRA", [3e-3, 6e-3, 1.2e-2]),
    "relora": (f"ReLoRA, {STAGES} stages", [3e-3, 6e-3, 1.2e-2]),
}
# A random projection that is not orthonormal keeps the length of a gradient on average, whatever its rank.
NO_ENERGY = {"apollo", "apollo-mini"}
output = threading.Lock()


class Failed(Exception):
    """A run that cannot be counted; the text says why."""


def say(text):
    with output:
        print(text, flush=True)


def binary():
    target = Path(os.environ.get("CARGO_TARGET_DIR", "target"))
    path = Path(os.environ.get("LOWRANK_TRAIN", target / "release" / "lowrank-train"))
    if not path.is_file():
        sys.exit(f"error: there is no program {path}\nhint: cargo build --release, or set LOWRANK_TRAIN")
    return str(path)


def prepare(program):
    """Text, model shape and tokenizer; what is there is kept."""
    subprocess.run([sys.executable, "scripts/fetch_text.py"], check=True)
    MODEL.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(CONFIGS / "model" / "config.json", MODEL / "config.json")
    if not (MODEL / "tokenizer.json").is_file():
        vocabulary = json.loads((MODEL / "config.json").read_text())["vocab_size"]
        subprocess.run([program, "tokenizer", "--corpus", "data/text/train.txt", "--vocab-size", str(vocabulary),
                        "--output", str(MODEL), "--force"], check=True)


class Study:
    """Where runs lie and how they are made."""

    def __init__(self, args, program):
        self.program = program
        self.quick = args.quick
        self.folder = Path("runs/compare-quick" if args.quick else "runs/compare")
        self.steps = 12 if args.quick else tomllib.loads((CONFIGS / "base.toml").read_text())["training"]["max_steps"]
        self.seeds = SEEDS[:2] if args.quick else SEEDS
        threads = max(1, (os.cpu_count() or 1) // args.jobs)
        self.environment = dict(os.environ, RAYON_NUM_THREADS=str(threads)) if args.jobs > 1 else None
        self.jobs = args.jobs
        self.stopped = threading.Event()

    def rates(self, variant):
        rates = VARIANTS[variant][1]
        return rates[1:2] if self.quick else rates

    def text(self, variant):
        """The configuration of a variant."""
        return (CONFIGS / "base.toml").read_text() + "\n" + (CONFIGS / f"{variant}.toml").read_text()

    def place(self, variant, rate, seed):
        return self.folder / variant / f"lr-{rate:g}-seed-{seed}"

    def digest(self, variant, rate, seed):
        parts = [json.dumps(tomllib.loads(self.text(variant)), sort_keys=True), (MODEL / "config.json").read_text(), (MODEL / "tokenizer.json").read_text(),
                 f"{rate!r} {seed} {self.steps} {STAGES if variant == 'relora' else 1}"]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def result(self, variant, rate, seed):
        """What a complete run of this configuration gave, or None."""
        try:
            done = json.loads((self.place(variant, rate, seed) / "done.json").read_text())
        except (OSError, ValueError):
            return None
        return done["result"] if done["digest"] == self.digest(variant, rate, seed) else None

    def run(self, variant, rate, seed):
        """Runs one configuration, unless it is complete, and returns what it gave."""
        known = self.result(variant, rate, seed)
        if known is not None:
            return known
        if self.stopped.is_set():
            raise SystemExit(1)
        folder = self.place(variant, rate, seed)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        config = folder / "run.toml"
        config.write_text(self.text(variant))
        train = self.relora if variant == "relora" else self.plain
        try:
            found = summarise(train(config, folder, variant, rate, seed))
        except Failed as error:
            found = {"failed": str(error), "loss": None}
        if variant in NO_ENERGY:
            found.pop("captured_energy", None)
        for left in [*folder.glob("**/checkpoints"), *folder.glob("**/model"), *folder.glob("**/adapter")]:
            shutil.rmtree(left, ignore_errors=True)
        temporary = folder / "done.json.tmp"
        temporary.write_text(json.dumps({"digest": self.digest(variant, rate, seed), "result": found}, indent=1))
        temporary.replace(folder / "done.json")
        shown = found.get("failed") or f"loss {found['loss']:.4f}, {found['ms_per_step']:.0f} ms a step"
        say(f"{variant:<13} rate {rate:<8g} seed {seed}: {shown}")
        return found

    def train(self, config, out, settings):
        """One call of the program; returns the folder of the run."""
        command = [self.program, "--config", str(config), "--out", str(out)]
        for key, value in settings.items():
            command += ["--set", f"{key}={value}"]
        self.call(command, out.with_name(out.name + ".log"))
        return out

    def call(self, command, log):
        with log.open("w") as file:
            code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, env=self.environment).returncode
        if code == 0:
            return
        lines = log.read_text(errors="replace").strip().splitlines()
        if code == 1 and any("the loss is" in line and "the gradient norm" in line for line in lines[-8:]):
            raise Failed("diverged")  # what the program says of a loss that is not finite
        log_end = "\n  ".join(lines[-8:])
        raise SystemExit(f"error: exit code {code} of {shlex.join(command)}\n  {log_end}")

    def plain(self, config, folder, variant, rate, seed):
        key = f"optimizer.{next(iter(tomllib.loads(config.read_text())['optimizer']))}.learning_rate"
        return [self.train(config, folder / "run", {key: rate, "seed": seed, "training.max_steps": self.steps})]

    def relora(self, config, folder, _variant, rate, seed):
        """Stages of LoRA, each on the merged result of the one before. The rate follows the schedule of the other variants,
        on a line within a stage and from zero at its beginning; every stage draws its own rows."""
        base = tomllib.loads(config.read_text())
        total, least = self.steps, base["training"]["min_lr_ratio"]
        plain = base["optimizer"]["adamw"]["plain_learning_rate"]
        first_warmup = max(1, math.ceil(base["training"]["warmup_ratio"] * total))

        def share(step):
            part = max(0.0, (step - first_warmup) / max(1, total - first_warmup))
            return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * part))

        model = folder / "start" / "model"
        # The random weights of this seed as a checkpoint: one step of full training, a step of warm-up, so of rate zero.
        self.train(CONFIGS / "base.toml", folder / "start",
                   {"seed": seed, "training.max_steps": 1, "training.warmup_ratio": 1.0})
        runs = []
        for stage in range(STAGES):
            begin, end = total * stage // STAGES, total * (stage + 1) // STAGES
            warmup = min(end - begin, first_warmup if stage == 0 else max(1, (end - begin) // 10))
            out = self.train(config, folder / f"stage-{stage}", {
                "base_model": model, "init": "pretrained", "seed": seed * 100 + stage,
                "optimizer.adamw.plain_learning_rate": plain * share(begin),
                "optimizer.adamw.learning_rate": rate * share(begin), "training.max_steps": end - begin,
                "training.lr_scheduler": "linear", "training.min_lr_ratio": share(end) / share(begin),
                "training.warmup_ratio": (warmup - 0.5) / (end - begin),  # is rounded up
            })
            runs.append(out)
            if stage + 1 < STAGES:
                merged = folder / f"merged-{stage}" / "model"
                self.call([self.program, "merge", "--model", str(model), "--adapter", str(out / "adapter"), "--out",
                           str(merged), "--dtype", "f32", "--overwrite"], folder / f"merge-{stage}.log")
                model = merged
        return runs

    def variant(self, name, extend):
        """All runs of a variant."""
        rates = list(self.rates(name))
        losses = {rate: loss_of(self.run(name, rate, self.seeds[0])) for rate in rates}
        for _ in range(2 if extend else 0):
            best = min(losses, key=losses.get)
            further = {min(losses): best / FACTOR, max(losses): best * FACTOR}.get(best)
            if further is None:
                break
            losses[further] = loss_of(self.run(name, further, self.seeds[0]))
        best = min(losses, key=losses.get)
        for seed in self.seeds[1:]:
            self.run(name, best, seed)

    def collect(self):
        """{variant: {"rates": {rate: result with the first seed}, "best_rate", "runs": results of the best rate}}"""
        found = {}
        for name in VARIANTS:
            folders = (self.folder / name).glob(f"lr-*-seed-{self.seeds[0]}")
            rates = {*self.rates(name), *(float(re.fullmatch(r"lr-(.+)-seed-\d+", path.name)[1]) for path in folders)}
            first = {rate: self.result(name, rate, self.seeds[0]) for rate in sorted(rates)}
            first = {rate: result for rate, result in first.items() if result is not None}
            if not first:
                continue
            best = min(first, key=lambda rate: loss_of(first[rate]))
            runs = [self.result(name, best, seed) for seed in self.seeds]
            runs = [run for run in runs if run and run["loss"] is not None]
            found[name] = {"rates": first, "best_rate": best, "runs": runs}
        return found


def loss_of(result):
    return math.inf if result["loss"] is None else result["loss"]


def summarise(folders):
    """The numbers of a run, or of the stages of one."""
    steps, last_eval, tokens, wall, memory = [], None, 0, 0.0, 0
    for folder in folders:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        steps += [line for line in lines if line["kind"] == "train"][1:] or lines[:1]  # the first step warms up
        last_eval = [line for line in lines if line["kind"] == "eval"][-1]
        summary = lines[-1]
        tokens, wall = tokens + summary["tokens"], wall + summary["wall_seconds"]
        memory = max(memory, summary["peak_memory_bytes"])
    if last_eval["loss"] is None:
        raise Failed("diverged")
    header = dict(re.findall(r"^# (lowrank-train|device:) (.+)$", (folders[-1] / "config.toml").read_text(), re.M))
    energy = [line["captured_energy"] for line in steps if line.get("captured_energy") is not None]
    found = {
        "loss": last_eval["loss"],
        "perplexity": last_eval["perplexity"],
        "ms_per_step": statistics.median(line["step_ms"] for line in steps),
        "optimizer_bytes": steps[-1]["optimizer_bytes"],
        "gradient_bytes": max(line["gradient_bytes"] for line in steps),
        "tokens": tokens,
        "peak_memory_bytes": memory,
        "wall_seconds": wall,
        "version": header.get("lowrank-train", ""),
        "device": header.get("device:", ""),
    }
    if energy:
        found["captured_energy"] = statistics.fmean(energy)
    return found


def processor():
    try:
        names = re.findall(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.M)
    except OSError:
        names = []
    return f"{names[0] if names else platform.machine()}, {os.cpu_count()} cores"


def row(name, entry):
    """A line of the table."""
    runs = entry["runs"]
    if not runs:
        return f"| {VARIANTS[name][0]} | | diverged | | | | | |"
    rates = sorted(entry["rates"])
    edge = " *" if len(rates) > 1 and entry["best_rate"] in (rates[0], rates[-1]) else ""
    losses = [run["loss"] for run in runs]
    spread = f" ± {statistics.stdev(losses):.3f}" if len(losses) > 1 else ""
    mean = lambda key: statistics.fmean(run[key] for run in runs)
    # Other programs may have run beside some of the runs: the quietest one tells.
    quietest = min(run["ms_per_step"] for run in [*entry["rates"].values(), *runs] if run["loss"] is not None)
    energy = f"{mean('captured_energy'):.2f}" if all("captured_energy" in run for run in runs) else "-"
    return (f"| {VARIANTS[name][0]} | {entry['best_rate']:g}{edge} | {statistics.fmean(losses):.3f}{spread} | "
            f"{math.exp(statistics.fmean(losses)):.2f} | {quietest:.0f} | {mean('optimizer_bytes') / 1e6:.2f} | "
            f"{mean('gradient_bytes') / 1e6:.2f} | {energy} |")


def report(study, command):
    found = study.collect()
    if not found:
        print("nothing was run yet")
        return
    every = [run for entry in found.values() for run in [*entry["rates"].values(), *entry["runs"]] if run["loss"] is not None]
    versions = sorted({run["version"] for run in every})
    tokens = sorted({run["tokens"] for run in every})
    date = datetime.date.today().isoformat()
    order = sorted(found, key=lambda name: statistics.fmean([r["loss"] for r in found[name]["runs"]] or [math.inf]))
    missing = [name for name in VARIANTS if name not in found]
    short = [name for name in found if 0 < len(found[name]["runs"]) < len(study.seeds)]
    model = json.loads((MODEL / "config.json").read_text())
    data = tomllib.loads((CONFIGS / "base.toml").read_text())
    rows = data["training"]["micro_batch_size"]
    try:
        source = Path("data/text/SOURCE.txt").read_text().splitlines()[0]
    except OSError:
        source = "source: unknown"
    counted = f"{tokens[0]} to {tokens[-1]}" if len(tokens) > 1 else f"{tokens[0] if tokens else 0}"
    lines = [
        "# GaLore study",
        "",
        "<!-- Written by scripts/compare_galore.py; the raw numbers are in the JSON file beside this one. -->",
        "",
        f"Pre-training of a LLaMA of {model['num_hidden_layers']} blocks, width {model['hidden_size']} and "
        f"{model['vocab_size']} tokens from random weights on public-domain English text: every method has the same "
        f"{study.steps} steps of {rows} rows of {data['data']['max_seq_length']} tokens ({counted} counted tokens), the same "
        f"schedule, and a grid of learning rates with seed {study.seeds[0]}. The best rate ran with seeds "
        f"{', '.join(map(str, study.seeds))}: mean and standard deviation of the loss on held-out text, and the perplexity of "
        "the mean.",
        "",
        f"- command: `{command}`",
        f"- program: {', '.join(versions)}",
        f"- device: {', '.join(sorted({run['device'] for run in every}))} ({processor()})",
        f"- text: data/text, {source}",
        f"- date: {date}",
        "",
        "| method | best rate | validation loss | perplexity | ms per step | optimiser MB | gradients MB | captured energy |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        *(row(name, found[name]) for name in order),
        "",
        "`*`: the best rate is at the edge of the grid, so a better one may lie outside. Milliseconds per step: the lowest "
        "of the runs' medians. Optimiser: bytes of its whole state, embeddings, head and norms included; "
        "gradients: most bytes that existed at the same time. Captured energy: mean share of a gradient's squared norm "
        "inside its subspace; it has no meaning for the random projections of APOLLO.",
        "",
        "How to read it: the rate is that of the matrices in the blocks; embeddings, head and norms learn at 1e-2 with every "
        "method but AdamW with one rate. GaLore and Fira multiply their updates by a scale of 0.25; APOLLO scales a gradient, "
        "not a sign-like step. So rates of different methods are not comparable, only their best losses are. ReLoRA starts "
        f"every one of its {STAGES} stages with new moments and a new warm-up, and its stages draw their rows independently. "
        "The model is far too small to show what projection saves in time.",
        "",
        "Loss by learning rate, with the first seed:",
        "",
        "| method | rate: loss |",
        "| --- | --- |",
        *(f"| {VARIANTS[name][0]} | " + "; ".join(
            f"{rate:g}: " + (f"{run['loss']:.3f}" if run["loss"] is not None else run["failed"])
            for rate, run in found[name]["rates"].items()) + " |" for name in order),
        "",
    ]
    if study.jobs > 1:
        lines += [f"{study.jobs} runs shared the cores: the times are not comparable with others.", ""]
    if len(versions) > 1:
        lines += ["The runs were made by several versions of the program; remove runs/compare to repeat them all.", ""]
    if missing or short:
        lines += [f"Not complete yet: {', '.join([*missing, *short])}.", ""]
    folder = study.folder if study.quick else Path("docs/benchmarks")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "galore-study.md").write_text("\n".join(lines).rstrip("\n") + "\n")
    raw = {"command": command, "date": date, "versions": versions, "processor": processor(), "steps": study.steps,
           "seeds": study.seeds, "jobs": study.jobs,
           "variants": {name: {**entry, "rates": {f"{rate:g}": run for rate, run in entry["rates"].items()}}
                        for name, entry in found.items()}}
    (folder / "galore-study.json").write_text(json.dumps(raw, indent=1) + "\n")
    print(f"wrote {folder}/galore-study.md and {folder}/galore-study.json")
    print("\n".join(lines[12:14 + len(order)]))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps, one rate, two seeds: a test of the study itself")
    parser.add_argument("--only", help=f"variants, with commas between them: {', '.join(VARIANTS)}")
    parser.add_argument("--jobs", type=int, default=1, help="variants that run at the same time (default 1)")
    parser.add_argument("--extend", action="store_true", help="up to two more rates where the best is at the edge of the grid")
    parser.add_argument("--prepare", action="store_true", help="make the model folder and the data, run nothing")
    parser.add_argument("--report", action="store_true", help="write the report from what was run, run nothing")
    args = parser.parse_args()
    names = args.only.split(",") if args.only else list(VARIANTS)
    for name in names:
        if name not in VARIANTS:
            parser.error(f"--only: there is no variant {name}; there are {', '.join(VARIANTS)}")
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    os.chdir(ROOT)
    if args.report:
        report(Study(args, ""), "scripts/compare_galore.py")
        return
    program = binary()
    prepare(program)
    if args.prepare:
        return
    study = Study(args, program)
    with concurrent.futures.ThreadPoolExecutor(args.jobs) as pool:
        pending = [pool.submit(study.variant, name, args.extend) for name in names]
        try:
            for future in concurrent.futures.as_completed(pending):
                future.result()
        except BaseException:
            study.stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    report(study, shlex.join(["scripts/compare_galore.py", *sys.argv[1:]]))


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
