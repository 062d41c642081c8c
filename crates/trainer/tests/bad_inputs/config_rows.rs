//! Configurations that cannot work.

use crate::workplace::Workplace;
use crate::{Row, train};

/// Adds a line to `[adapter.lora]`.
fn lora(place: &Workplace, line: &str) {
    place.config("r = 4", &format!("r = 4\n{line}"));
}

/// Puts another table in the place of `[adapter.lora]`.
fn adapter(place: &Workplace, table: &str) {
    place.config("[adapter.lora]\nr = 4\n", table);
}

/// A run on images with a ResNet.
fn resnet(place: &Workplace) {
    place.remove("model");
    place.copy("models/tiny-resnet", "model");
    for class in ["red", "blue"] {
        place.copy(&format!("../../../data/smoke/images/train/{class}"), &format!("images/{class}"));
    }
    place.config("base_model", "task = \"image_classification\"\nbase_model");
    place.config("\"data.jsonl\"", "\"images\"");
}

/// A row whose fault is an override.
const fn set(name: &'static str, arguments: &'static str, says: &'static [&'static str]) -> Row {
    Row { name, prepare: |_| {}, arguments, exit_code: 2, says }
}

pub(crate) const ROWS: &[Row] = &[
    train(
        "no such configuration",
        2,
        &["cannot read the configuration file run.toml", "No such file", "hint: "],
        |place| {
            place.remove("run.toml");
        },
    ),
    train("no TOML", 2, &["run.toml, line 17, column", "not valid TOML", "17 | [oops"], |place| {
        place.config("progress = \"plain\"\n", "\n[oops\n");
    }),
    train("configuration is no UTF-8", 2, &["run.toml", "UTF-8"], |place| {
        place.write("run.toml", b"seed = 1 # \xff\n")
    }),
    train(
        "unknown key at the top level",
        2,
        &[
            "run.toml, line 4, column 1: unknown key `base_modle` at the top level",
            "hint: did you mean `base_model`?",
            "Valid keys here: ",
        ],
        |place| place.config("device = \"cpu\"", "device = \"cpu\"\nbase_modle = \"x\""),
    ),
    train(
        "unknown key in a table",
        2,
        &[
            "unknown key `micro_batchsize` in [training]",
            "hint: did you mean `micro_batch_size`?",
            "Valid keys here: max_steps",
        ],
        |place| place.config("max_steps = 1", "max_steps = 1\nmicro_batchsize = 2"),
    ),
    train(
        "wrong type",
        2,
        &["run.toml, line 6, column 5: `adapter.lora.r`: expected a whole number", "got string \"four\""],
        |place| {
            place.config("r = 4", "r = \"four\"");
        },
    ),
    train("negative count", 2, &["`training.max_steps`: expected a whole number, 0 or more", "-3"], |place| {
        place.config("max_steps = 1", "max_steps = -3");
    }),
    train("rank 0", 2, &["run.toml: adapter.lora.r is 0, must be at least 1"], |place| place.config("r = 4", "r = 0")),
    train(
        "negative learning rate",
        2,
        &["optimizer.adamw.learning_rate is -0.0001, must be greater than 0"],
        |place| {
            place.config("[logging]", "[optimizer.adamw]\nlearning_rate = -1e-4\n[logging]");
        },
    ),
    train(
        "learning rate is no number",
        2,
        &["optimizer.adamw.learning_rate is NaN, must be greater than 0"],
        |place| {
            place.config("[logging]", "[optimizer.adamw]\nlearning_rate = nan\n[logging]");
        },
    ),
    train("two lengths", 2, &["training.max_steps and training.num_epochs are both set: keep one"], |place| {
        place.config("max_steps = 1", "max_steps = 1\nnum_epochs = 1");
    }),
    train("no length", 2, &["training.max_steps is missing: set it, or training.num_epochs"], |place| {
        place.config("max_steps = 1", "");
    }),
    train(
        "several faults are listed together",
        2,
        &["adapter.lora.r is 0", "training.micro_batch_size is 0"],
        |place| {
            place.config("r = 4", "r = 0");
            place.config("max_steps = 1", "max_steps = 1\nmicro_batch_size = 0");
        },
    ),
    train("warm-up longer than the run", 2, &["training.warmup_steps is 9, must be at most max_steps (1)"], |place| {
        place.config("max_steps = 1", "max_steps = 1\nwarmup_steps = 9");
    }),
    train("rows too short", 2, &["data.max_seq_length is 1, must be at least 4"], |place| {
        place.config("max_seq_length = 32", "max_seq_length = 1");
    }),
    train(
        "sizes beyond reason",
        2,
        &[
            "data.max_seq_length is 1000000000000, must be at most 1048576",
            "training.micro_batch_size is 1000000000000, must be at most 65536",
            "training.gradient_accumulation_steps is 1000000000000, must be at most 1048576",
        ],
        |place| {
            place.config("max_seq_length = 32", "max_seq_length = 1000000000000");
            place.config(
                "max_steps = 1",
                "max_steps = 1\nmicro_batch_size = 1000000000000\ngradient_accumulation_steps = 1000000000000",
            );
        },
    ),
    train(
        "unknown number format",
        2,
        &["`dtype`: unknown value \"f64\"", "hint: valid values here: f32, bf16, f16"],
        |place| {
            place.config("device = \"cpu\"", "dtype = \"f64\"");
        },
    ),
    set(
        "unknown key on the command line",
        "--config run.toml --set trainig.max_steps=3",
        &["--set trainig.max_steps=3: unknown key `trainig`", "hint: did you mean `training`?"],
    ),
    set(
        "override without a value",
        "--config run.toml --set seed",
        &["--set seed: there is no `=`", "hint: write --set key=value"],
    ),
    set("override is no TOML", "--config run.toml --set seed=[1", &["--set seed=[1: not a TOML value: unclosed array"]),
    set(
        "override of the wrong type",
        "--config run.toml --set seed=true",
        &["--set seed=true", "expected a whole number"],
    ),
    train(
        "unknown adapter method",
        2,
        &["unknown method `lara` in [adapter]", "hint: did you mean `lora`?"],
        |place| {
            place.config("[adapter.lora]", "[adapter.lara]");
        },
    ),
    train(
        "key of another adapter method",
        2,
        &["unknown key `lora_alpha` in [adapter.vera]", "hint: valid keys here: r, d_initial, vera_dropout"],
        |place| adapter(place, "[adapter.vera]\nlora_alpha = 8\n"),
    ),
    train(
        "two densities",
        2,
        &["adapter.randlora.sparse and adapter.randlora.very_sparse are both set", "keep one"],
        |place| adapter(place, "[adapter.randlora]\nsparse = true\nvery_sparse = true\n"),
    ),
    train(
        "another scale than the method's",
        2,
        &["adapter.lora_sb.lora_alpha is 16, must be r (8): only at a scale of 1"],
        |place| adapter(place, "[adapter.lora_sb]\nr = 8\nlora_alpha = 16\n"),
    ),
    train("a block that cannot turn", 2, &["adapter.oft.oft_block_size is 1, must be at least 2"], |place| {
        adapter(place, "[adapter.oft]\noft_block_size = 1\n");
    }),
    train(
        "several ranks of 0",
        2,
        &[
            "1. adapter.tucker.dropout is 1, must be at least 0 and less than 1",
            "2. adapter.tucker.r_in is 0, must be at least 1",
            "3. adapter.tucker.r_rows is 0, must be at least 1",
            "4. adapter.tucker.scale is 0, must be greater than 0",
        ],
        |place| adapter(place, "[adapter.tucker]\nr_in = 0\nr_rows = 0\nscale = 0\ndropout = 1\n"),
    ),
    train(
        "convolutions with a method for linear layers",
        2,
        &[
            "[adapter.vera] does not fit the model",
            "vera cannot adapt resnet.embedder.embedder.convolution: it is a convolution",
            "hint: use lora or tucker",
        ],
        |place| {
            resnet(place);
            adapter(place, "[adapter.vera]\ntarget_modules = [\"convolution\"]\n");
        },
    ),
    train(
        "no calibration for a method that cannot start",
        2,
        &["[adapter.corda] does not fit the model", "corda cannot adapt resnet.embedder.embedder.convolution"],
        |place| {
            resnet(place);
            adapter(place, "[adapter.corda]\ntarget_modules = [\"convolution\"]\n");
        },
    ),
    train(
        "unknown part of the spectrum",
        2,
        &["`adapter.corda.corda_method`: unknown value \"kmp\"", "hint: did you mean `kpm`?"],
        |place| adapter(place, "[adapter.corda]\ncorda_method = \"kmp\"\n"),
    ),
    train(
        "a repair without a fault",
        2,
        &["[adapter.eora] repairs what a quantised base lost, and there is no [quantization] table"],
        |place| adapter(place, "[adapter.eora]\nr = 4\n"),
    ),
    train(
        "calibration for nothing",
        2,
        &["[calibration] is set, but [adapter.lora] does not: only corda, eora and lora_sb start from measured data"],
        |place| place.config("[data]", "[calibration]\nsamples = 8\n\n[data]"),
    ),
    train(
        "a repair's calibration without a repair",
        2,
        &[
            "calibration.sequential is true, but only [adapter.eora] repairs layers that others could be measured behind",
        ],
        |place| adapter(place, "[adapter.corda]\nr = 4\n\n[calibration]\nsequential = true\n"),
    ),
    train("calibration without samples", 2, &["calibration.samples is 0, must be at least 1"], |place| {
        adapter(place, "[adapter.corda]\nr = 4\n\n[calibration]\nsamples = 0\n");
    }),
    train(
        "quantised weights that are trained",
        2,
        &["[quantization.nf4] holds frozen weights, but without [adapter] every weight is trained: add an adapter"],
        |place| adapter(place, "[quantization.nf4]\n"),
    ),
    train(
        "quantised twice",
        2,
        &["[quantization.int8] holds frozen weights, and [optimizer.q_galore] trains all of them", "q_galore.weights"],
        |place| adapter(place, "[quantization.int8]\n\n[optimizer.q_galore]\n"),
    ),
    train(
        "odd groups",
        2,
        &["quantization.int4.group_size is 100, must be a power of two between 32 and 4096"],
        |place| place.config("[data]", "[quantization.int4]\ngroup_size = 100\n\n[data]"),
    ),
    train(
        "unknown quantisation",
        2,
        &["unknown method `nf5` in [quantization]", "hint: did you mean `nf4`?"],
        |place| place.config("[data]", "[quantization.nf5]\n\n[data]"),
    ),
    train("two adapter methods", 2, &["run.toml", "adapter"], |place| {
        place.config("[data]", "[adapter.vera]\nr = 2\n[data]")
    }),
    train(
        "targets match nothing",
        2,
        &["target_modules [\"q_porj\"] match no module", "q_proj, k_proj", "hint: use \"all-linear\""],
        |place| {
            lora(place, "target_modules = [\"q_porj\"]");
        },
    ),
    train(
        "target pattern is no expression",
        2,
        &["adapter.lora.target_modules: \"(q_proj\" is not a regular expression: unclosed group"],
        |place| {
            lora(place, "target_modules = \"(q_proj\"");
        },
    ),
    train("no such layer", 2, &["layers_to_transform [9]", "match no module", "2 blocks, numbered from 0"], |place| {
        lora(place, "target_modules = [\"q_proj\"]\nlayers_to_transform = [9]");
    }),
    train(
        "rank over the layer",
        2,
        &[
            "r = 65 is larger than",
            "model.layers.0.self_attn.q_proj",
            "it maps 64 to 64, so r can be at most 64",
            "hint: lower r",
        ],
        |place| {
            place.config("r = 4", "r = 65");
        },
    ),
    train("nothing to save", 2, &["modules_to_save names \"lm_haed\"", "hint: ", "\"lm_head\""], |place| {
        lora(place, "modules_to_save = [\"lm_haed\"]");
    }),
    train("unknown device", 2, &["device is \"tpu\", expected auto, cpu, cuda"], |place| {
        place.config("\"cpu\"", "\"tpu\"")
    }),
    train("device index is no number", 2, &["device is \"cpu:x\", expected auto, cpu"], |place| {
        place.config("\"cpu\"", "\"cpu:x\"")
    }),
    train("device is not there", 2, &["device \"cuda:99\" ", "hint: ", "device = \"auto\""], |place| {
        place.config("\"cpu\"", "\"cuda:99\"")
    }),
    train("graphics card is not there", 2, &["device \"wgpu:99\" ", "hint: ", "device = \"auto\""], |place| {
        place.config("\"cpu\"", "\"wgpu:99\"")
    }),
];
