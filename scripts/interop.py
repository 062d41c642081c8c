#!/usr/bin/env python3
"""Check against transformers and peft that files go both ways. Needs a Python with torch, transformers and peft.

    .venv-peers/bin/python scripts/interop.py [MODEL_DIR...] [--methods dora,vera] [--bin FOLDER] [--tolerance 1e-4] [--keep]

Without MODEL_DIR: the tiny models of the testkit, and models/smollm2-135m-instruct where it is. For each model:

1. adapter   an adapter trained here loads in peft, and peft's logits are ours
2. merged    the merged folder loads in transformers with the logits of base + adapter, tokenizer and chat template too
3. continue  an adapter trained by peft goes on here through init_adapter, and the loss of its first step is peft's

and for the first of the models, for every adapter method (--methods picks some):

4. native    peft reads the folder of the run, where peft has the method or the folder is a plain LoRA, with our logits
5. folded    peft reads what `merge --format peft` made of it, with our logits

and for the testkit's ResNet, whose adapters sit on convolutions:

6. conv      as 1 and 2, from images
7. peft      an adapter that peft trained on convolutions and the linear layer has peft's logits here
8. tucker    the folder of a Tucker core, put into the weights by the formula in docs/adapters.md, has our logits; so does `merge`

Prints `passed` or `failed` a line; exit status 1 if any failed. Needs target/release/lowrank-train and lowrank-bench.
"""
import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageClassification, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parent.parent
TINY = ("tiny-llama", "tiny-llama-tied", "tiny-qwen2", "tiny-qwen3", "tiny-mistral", "tiny-llama3", "tiny-gemma2")
PROMPT = "A red fox sat under the apple tree and waited for 24 days."
RESNET = "tiny-resnet"
TEXTS = ["The river runs past the mill.", "Seven small boats left.", "Rain fell all night, and the road was gone.",
         "Nobody knew who had painted the door."]


class Method:
    """How one method is tried: its tables, its learning rate, whether peft reads its own folder, what merge needs."""

    def __init__(self, *tables, rate=2e-3, native=True, merge=()):
        self.tables, self.rate, self.native, self.merge = tables, rate, native, merge


CALIBRATION = ("[calibration]", f"samples = {len(TEXTS)}", "cache = false")
EVERYTHING = ("--tolerance", "0")  # no small LoRA: all directions, which is exact up to rounding
METHODS = {
    "lora": Method("[adapter.lora]", "r = 4", "lora_alpha = 8", "use_rslora = true", "[adapter.lora.rank_pattern]", "v_proj = 2"),
    "dora": Method("[adapter.dora]", "r = 4", "lora_alpha = 8", merge=EVERYTHING),
    "pissa": Method("[adapter.pissa]", "r = 4"),
    "olora": Method("[adapter.olora]", "r = 4", "lora_alpha = 4"),
    "corda": Method("[adapter.corda]", "r = 4", "lora_alpha = 4", *CALIBRATION),
    "eora": Method("[adapter.eora]", "r = 4", "[quantization.nf4]", "block_size = 32", *CALIBRATION),
    "lora_xs": Method("[adapter.lora_xs]", "r = 4", "lora_alpha = 8", rate=5e-2, native=False),
    "lora_sb": Method("[adapter.lora_sb]", "r = 4", "eta = 1e-3", *CALIBRATION, native=False),
    "svfit": Method("[adapter.svfit]", "r = 8", rate=5e-2, native=False),
    "vera": Method("[adapter.vera]", "r = 96", rate=5e-2),
    "randlora": Method("[adapter.randlora]", "r = 8", "randlora_alpha = 16", rate=2e-2, merge=EVERYTHING),
    "tucker": Method("[adapter.tucker]", "r_in = 6", "r_out = 4", rate=1e-2, native=False),
    "hra": Method("[adapter.hra]", "r = 4", rate=1e-2),
    "oft": Method("[adapter.oft]", "oft_block_size = 16", rate=1e-2, merge=EVERYTHING),
}


class Failure(Exception):
    """What did not agree."""


def command(program, *arguments):
    done = subprocess.run([program, *map(str, arguments)], capture_output=True, text=True, cwd=ROOT)
    if done.returncode != 0:
        raise Failure(f"{program.name} {arguments[0]} ended with {done.returncode}: {done.stderr.strip()[-600:]}")
    return done.stdout


def load_base(model):
    return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, attn_implementation="eager").eval()


