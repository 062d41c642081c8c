//! Adapters to go on from that do not fit or are damaged.

use serde_json::{Value, json};

use crate::workplace::Workplace;
use crate::{Row, train};

const CONFIG: &str = "adapter/adapter_config.json";
const TENSORS: &str = "adapter/adapter_model.safetensors";

fn with_key(place: &Workplace, key: &str, value: Value) {
    place.with_adapter();
    place.json(CONFIG, |config| config[key] = value);
}

pub(crate) const ROWS: &[Row] = &[
    train("no such adapter", 2, &["init_adapter is \"nowhere\"", "holds no adapter_config.json"], |place| {
        place.config("device = \"cpu\"", "device = \"cpu\"\ninit_adapter = \"nowhere\"");
    }),
    train(
        "no tensors",
        1,
        &["cannot use the adapter adapter", "adapter_model.safetensors", "No such file", "hint: "],
        |place| {
            place.with_adapter();
            place.remove(TENSORS);
        },
    ),
    train(
        "damaged tensors",
        1,
        &["adapter/adapter_model.safetensors: not a usable safetensors file", "hint: "],
        |place| {
            place.with_adapter();
            place.write(TENSORS, "junk junk junk junk");
        },
    ),
    train(
        "another rank",
        1,
        &["layers.0.self_attn.q_proj.lora_A.weight: expected shape [7, 64], got [4, 64]", "hint: "],
        |place| {
            with_key(place, "r", json!(7));
        },
    ),
    train(
        "other modules",
        1,
        &[
            "layers.0.self_attn.k_proj.lora_A.weight: missing from the file",
            "q_proj.lora_A.weight [4, 64]: no such module is adapted",
            "hint: ",
        ],
        |place| with_key(place, "target_modules", json!(["k_proj"])),
    ),
    train(
        "made for another model",
        1,
        &["layers.0.self_attn.q_proj.lora_A.weight: expected shape [4, 64], got [8, 32]", "hint: "],
        |place| {
            place.with_adapter();
            place.tensors(TENSORS, |header, _| {
                header["base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"]["shape"] = json!([8, 32]);
            });
        },
    ),
    train(
        "another method",
        1,
        &["adapter_config.json: `peft_type`: expected one of \"LORA\", ", "got \"IA3\"", "hint: "],
        |place| {
            with_key(place, "peft_type", json!("IA3"));
        },
    ),
    train(
        "unsupported feature",
        1,
        &["adapter_config.json: `lora_bias`: is set to true, which is not supported", "hint: "],
        |place| {
            with_key(place, "lora_bias", json!(true));
        },
    ),
    train(
        "table of another method",
        2,
        &[
            "init_adapter = \"adapter\" holds a lora adapter, but the table is [adapter.pissa]",
            "hint: write [adapter.lora]",
        ],
        |place| {
            place.with_adapter();
            place.config("[adapter.lora]", "[adapter.pissa]");
        },
    ),
    train("trained biases", 1, &["adapter_config.json: `bias`: expected \"none\", got \"all\"", "hint: "], |place| {
        with_key(place, "bias", json!("all"));
    }),
    train("rank 0", 1, &["adapter_config.json: `r`: expected a rank of at least 1, got 0", "hint: "], |place| {
        with_key(place, "r", json!(0))
    }),
    train("rank is a text", 1, &["adapter_config.json: `r`: expected a whole number, got \"four\""], |place| {
        with_key(place, "r", json!("four"));
    }),
    train("targets match nothing", 1, &["target_modules [\"zzz\"] match no module", "q_proj", "hint: "], |place| {
        with_key(place, "target_modules", json!(["zzz"]));
    }),
    train("configuration is no JSON", 1, &["adapter_config.json: not valid JSON", "hint: "], |place| {
        place.with_adapter();
        place.write(CONFIG, "{");
    }),
];
