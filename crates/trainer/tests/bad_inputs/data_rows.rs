//! Data files that are missing, damaged or hold records that cannot be used.

use crate::workplace::Workplace;
use crate::{Row, train};

fn records(place: &Workplace, content: impl AsRef<[u8]>) {
    place.write("data.jsonl", content);
}

/// Other data under another name.
fn other(place: &Workplace, name: &str, content: &[u8]) {
    place.config("data.jsonl", name);
    place.write(name, content);
}

pub(crate) const ROWS: &[Row] = &[
    train(
        "no such file",
        2,
        &["cannot read the data", "cannot read data.jsonl: No such file", "hint: relative paths"],
        |place| {
            place.remove("data.jsonl");
        },
    ),
    train("empty file", 1, &["data.jsonl: the file holds no records", "hint: "], |place| records(place, "")),
    train("blank lines only", 1, &["data.jsonl: the file holds no records", "hint: "], |place| {
        records(place, "\n \n\n")
    }),
    train("malformed line", 1, &["data.jsonl:2: not valid JSON at column 8", "hint: "], |place| {
        records(place, "{\"text\": \"one two\"}\n{\"text\":\n");
    }),
    train("line is no object", 1, &["data.jsonl:2: ", "hint: "], |place| {
        records(place, "{\"text\": \"one two\"}\n[1, 2]\n")
    }),
    train(
        "format cannot be told",
        1,
        &["data.jsonl:1", "it has the fields `prompt`", "expected `text`", "hint: name the fields"],
        |place| {
            records(place, "{\"prompt\": \"a\"}\n");
        },
    ),
    train("missing field", 1, &["data.jsonl:2: field `text`: is missing", "hint: repair the record"], |place| {
        records(place, "{\"text\": \"one two\"}\n{\"txet\": \"a\"}\n");
    }),
    train(
        "field of the wrong type",
        1,
        &["data.jsonl:1: field `text`: expected a string, found a number (7)", "hint: "],
        |place| {
            records(place, "{\"text\": 7}\n");
        },
    ),
    train("invalid UTF-8", 1, &["data.jsonl:2: not valid UTF-8: byte 10 is 0xff", "hint: convert the file"], |place| {
        records(place, b"{\"text\": \"one two\"}\n{\"text\": \"\xff\xfe\"}\n");
    }),
    train("NUL bytes", 1, &["data.jsonl:1", "hint: "], |place| records(place, [0; 64])),
    train("empty completion", 1, &["data.jsonl:1: field `completion`: is empty", "hint: "], |place| {
        records(place, "{\"prompt\": \"a\", \"completion\": \"\"}\n");
    }),
    train(
        "prompt longer than a row",
        1,
        &[
            "data.jsonl:1: no token counts in the loss: the answer begins after the first 32 tokens",
            "hint: raise max_seq_length",
        ],
        |place| records(place, format!("{{\"prompt\": \"{}\", \"completion\": \"x\"}}\n", "word ".repeat(200))),
    ),
    train(
        "messages without a template",
        1,
        &["data.jsonl: has `messages`, but the model has no chat template", "hint: "],
        |place| {
            records(
                place,
                "{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}, {\"role\": \"assistant\", \"content\": \"b\"}]}\n",
            );
        },
    ),
    train("nothing left after skipping", 1, &["no usable record: all 2 were skipped", "hint: "], |place| {
        place.config("max_seq_length = 32", "max_seq_length = 32\non_bad_record = \"skip\"\nformat = \"text\"");
        records(place, "{\"txt\": 1}\n{\"txt\": 2}\n");
    }),
    train(
        "unknown ending",
        1,
        &["data.csv: cannot tell the kind of file from the ending `csv`", "hint: rename it to one of .jsonl"],
        |place| {
            other(place, "data.csv", b"text\nabc\n");
        },
    ),
    train("data is a folder", 2, &["cannot read model: Is a directory", "hint: "], |place| {
        place.config("\"data.jsonl\"", "\"model\"")
    }),
    train("array cut off", 1, &["data.json: not valid JSON", "line 1 column 14", "hint: "], |place| {
        other(place, "data.json", b"[{\"text\": \"a\"}");
    }),
    train("damaged Parquet", 1, &["data.parquet: not a usable Parquet file", "hint: "], |place| {
        other(place, "data.parquet", b"PAR1 and then nothing of use PAR1");
    }),
    train(
        "everything held out",
        2,
        &["data.val_set_size holds out 3 of 3 records", "nothing is left to train on"],
        |place| {
            place.config("max_seq_length = 32", "max_seq_length = 32\nval_set_size = 3");
        },
    ),
    train("no such file to evaluate on", 2, &["cannot read held-out.jsonl: No such file", "hint: "], |place| {
        place.config("max_seq_length = 32", "max_seq_length = 32\neval = \"held-out.jsonl\"");
    }),
];
