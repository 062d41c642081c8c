"""Writes the cases of this folder with torch, transformers and peft (versions are in each case.json).

Usage: python make.py [NAME ...]      default: every case that is not there yet

The format is that of ../goldens/README.md. The models are random; those of ../goldens are used where a name starts with
"tiny-". What was measured is kept in the files, so other library versions may write other numbers of the same worth.
"""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import save_file
from torch.nn.functional import cross_entropy

HERE = Path(__file__).resolve().parent
TINY = HERE.parent / "goldens"
PAD = 3
SIZES = dict(
    vocab_size=200, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=256, pad_token_id=PAD, bos_token_id=1, eos_token_id=2,
)
YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=64)

# name: configuration, type on disk
MODELS = {
    "gemma3": (transformers.Gemma3TextConfig(
        **SIZES, head_dim=16, sliding_window=16, query_pre_attn_scalar=24,
        layer_types=["sliding_attention", "full_attention"]), torch.float32),
    "llama-bias": (transformers.LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True), torch.float32),
    "llama-f16": (transformers.LlamaConfig(**SIZES), torch.float16),
    "llama-yarn": (transformers.LlamaConfig(**SIZES, rope_scaling=YARN), torch.float32),
    "qwen2-window": (transformers.Qwen2Config(
        **SIZES, use_sliding_window=True, sliding_window=8, max_window_layers=1), torch.float32),
}

QV = ["q_proj", "v_proj"]