def logits_of(model, ids):
    with torch.no_grad():
        return model(input_ids=torch.tensor([ids])).logits[0].float()


def our_logits(bench, model, adapter, ids, out):
    extra = ("--adapter", adapter) if adapter else ()
    command(bench, "logits", "--model", model, *extra, "--ids", ",".join(map(str, ids)), "--out", out)
    return load_file(out)["logits"].float()


def require_close(what, ours, theirs, tolerance):
    if ours.shape != theirs.shape:
        raise Failure(f"{what}: shape {tuple(ours.shape)}, expected {tuple(theirs.shape)}")
    worst = float((ours - theirs).abs().max())
    # f32 rounding grows with the numbers: two attention kernels of torch differ by 2e-6 of the largest logit on SmolLM2, and each by 3e-6 from f64
    allowed = max(tolerance, 5e-6 * theirs.abs().max().item())
    if not worst <= allowed:
        raise Failure(f"{what}: differ by {worst:.2e}, allowed {allowed:.0e}")
    return worst


LORA = METHODS["lora"]


def write_run(folder, model, method=LORA, **top):
    """A configuration of three steps on TEXTS, all of them in every step, and its data."""
    data = folder / "texts.jsonl"
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS), encoding="utf-8")
    lines = [f"{key} = {json.dumps(str(value))}" for key, value in {
        "base_model": model, "output_dir": folder / "run", "device": "cpu", **top}.items()]
    if "init_adapter" not in top:
        lines += method.tables
    lines += ["[optimizer.adamw]", f"learning_rate = {method.rate}",
              "[data]", f"train = {json.dumps(str(data))}", "packing = false", "shuffle = false", "cache = false",
              "[training]", "max_steps = 3", f"micro_batch_size = {len(TEXTS)}", 'lr_scheduler = "constant"',
              "[logging]", "logging_steps = 1", 'progress = "plain"']
    config = folder / "run.toml"
    config.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return config


def check_adapter(args, model, folder, ids):
    """Trains here, and compares our logits with peft's. Returns the adapter, peft's logits and what to report."""
    command(args.train, "--config", write_run(folder, model))
    adapter = folder / "run" / "adapter"
    base = load_base(model)
    plain = logits_of(base, ids)
    require_close("base logits", our_logits(args.bench, model, None, ids, folder / "base.safetensors"), plain, args.tolerance)
    theirs = logits_of(PeftModel.from_pretrained(base, adapter).eval(), ids)
    moved = float((theirs - plain).abs().max())
    if moved < 100 * args.tolerance:
        raise Failure(f"the adapter moves the logits by {moved:.1e} only: too little to compare")
    ours = our_logits(args.bench, model, adapter, ids, folder / "adapter.safetensors")
    worst = require_close("adapter logits", ours, theirs, args.tolerance)
    return adapter, theirs, f"logits differ by {worst:.1e} (the adapter moves them by {moved:.1e})"


def check_merged(args, model, folder, ids, adapter, expected):
    merged = folder / "merged"
    command(args.train, "merge", "--model", model, "--adapter", adapter, "--out", merged, "--dtype", "f32")
    loaded, loading = AutoModelForCausalLM.from_pretrained(
        merged, dtype=torch.float32, attn_implementation="eager", output_loading_info=True)
    wrong = {key: sorted(names) for key, names in loading.items() if names and key in ("missing_keys", "unexpected_keys")}
    if wrong:
        raise Failure(f"transformers complains about the merged folder: {wrong}")
    worst = require_close("merged logits", logits_of(loaded.eval(), ids), expected, args.tolerance)
    before, after = AutoTokenizer.from_pretrained(model), AutoTokenizer.from_pretrained(merged)
    if before(PROMPT).input_ids != after(PROMPT).input_ids or before.chat_template != after.chat_template:
        raise Failure("the tokenizer or chat template of the merged folder is not that of the base model")
    return f"logits differ by {worst:.1e}"


