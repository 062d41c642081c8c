#!/usr/bin/env python3
"""Write docs/config.md, the reference of all configuration keys, from the comments of the structs that hold them.

    make_config_docs.py [--check]        --check: write nothing, exit status 1 if the file is not up to date
"""
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "crates/trainer/src/config"
SOURCES = (f"{CONFIG}/raw.rs", f"{CONFIG}/adapter.rs", f"{CONFIG}/quantization.rs", f"{CONFIG}/calibration.rs",
           f"{CONFIG}/classification.rs",
           f"{CONFIG}/optimizer.rs", "crates/trainer/src/data/mod.rs")
OUT = ROOT / "docs" / "config.md"
TABLES = [  # struct, its table in the file, a line about it
    ("RunConfig", "top level", "These keys come before the first table."),
    ("LoraConfig", "[adapter.lora]", "Leave the table out to train every weight. docs/adapters.md compares the methods."),
    ("DoraConfig", "[adapter.dora]", ""),
    ("PissaConfig", "[adapter.pissa]", ""),
    ("OloraConfig", "[adapter.olora]", ""),
    ("CordaConfig", "[adapter.corda]", "Calibrates on the training data."),
    ("EoraConfig", "[adapter.eora]", "Calibrates on the training data."),
    ("LoraXsConfig", "[adapter.lora_xs]", ""),
    ("LoraSbConfig", "[adapter.lora_sb]", "Calibrates on the training data."),
    ("SvfitConfig", "[adapter.svfit]", ""),
    ("VeraConfig", "[adapter.vera]", ""),
    ("RandloraConfig", "[adapter.randlora]", ""),
    ("TuckerConfig", "[adapter.tucker]", ""),
    ("HraConfig", "[adapter.hra]", ""),
    ("OftConfig", "[adapter.oft]", ""),
    ("Nf4Config", "[quantization.nf4]", "Holds the frozen weights beside an adapter in fewer bits."),
    ("Int8Config", "[quantization.int8]", ""),
    ("Int4Config", "[quantization.int4]", ""),
    ("CalibrationConfig", "[calibration]", "For `corda`, `eora` and `lora_sb`."),
    ("ClassificationConfig", "[classification]", "For `sequence_classification` and `image_classification`."),
    ("AdamWConfig", "[optimizer.adamw]", ""),
    ("GaloreConfig", "[optimizer.galore]", "Trains the whole model; targets by low-rank gradients, the rest by AdamW."),
    ("QGaloreConfig", "[optimizer.q_galore]", ""),
    ("DctAdamwConfig", "[optimizer.dct_adamw]", ""),
    ("ApolloConfig", "[optimizer.apollo]", ""),
    ("FiraConfig", "[optimizer.fira]", ""),
    ("LdadamConfig", "[optimizer.ldadam]", ""),
    ("IntrinsicConfig", "[optimizer.intrinsic]", "Measures an intrinsic dimension: how few numbers can train the model."),
    ("DataConfig", "[data]", ""),
    ("TrainingConfig", "[training]", ""),
    ("LoggingConfig", "[logging]", ""),
    ("EvaluationConfig", "[evaluation]", ""),
]
LIKE = ("LoraConfig", "`[adapter.lora]`")  # the adapter table that explains the keys that most have
TYPES = {
    "String": "text", "PathBuf": "path", "bool": "true or false", "f64": "number", "u64": "whole number",
    "usize": "whole number", "u8": "whole number", "Vec<String>": "list of texts", "Vec<usize>": "list of whole numbers",
    "[f64; 2]": "two numbers", "BTreeMap<String, usize>": "table of whole numbers",
    "BTreeMap<String, f64>": "table of numbers", "BTreeMap<String, String>": "table of texts",
    "TargetModules": "text or list of texts", "Paths": "path or list of paths",
    "ValSetSize": "whole number or fraction", "ResumeFrom": "true, false or path",
}
UNTAGGED = ("TargetModules",)  # values of several kinds: the comments of the variants tell them apart
HEAD = """# Configuration

<!-- Written by scripts/make_config_docs.py from the comments in the source: change those. -->

A run is one TOML file; `--set table.key=value` overrides a key. Unknown keys are errors that name the valid ones, and all
problems of a file are reported together. Relative paths start at the folder the program is started in. A table like
`[adapter.lora]` both chooses the method and holds its settings. The smallest file:

```toml
base_model = "models/smollm2-135m-instruct"
output_dir = "runs/first"

[adapter.lora]

[data]
train = "data/demo/train.jsonl"

[training]
max_steps = 100
```
"""