def lora(**settings):
    return {"type": "lora", "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, **settings}


# name: model, method, settings of train() that differ from its defaults
RUNS = {
    "lora_save_embed_tied": ("tiny-llama-tied", lora(target_modules=QV, modules_to_save=["embed_tokens"]), {}),
    "lora_save_head_tied": ("tiny-llama-tied", lora(target_modules=QV, modules_to_save=["lm_head"]), {}),
    "lora_save_norms": ("tiny-llama", lora(target_modules=QV, modules_to_save=["norm", "input_layernorm"]), {}),
    "lora_target_head_tied": ("tiny-llama-tied", lora(target_modules=["q_proj", "lm_head"]), {}),
    "lora_embed_tied": ("tiny-llama-tied", lora(target_modules=["embed_tokens", "v_proj"]), {}),
    "lora_embed_gemma3": ("gemma3", lora(target_modules=["embed_tokens", "v_proj"]), {"length": 40}),
    "lora_all_linear_gemma2": ("tiny-gemma2", lora(target_modules="all-linear"),
                               {"accum": 2, "padded": True, "clip": 0.7}),
    "lora_regex_llama3": ("tiny-llama3", lora(target_modules=r".*layers\.1\..*(q|down)_proj"), {}),
    "lora_exclude": ("tiny-llama", lora(target_modules=["q_proj", "k_proj", "up_proj"],
                                        exclude_modules=["layers.0.self_attn.q_proj", "k_proj"]), {}),
    "lora_patterns_rslora": ("tiny-qwen3", lora(
        target_modules=["q_proj", "k_proj", "o_proj"], use_rslora=True,
        rank_pattern={r".*\.0\..*q_proj": 7, "k_proj": 3}, alpha_pattern={r"layers\.1\..*": 20}), {}),
    "lora_layers_pattern": ("tiny-llama", lora(target_modules=QV, layers_to_transform=0, layers_pattern="layers"), {}),
    "lora_rank_over_size": ("tiny-llama3", lora(target_modules=["k_proj", "v_proj"], r=24), {}),
    "lora_bias": ("llama-bias", lora(target_modules="all-linear"), {}),
    "lora_cosine_warmup": ("tiny-llama", lora(target_modules=QV), {"schedule": "cosine", "warmup": 2}),
    "lora_linear_warmup": ("tiny-llama", lora(target_modules=QV),
                           {"schedule": "linear", "warmup": 3, "betas": [0.8, 0.95], "eps": 1e-6}),
    "lora_padded_accum3_means": ("tiny-llama", lora(target_modules=QV),
                                 {"accum": 3, "mean": "micro_batches", "padded": True}),
    "lora_bf16": ("tiny-llama", lora(target_modules=QV), {"dtype": "bfloat16"}),
    "full_qwen2": ("tiny-qwen2", {"type": "full"}, {"lr": 1e-3, "weight_decay": 0.01}),
}


def write_json(path, value):
    path.write_text(json.dumps(value, indent=1) + "\n")


def versions():
    return {module.__name__: module.__version__ for module in (torch, transformers, peft)}


def make_model(name):
    torch.manual_seed(0)
    config, dtype = MODELS[name]
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
            else:
                parameter.mul_(6)  # logits that differ from each other
    model.to(dtype).save_pretrained(HERE / "models" / name)


def load(name, dtype=torch.float32):
    folder = (TINY if name.startswith("tiny-") else HERE) / "models" / name
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager")


def make_forward(name):
    folder = HERE / f"forward_{name}"
    folder.mkdir(exist_ok=True)
    model = load(name).eval()
    torch.manual_seed(5)
    ids = torch.randint(4, model.config.vocab_size, (2, 100))
    mask = torch.ones_like(ids)
    mask[1, 67:] = 0
    ids[mask == 0] = PAD
    labels = ids.masked_fill(mask == 0, -100)
    with torch.no_grad():
        out = model(input_ids=ids, attention_mask=mask, labels=labels, output_hidden_states=True)
    rows = {"sequence_0": [0, 1, 7, 31, 65, 99], "sequence_1": [0, 40, 66]}
    tensors = {"input_ids": ids, "labels": labels, "attention_mask": mask}
    for index, hidden in enumerate(out.hidden_states):
        tensors[f"hidden.{index}"] = hidden[0, :4].contiguous()
    for index in range(2):
        tensors[f"logits_sequence_{index}"] = out.logits[index, rows[f"sequence_{index}"]].contiguous()
    save_file(tensors, folder / "expected.safetensors")
    prompt = ids[0, :7].tolist()
    tokens, margin = list(prompt), float("inf")
    for _ in range(24):
        with torch.no_grad():
            last = model(input_ids=torch.tensor([tokens])).logits[0, -1]
        first, second = last.topk(2).values.tolist()
        margin = min(margin, first - second)
        tokens.append(int(last.argmax()))
    write_json(folder / "case.json", {
        "name": folder.name, "kind": "forward", "model": f"models/{name}", "compute_dtype": "float32",
        "task": "causal_lm", "logit_rows": rows,
        "greedy": {"prompt": prompt, "new_tokens": tokens[7:], "smallest_top2_margin": margin},
        "expected": {"loss": out.loss.item(), "tensors": "expected.safetensors"},
        "tolerance": {"loss_abs": 1e-5, "logits_abs": 1e-4}, "versions": versions(),
    })


def make_batches(vocab, count, length, padded):
    torch.manual_seed(7)
    ids = torch.randint(4, vocab, (count, 2, length))
    batches = {"input_ids": ids, "labels": ids.clone()}
    if padded:
        ends = torch.randint(length // 3, length + 1, (count, 2, 1))
        mask = (torch.arange(length) < ends).long()
        ids[mask == 0] = PAD
        batches["labels"][mask == 0] = -100
        batches["attention_mask"] = mask
    return batches


def with_adapter(model, method, folder):
    settings = {key: value for key, value in method.items() if key != "type"}
    model = peft.get_peft_model(model, peft.LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name or "lora_embedding_A" in name:
                parameter.normal_(0, 0.03)  # so that no gradient is zero
    model.save_pretrained(folder / "adapter_init")
    return model


def train(name, model_name, method, steps=8, accum=1, mean="tokens", clip=None, padded=False, schedule="constant",
          warmup=0, length=24, dtype="float32", lr=3e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
    folder = HERE / name
    folder.mkdir(exist_ok=True)
    model = load(model_name, getattr(torch, dtype))
    vocab = model.config.vocab_size
    batches = make_batches(vocab, steps * accum, length, padded)
    save_file(batches, folder / "batches.safetensors")
    is_lora = method["type"] == "lora"
    if is_lora:
        model = with_adapter(model, method, folder)
    model.train()
    trained = {key: value for key, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr, betas=betas, eps=eps, weight_decay=weight_decay)
    scheduler = transformers.get_scheduler(
        "constant_with_warmup" if schedule == "constant" else schedule, optimizer, warmup, steps)
    expected = {}

    def forward(index):
        batch = {key: value[index] for key, value in batches.items() if key != "labels"}
        logits = model(**batch).logits.float()
        targets = batches["labels"][index][:, 1:].reshape(-1)
        total = cross_entropy(logits[:, :-1].reshape(-1, vocab), targets, ignore_index=-100, reduction="sum")
        return logits, total, int((targets != -100).sum())

    def on_first_batch(what):
        with torch.no_grad():
            logits, total, count = forward(0)
        expected[f"logits_{what}"] = logits[:1, :8].clone()
        return total.item() / count

    initial_loss = on_first_batch("init")
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        indices = range(step * accum, (step + 1) * accum)
        all_tokens = sum(int((batches["labels"][index][:, 1:] != -100).sum()) for index in indices)
        loss = 0.0
        for index in indices:
            _, total, count = forward(index)
            part = total / (all_tokens if mean == "tokens" else count * accum)
            part.backward()
            loss += part.item()
        gradients = {key: value.grad for key, value in trained.items() if value.grad is not None}
        norm = sum((gradient.double() ** 2).sum() for gradient in gradients.values()).sqrt().item()
        if step == 0:
            kept = [key for key in gradients if is_lora or "layers.0" in key or "norm" in key]
            expected |= {"grad_step1." + key.replace(".default", ""): gradients[key].clone() for key in kept}
        if clip:
            for gradient in gradients.values():
                gradient.mul_(min(1.0, clip / (norm + 1e-6)))
        losses.append(loss)
        norms.append(norm)
        optimizer.step()
        scheduler.step()
    final_loss = on_first_batch("final")
    if is_lora:
        model.save_pretrained(folder / "adapter_final")
        for key, value in model.merge_and_unload().named_parameters():
            if "layers.0" in key and key.endswith(("q_proj.weight", "v_proj.weight")):
                expected["merged." + key] = value.detach().clone()
    else:
        save_file({key: value.detach().clone() for key, value in trained.items()}, folder / "final.safetensors")
    save_file({key: value.float().contiguous() for key, value in expected.items()}, folder / "expected.safetensors")
    for config in folder.glob("adapter_*/adapter_config.json"):
        write_json(config, json.loads(config.read_text()) | {"base_model_name_or_path": model_name})
    for card in folder.glob("adapter_*/README.md"):
        card.unlink()
    settings = {
        "steps": steps, "lr_schedule": schedule, "warmup_steps": warmup, "grad_accum": accum, "accum_mean": mean,
        "optimizer": {"name": "adamw", "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay},
    }
    write_json(folder / "case.json", {
        "name": name, "kind": "train", "model": f"models/{model_name}", "task": "causal_lm", "method": method,
        "train": settings | ({"max_grad_norm": clip} if clip else {}), "compute_dtype": dtype,
        "batches": "batches.safetensors",
        "expected": {"initial_loss_batch0": initial_loss, "losses": losses, "grad_norms": norms,
                     "final_loss_batch0": final_loss, "tensors": "expected.safetensors"},
        "trainable_parameters": sum(value.numel() for value in trained.values()),
        "tolerance": {"loss_abs_step1": 1e-5, "loss_abs": 3e-5, "grad_norm_rel": 1e-4, "final_logits_abs": 4e-4,
                      # the biases of the keys have no gradient but rounding, which Adam turns into whole steps
                      "final_rel_l2_all": 5e-2 if name == "full_qwen2" else 2e-4},
        "versions": versions(),
    })


def main():
    torch.set_num_threads(1)
    wanted = sys.argv[1:]
    for name in MODELS:
        if not (HERE / "models" / name).is_dir():
            make_model(name)
        if f"forward_{name}" in wanted or (not wanted and not (HERE / f"forward_{name}").is_dir()):
            make_forward(name)
    for name, (model, method, settings) in RUNS.items():
        if name in wanted or (not wanted and not (HERE / name).is_dir()):
            train(name, model, method, **settings)


if __name__ == "__main__":
    main()