def peft_batch(tokenizer, eos):
    """TEXTS as our trainer encodes them (end-of-text appended), padded on the right; padding does not count."""
    rows = [tokenizer(text).input_ids for text in TEXTS]
    rows = [row if row[-1] == eos else [*row, eos] for row in rows]
    length = max(map(len, rows))
    ids = torch.tensor([row + [eos] * (length - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (length - len(row)) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def train_with_peft(model, tokenizer, out):
    """A few steps of peft. Saves the adapter and returns its loss on TEXTS after them."""
    torch.manual_seed(0)
    config = LoraConfig(r=6, lora_alpha=9, target_modules=["q_proj", "v_proj", "down_proj"],
                        rank_pattern={"v_proj": 3}, alpha_pattern={"q_proj": 5}, task_type="CAUSAL_LM")
    adapted = get_peft_model(load_base(model), config)
    batch = peft_batch(tokenizer, tokenizer.eos_token_id)
    optimizer = torch.optim.AdamW([param for param in adapted.parameters() if param.requires_grad], lr=5e-3)
    for _ in range(4):
        adapted(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(out)
    with torch.no_grad():
        return float(adapted.eval()(**batch).loss)


def check_continue(args, model, folder):
    expected = train_with_peft(model, AutoTokenizer.from_pretrained(model), folder / "peft")
    again = folder / "continued"
    again.mkdir()
    command(args.train, "--config", write_run(again, model, init_adapter=folder / "peft"))
    lines = [json.loads(line) for line in (again / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    if abs(losses[0] - expected) > args.tolerance:
        raise Failure(f"first loss {losses[0]:.6f}, peft's is {expected:.6f}")
    if not losses[-1] < losses[0]:
        raise Failure(f"the loss does not fall: {losses}")
    saved = json.loads((again / "run" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    if saved["r"] != 6 or saved["rank_pattern"] != {"v_proj": 3}:
        raise Failure(f"the saved adapter has r {saved['r']}, rank_pattern {saved['rank_pattern']}; expected those of peft's")
    PeftModel.from_pretrained(load_base(model), again / "run" / "adapter")
    return f"first loss {losses[0]:.6f}, peft's {expected:.6f}, then down to {losses[-1]:.6f}"


def check_method(args, model, folder, method, ids):
    """Trains with a method; compares our logits with what peft makes of its folder, and of the LoRA that it folds to."""
    folder.mkdir()
    command(args.train, "--config", write_run(folder, model, method))
    adapter, lora = folder / "run" / "adapter", folder / "lora"
    plain = logits_of(load_base(model), ids)
    ours = our_logits(args.bench, model, adapter, ids, folder / "adapter.safetensors")
    moved = float((ours - plain).abs().max())
    if moved < 10 * args.tolerance:
        raise Failure(f"the adapter moves the logits by {moved:.1e} only: too little to compare")
    notes = []
    if method.native:
        theirs = logits_of(PeftModel.from_pretrained(load_base(model), adapter).eval(), ids)
        notes.append(f"native logits differ by {require_close('native logits', ours, theirs, args.tolerance):.1e}")
    command(args.train, "merge", "--model", model, "--adapter", adapter, "--out", lora, "--format", "peft", *method.merge)
    settings = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    if settings["peft_type"] != "LORA" or settings["use_dora"] or settings["use_rslora"]:
        raise Failure(f"the folded adapter is no plain LoRA: {settings}")
    theirs = logits_of(PeftModel.from_pretrained(load_base(model), lora).eval(), ids)
    notes.append(f"folded (r {settings['r']}) by {require_close('folded logits', ours, theirs, args.tolerance):.1e}")
    # Servers that read one rank and one alpha see the same.
    command(args.train, "merge", "--model", model, "--adapter", adapter, "--out", lora, "--format", "peft", *method.merge,
            "--same-rank", "--overwrite")
    settings = json.loads((lora / "adapter_config.json").read_text(encoding="utf-8"))
    ranks = {len(value) for key, value in load_file(lora / "adapter_model.safetensors").items() if ".lora_A." in key}
    if ranks != {settings["r"]} or settings["rank_pattern"] or settings["alpha_pattern"]:
        raise Failure(f"--same-rank left ranks {ranks} and the patterns {settings['rank_pattern']}")
    theirs = logits_of(PeftModel.from_pretrained(load_base(model), lora).eval(), ids)
    require_close("logits with one rank", ours, theirs, args.tolerance)
    return ", ".join(notes) + f" (the adapter moves them by {moved:.1e})"


def check_methods(args, model, folder):
    """Every method on one model; returns how many failed."""
    ids = AutoTokenizer.from_pretrained(model)(PROMPT).input_ids
    failed = 0
    for name in args.methods:
        try:
            note = check_method(args, model, folder / name, METHODS[name], ids)
            print(f"passed {model.name} {name}: {note}", flush=True)
        except (Failure, OSError, KeyError, RuntimeError, ValueError) as error:
            print(f"failed {model.name} {name}: {error}", flush=True)
            failed += 1
    return failed


def check_model(args, model, folder):
    """Runs the three checks on one model; returns how many failed."""
    ids = AutoTokenizer.from_pretrained(model)(PROMPT).input_ids
    failed = 0
    state = {}

    def adapter():
        state["adapter"], state["logits"], note = check_adapter(args, model, folder, ids)
        return note

    def merged():
        if not state:
            raise Failure("not run: there is no adapter")
        return check_merged(args, model, folder, ids, state["adapter"], state["logits"])

    for name, check in (("adapter", adapter), ("merged", merged), ("continue", lambda: check_continue(args, model, folder))):
        try:
            print(f"passed {model.name} {name}: {check()}", flush=True)
        except (Failure, OSError, KeyError, RuntimeError, ValueError) as error:
            print(f"failed {model.name} {name}: {error}", flush=True)
            failed += 1
    return failed


def load_resnet(folder):
    return AutoModelForImageClassification.from_pretrained(folder, dtype=torch.float32).eval()


def class_logits(model, pixels):
    with torch.no_grad():
        return model(pixel_values=pixels).logits.float()


class Images:
    """The ResNet, three folders of pictures for its three classes, and pixels that the logits are compared on."""

    def __init__(self, args, folder):
        self.args, self.folder = args, folder
        self.model = ROOT / "crates" / "testkit" / "goldens" / "models" / RESNET
        for label, colour in enumerate(("red", "green", "blue")):
            shutil.copytree(ROOT / "data" / "smoke" / "images" / "train" / colour, folder / "images" / f"LABEL_{label}")
        self.pixels = torch.randn(4, 3, 37, 29, generator=torch.Generator().manual_seed(0))
        save_file({"pixel_values": self.pixels}, folder / "pixels.safetensors")
        self.plain = class_logits(load_resnet(self.model), self.pixels)

    def train(self, name, *tables):
        """An adapter that three steps here made."""
        config = self.folder / f"{name}.toml"
        config.write_text("\n".join([
            'task = "image_classification"', f'base_model = "{self.model}"', f'output_dir = "{self.folder / name}"',
            'device = "cpu"', *tables, "[optimizer.adamw]", "learning_rate = 2e-2",
            "[data]", f'train = "{self.folder / "images"}"', "cache = false",
            "[training]", "max_steps = 3", "micro_batch_size = 6", "[logging]", 'progress = "plain"']) + "\n", encoding="utf-8")
        command(self.args.train, "--config", config)
        return self.folder / name / "adapter"

    def ours(self, adapter):
        out = self.folder / "logits.safetensors"
        command(self.args.bench, "logits", "--model", self.model, "--adapter", adapter,
                "--pixels", self.folder / "pixels.safetensors", "--out", out)
        return load_file(out)["logits"].float()

    def merged(self, adapter):
        out = self.folder / f"merged-{adapter.parent.name}"
        command(self.args.train, "merge", "--config", self.folder / f"{adapter.parent.name}.toml", "--out", out, "--dtype", "f32")
        return class_logits(load_resnet(out), self.pixels)

    def moved(self, logits):
        moved = float((logits - self.plain).abs().max())
        if moved < 100 * self.args.tolerance:
            raise Failure(f"the adapter moves the logits by {moved:.1e} only: too little to compare")
        return moved


def check_conv(images):
    adapter = images.train("conv", "[adapter.lora]", "r = 4", "lora_alpha = 8", 'target_modules = ["convolution"]',
                           "[adapter.lora.rank_pattern]", '"shortcut.convolution" = 2')
    theirs = class_logits(PeftModel.from_pretrained(load_resnet(images.model), adapter).eval(), images.pixels)
    moved = images.moved(theirs)
    worst = require_close("adapter logits", images.ours(adapter), theirs, images.args.tolerance)
    merged = require_close("merged logits", images.merged(adapter), theirs, images.args.tolerance)
    return f"logits differ by {worst:.1e}, merged by {merged:.1e} (the adapter moves them by {moved:.1e})"


def check_peft_conv(images):
    """peft trains LoRA on every convolution and on the linear layer of the head; the norms stay as in inference."""
    torch.manual_seed(0)
    config = LoraConfig(r=5, lora_alpha=9, use_rslora=True, target_modules=["convolution", "classifier.1"],
                        rank_pattern={r"embedder\.convolution": 3}, alpha_pattern={"shortcut.convolution": 4})
    adapted = get_peft_model(load_resnet(images.model), config).eval()
    optimizer = torch.optim.AdamW([param for param in adapted.parameters() if param.requires_grad], lr=2e-2)
    for _ in range(4):
        adapted(pixel_values=images.pixels, labels=torch.tensor([0, 1, 2, 0])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    adapted.save_pretrained(images.folder / "peft")
    theirs = class_logits(adapted, images.pixels)
    moved = images.moved(theirs)
    worst = require_close("logits of peft's adapter", images.ours(images.folder / "peft"), theirs, images.args.tolerance)
    return f"logits differ by {worst:.1e} (the adapter moves them by {moved:.1e})"


def check_tucker_conv(images):
    adapter = images.train("tucker", "[adapter.tucker]", "r_in = 3", "r_out = 4", "scale = 2.0",
                           'target_modules = ["convolution"]')
    settings = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    tensors, model = load_file(adapter / "adapter_model.safetensors"), load_resnet(images.model)
    weights = model.state_dict()
    for name in [key.removesuffix(".lora_R") for key in tensors if key.endswith(".lora_R")]:
        parts = [tensors.pop(f"{name}.lora_{part}") for part in ("R", "A", "B", "rows", "columns")]
        weights[f"{name}.weight"] += settings["scale"] * torch.einsum("bacd,ai,ob,hc,wd->oihw", *parts)
    weights.update(tensors)  # what is trained whole: the head
    model.load_state_dict(weights)
    expected = class_logits(model, images.pixels)
    moved = images.moved(expected)
    worst = require_close("tucker logits", images.ours(adapter), expected, images.args.tolerance)
    merged = require_close("merged logits", images.merged(adapter), expected, images.args.tolerance)
    return f"logits differ by {worst:.1e}, merged by {merged:.1e} (the adapter moves them by {moved:.1e})"


CONVOLUTIONS = {"conv": check_conv, "peft": check_peft_conv, "tucker": check_tucker_conv}


def check_convolutions(args, folder):
    """Adapters on convolutions; returns how many failed."""
    folder.mkdir()
    images, failed = Images(args, folder), 0
    for name, check in CONVOLUTIONS.items():
        try:
            print(f"passed {RESNET} {name}: {check(images)}", flush=True)
        except (Failure, OSError, KeyError, RuntimeError, ValueError) as error:
            print(f"failed {RESNET} {name}: {error}", flush=True)
            failed += 1
    return failed


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", type=Path)
    target = Path(os.environ.get("CARGO_TARGET_DIR", ROOT / "target"))
    parser.add_argument("--bin", type=Path, default=target / "release", help="folder of the programs")
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(METHODS),
                        help="adapter methods to try on the first model, with commas between them")
    parser.add_argument("--keep", action="store_true", help="keep the files and say where they are")
    args = parser.parse_args()
    if unknown := set(args.methods) - set(METHODS):
        parser.error(f"no method {', '.join(sorted(unknown))}; there are {', '.join(METHODS)}")
    args.train, args.bench = args.bin / "lowrank-train", args.bin / "lowrank-bench"
    for program in (args.train, args.bench):
        if not program.is_file():
            sys.exit(f"error: {program} is missing\nhint: cargo build --release --workspace --bins")
    if not args.models:
        args.models = [ROOT / "crates" / "testkit" / "goldens" / "models" / name for name in TINY]
        real = ROOT / "models" / "smollm2-135m-instruct"
        args.models += [real] if real.is_dir() else []
    return args


def main():
    args = parse_args()
    logging.disable_progress_bar()
    failed = 0
    scratch = Path(tempfile.mkdtemp(prefix="lowrank-interop-"))
    for model in args.models:
        model = model.resolve()
        folder = scratch / model.name
        folder.mkdir()
        failed += check_model(args, model, folder)
    first = args.models[0].resolve()
    failed += check_methods(args, first, scratch / first.name)
    failed += check_convolutions(args, scratch / RESNET)
    if args.keep:
        print(f"files are in {scratch}")
    else:
        shutil.rmtree(scratch)
    print(f"{3 * len(args.models) + len(args.methods) + len(CONVOLUTIONS) - failed} passed, {failed} failed")
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
