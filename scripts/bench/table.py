#!/usr/bin/env python3
"""Markdown table of benchmark results: JSON lines on standard input, one per run; the first program is the yardstick.

Every line has `program`, `s_per_step`, `tokens_per_s` and `peak_rss_gib`. A program that ran several times gets the
median of its runs and their range.
"""
import json
import os
import platform
import statistics
import subprocess
import sys


def machine():
    name = platform.processor()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next(line.split(":", 1)[1].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        pass
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{name}, {os.cpu_count()} cores, {memory:.0f} GiB"


def commit():
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=os.path.dirname(os.path.abspath(__file__)))
    return done.stdout.strip() or "unknown"


def main():
    runs = [json.loads(line) for line in sys.stdin if line.startswith("{")]
    by_program = {}
    for run in runs:
        by_program.setdefault(run["program"], []).append(run)
    if not by_program:
        sys.exit("error: no results on standard input")

    def median(program, key):
        return statistics.median(run[key] for run in by_program[program])

    yardstick = next(iter(by_program))
    print(f"Commit {commit()}; {machine()}; load {os.getloadavg()[0]:.1f} at the end, 1 minute; "
          f"alternating, runs of each: {max(len(group) for group in by_program.values())}.\n")
    print(f"| program | s/step | range | tokens/s | peak GiB | time : {yardstick} | memory : {yardstick} |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for program, group in by_program.items():
        seconds, memory = median(program, "s_per_step"), median(program, "peak_rss_gib")
        times = [run["s_per_step"] for run in group]
        print(f"| {program} | {seconds:.2f} | {min(times):.2f} - {max(times):.2f} | {median(program, 'tokens_per_s'):.0f} "
              f"| {memory:.2f} | {seconds / median(yardstick, 's_per_step'):.2f} "
              f"| {memory / median(yardstick, 'peak_rss_gib'):.2f} |")
    for program, group in by_program.items():
        if "import_rss_gib" in group[0]:
            print(f"\n{program}: {group[0]['version']}; {median(program, 'import_rss_gib'):.2f} GiB of its peak is there "
                  "once the libraries are loaded.")


if __name__ == "__main__":
    main()