def items(text, keyword):
    """Name -> body of every `pub struct` or `pub enum`."""
    return {match[1]: match[2] for match in re.finditer(rf"^pub {keyword} (\w+) \{{\n(.*?)^\}}", text, re.M | re.S)}


def equations(text):
    """Struct -> what its comment says of an adapter table."""
    found = {}
    for match in re.finditer(r"^((?:/// .*\n)+)(?:#\[.*\n)*pub struct (\w+) ", text, re.M):
        comment = " ".join(line.removeprefix("///").strip() for line in match[1].splitlines())
        if told := re.match(r"`\[adapter\.\w+\]`: (.*)", comment):
            found[match[2]] = told[1][:1].upper() + told[1][1:]
    return found


def members(body, pattern):
    """(match of the member, its comment as one line) for every member, in order."""
    comment = []
    for line in body.splitlines():
        line = line.strip()
        if line.startswith("///"):
            comment.append(line.removeprefix("///").strip())
        elif match := re.match(pattern, line):
            yield match, " ".join(comment)
            comment = []
        elif not line.startswith(("#[", "//")):
            comment = []


def snake(name):
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def choices(body):
    """Lines for the values of an enum that is written as a word."""
    values = [(f'`"{snake(match[1])}"`', comment) for match, comment in members(body, r"(\w+),$")]
    return [f"- {comment}" if comment.startswith(value) else f"- {value}: {comment}" for value, comment in values]


def table(struct, enums, known=()):
    """Markdown of one struct: a row for each key, then the values of keys that are a choice. `known` are rows that stand
    elsewhere already: their keys are only named. Returns the lines and the rows."""
    rows, lists, same = [], [], []
    for match, comment in members(struct, r"pub (\w+): (.+),$"):
        key, kind = match[1], re.sub(r"^Option<(.*)>$", r"\1", match[2])
        if kind.endswith("Config"):
            continue
        comment = re.sub(r"\[`([^`]+)`\]", r"`\1`", comment).replace("|", "\\|")
        values = choices(enums[kind]) if kind in enums and kind not in TYPES else []
        if not values and kind not in TYPES:
            sys.exit(f"error: no words for the type {kind} of {key}: add it to TYPES")
        row = f"| `{key}` | {TYPES.get(kind, 'choice')} | {comment} |"
        if row in known:
            same.append(f"`{key}`")
            continue
        rows.append(row)
        if kind in UNTAGGED and key == "target_modules":
            values = [f"- {variant}" for _, variant in members(enums[kind], r"\w+\(.*\),$")]
        if values:
            lists += [f"\n`{key}`:"] + values
    if same:
        lists = ["", f"As in {LIKE[1]}: {', '.join(same)}.", *lists]
    head = ["| key | value | meaning |", "| --- | --- | --- |"] if rows else []
    return (head + rows + lists if rows else lists[1:]), rows


def render():
    text = "\n".join((ROOT / source).read_text(encoding="utf-8") for source in SOURCES)
    structs, enums = items(text, "struct"), items(text, "enum")
    lines = [HEAD.rstrip("\n")]
    rows, told = {}, equations(text)
    for struct, name, note in TABLES:
        known = rows.get(LIKE[0], ()) if name.startswith("[adapter.") else ()
        body, rows[struct] = table(structs[struct], enums, known)
        note = " ".join(filter(None, (told.get(struct), note)))
        lines += ["", f"## {name}", ""] + ([note, ""] if note else []) + body
    return "\n".join(lines) + "\n"


def main():
    text = render()
    if sys.argv[1:] == ["--check"]:
        if not OUT.is_file() or OUT.read_text(encoding="utf-8") != text:
            sys.exit("error: docs/config.md is not up to date\nhint: scripts/make_config_docs.py")
        return
    OUT.parent.mkdir(exist_ok=True)
    OUT.write_text(text, encoding="utf-8")
    print(f"wrote {OUT.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
