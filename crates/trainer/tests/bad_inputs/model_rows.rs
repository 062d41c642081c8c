//! Damaged checkpoints, model configurations and tokenizers.

use serde_json::{Value, json};

use crate::workplace::Workplace;
use crate::{Row, train};

const FILE: &str = "model/model.safetensors";
const INDEX: &str = "model/model.safetensors.index.json";
const QUERY: &str = "model.layers.0.self_attn.q_proj.weight";

/// Bytes of a table of 16 words.
const TABLE: usize = 16 * 64 * 4;

fn point_norm_at(place: &Workplace, shard: &str) {
    place.with_shards();
    place.json(INDEX, |index| index["weight_map"]["model.norm.weight"] = json!(shard));
}

fn model_config(place: &Workplace, key: &str, value: Value) {
    place.json("model/config.json", |config| config[key] = value);
}

pub(crate) const ROWS: &[Row] = &[
    train(
        "truncated weights",
        1,
        &[
            "cannot load the model in model",
            "model/model.safetensors",
            "describes 541952 bytes of tensors, but the file holds 2",
            "hint: ",
        ],
        |place| place.bytes(FILE, |bytes| bytes.truncate(bytes.len() / 2)),
    ),
    train("empty weights", 1, &["model/model.safetensors: 0 bytes long", "at least the 8 bytes", "hint: "], |place| {
        place.write(FILE, "")
    }),
    train("weights cut inside the length", 1, &["model/model.safetensors: 5 bytes long", "hint: "], |place| {
        place.write(FILE, "abcde")
    }),
    train(
        "header is no JSON",
        1,
        &["model/model.safetensors", "the header is not valid", "line 1 column 1", "hint: "],
        |place| {
            place.bytes(FILE, |bytes| bytes[8..12].copy_from_slice(b"####"));
        },
    ),
    train(
        "header is no UTF-8",
        1,
        &["model/model.safetensors", "the header is not text: invalid utf-8", "hint: "],
        |place| {
            place.bytes(FILE, |bytes| bytes[12] = 0xff);
        },
    ),
    train(
        "header length is a lie, too long",
        1,
        &["the header claims 1099511627776 bytes, more than the format allows", "hint: "],
        |place| {
            place.bytes(FILE, |bytes| bytes[..8].copy_from_slice(&(1u64 << 40).to_le_bytes()));
        },
    ),
    train(
        "header length is a lie, the largest number",
        1,
        &["the header claims 18446744073709551615 bytes", "hint: "],
        |place| {
            place.bytes(FILE, |bytes| bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes()));
        },
    ),
    train(
        "header length is a lie, too short",
        1,
        &["model/model.safetensors", "the header is not valid", "hint: "],
        |place| {
            place.bytes(FILE, |bytes| bytes[..8].copy_from_slice(&100u64.to_le_bytes()));
        },
    ),
    train(
        "overlapping tensors",
        1,
        &["model/model.safetensors", "tensor `model.embed_tokens.weight`", "offsets overlap", "hint: "],
        |place| {
            place.tensors(FILE, |header, _| {
                let span = &mut header["model.embed_tokens.weight"]["data_offsets"];
                *span = json!([span[0].as_u64().unwrap() - 4, span[1].as_u64().unwrap() - 4]);
            });
        },
    ),
    train(
        "shape and offsets disagree",
        1,
        &[QUERY, "4096 elements of BF16 take 8192 bytes, but its offsets span 16384", "hint: "],
        |place| {
            place.tensors(FILE, |header, _| header[QUERY]["dtype"] = json!("BF16"));
        },
    ),
    train("shape overflows", 1, &["model/model.safetensors", QUERY, "hint: "], |place| {
        place.tensors(FILE, |header, _| header[QUERY]["shape"] = json!([u64::MAX, u64::MAX]));
    }),
    train(
        "quantised weights",
        1,
        &[QUERY, "expected F32, F16 or BF16, got I8", "hint: this looks like a quantised checkpoint"],
        |place| {
            place.tensors(FILE, |header, _| {
                header[QUERY]["dtype"] = json!("I8");
                header[QUERY]["shape"] = json!([64, 256]);
            });
        },
    ),
    train("wrong shape", 1, &[QUERY, "expected [64, 64], got [32, 128]", "hint: "], |place| {
        place.tensors(FILE, |header, _| header[QUERY]["shape"] = json!([32, 128]));
    }),
    train(
        "missing tensor",
        1,
        &["model/model.safetensors", "missing: 1", "model.norm.weight [64]", "hint: "],
        |place| {
            place.tensors(FILE, |header, data| {
                header.remove("model.norm.weight");
                data.truncate(data.len() - 64 * 4); // it is the last one
            });
        },
    ),
    train("extra tensor", 1, &["not expected: 1", "model.odd.weight", "hint: "], |place| {
        place.tensors(FILE, |header, data| {
            let end = data.len();
            header.insert(
                "model.odd.weight".into(),
                json!({"dtype": "F32", "shape": [1], "data_offsets": [end, end + 4]}),
            );
            data.extend([0; 4]);
        });
    }),
    train(
        "shard missing",
        1,
        &["model.safetensors.index.json", "shard model-00002-of-00004.safetensors is missing", "hint: "],
        |place| {
            place.with_shards();
            place.remove("model/model-00002-of-00004.safetensors");
        },
    ),
    train(
        "truncated shard",
        1,
        &["model/model-00003-of-00004.safetensors", "not a usable safetensors file", "hint: "],
        |place| {
            place.with_shards();
            place.bytes("model/model-00003-of-00004.safetensors", |bytes| bytes.truncate(90_000));
        },
    ),
    train(
        "index leaves the folder",
        1,
        &["model.safetensors.index.json", "`../data.jsonl` is not a file inside the folder"],
        |place| {
            point_norm_at(place, "../data.jsonl");
        },
    ),
    train(
        "index names the wrong shard",
        1,
        &["tensor `model.norm.weight` is not in model-00001-of-00004.safetensors", "hint: "],
        |place| {
            point_norm_at(place, "model-00001-of-00004.safetensors");
        },
    ),
    train(
        "index is no JSON",
        1,
        &["model.safetensors.index.json: not valid JSON", "line 1 column 15", "hint: "],
        |place| {
            place.with_shards();
            place.write(INDEX, "{\"weight_map\": ");
        },
    ),
    train(
        "only pickled weights",
        1,
        &["model has no model.safetensors", "it holds: ", "pytorch_model.bin", "hint: ", "convert"],
        |place| {
            place.rename(FILE, "model/pytorch_model.bin");
        },
    ),
    train(
        "no config.json",
        1,
        &["model/config.json", "No such file", "hint: base_model must be a folder with config.json"],
        |place| {
            place.remove("model/config.json");
        },
    ),
    train("config.json is no JSON", 1, &["model/config.json: not valid JSON", "line 1 column", "hint: "], |place| {
        place.write("model/config.json", "{\"architectures\": [");
    }),
    train(
        "unknown architecture",
        1,
        &["model/config.json: unknown architecture MambaForCausalLM", "expected one of", "LlamaForCausalLM", "hint: "],
        |place| {
            model_config(place, "architectures", json!(["MambaForCausalLM"]));
            model_config(place, "model_type", json!("mamba"));
        },
    ),
    train(
        "heads do not divide",
        1,
        &["model/config.json", "`num_key_value_heads`", "expected a divisor of num_attention_heads (4), got 3"],
        |place| {
            model_config(place, "num_key_value_heads", json!(3));
        },
    ),
    train(
        "a text for a number",
        1,
        &["model/config.json", "`hidden_size`", "expected a whole number", "got \"64\" (a string)"],
        |place| {
            model_config(place, "hidden_size", json!("64"));
        },
    ),
    train(
        "more layers than weights",
        1,
        &["missing: 9", "model.layers.2.self_attn.q_proj.weight [64, 64]", "hint: "],
        |place| {
            model_config(place, "num_hidden_layers", json!(3));
        },
    ),
    train("huge numbers in config.json", 1, &["model/config.json"], |place| {
        model_config(place, "num_hidden_layers", json!(u64::MAX));
    }),
    train(
        "no tokenizer",
        1,
        &["model has no tokenizer.json", "it holds: config.json", "hint: copy tokenizer.json"],
        |place| {
            place.remove("model/tokenizer.json");
        },
    ),
    train("tokenizer cut off", 1, &["model/tokenizer.json: not a usable tokenizer", "hint: "], |place| {
        place.bytes("model/tokenizer.json", |bytes| bytes.truncate(bytes.len() / 2));
    }),
    train("tokenizer of an unknown kind", 1, &["model/tokenizer.json: not a usable tokenizer", "hint: "], |place| {
        place.write("model/tokenizer.json", "{\"version\": \"1.0\", \"model\": {\"type\": \"Odd\"}}");
    }),
    train(
        "tokenizer with more words than the model",
        1,
        &["model/tokenizer.json", "but the model's vocab_size is 16", "hint: "],
        |place| {
            model_config(place, "vocab_size", json!(16));
            place.tensors(FILE, |header, data| {
                // The two tables come first in the file; only the beginning of each stays.
                let rest = header["model.embed_tokens.weight"]["data_offsets"][1].as_u64().unwrap();
                let mut kept = data[..2 * TABLE].to_vec();
                kept.extend(&data[rest as usize..]);
                *data = kept;
                for tensor in header.values_mut().filter(|tensor| tensor.get("data_offsets").is_some()) {
                    let span = [0, 1].map(|end| tensor["data_offsets"][end].as_u64().unwrap());
                    tensor["data_offsets"] = json!(span.map(|at| (at + 2 * TABLE as u64).saturating_sub(rest)));
                }
                for (index, name) in ["lm_head.weight", "model.embed_tokens.weight"].into_iter().enumerate() {
                    header[name]["shape"] = json!([16, 64]);
                    header[name]["data_offsets"] = json!([index * TABLE, (index + 1) * TABLE]);
                }
            });
        },
    ),
    train(
        "weights that are no numbers",
        1,
        &["step 1: the loss is NaN", "data.jsonl:", "there is no checkpoint yet", "hint: "],
        |place| {
            place.tensors(FILE, |_, data| data[..4096].fill(0xff));
        },
    ),
    train("broken chat template", 1, &["chat_template.jinja", "hint: "], |place| {
        place.write("model/chat_template.jinja", "{% for message in messages %}{{ message.content }");
        place.write("data.jsonl", "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n");
    }),
    train(
        "no such model",
        2,
        &["base_model = \"nothing\" cannot be used", "no such folder, and not a hub id", "hint: "],
        |place| {
            place.config("\"model\"", "\"nothing\"");
        },
    ),
    train(
        "hub model without network",
        2,
        &["base_model = \"someone/something\"", "HF_HUB_OFFLINE", "hint: "],
        |place| {
            place.config("\"model\"", "\"someone/something\"");
        },
    ),
];
