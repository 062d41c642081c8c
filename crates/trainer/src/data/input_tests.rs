//! Tests of [`super::source`] and [`super::record`]: every kind of file, every kind of record, and one file per rejection.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::basic::Compression;
use parquet::data_type::{ByteArray, ByteArrayType};
use parquet::file::properties::WriterProperties;
use parquet::file::writer::SerializedFileWriter;
use parquet::schema::parser::parse_message_type;
use proptest::prelude::*;
use serde_json::{Value, json};
use tempfile::TempDir;

use super::testing::{chat_template, encoder, tokenizer, write};
use super::*;

fn read(path: &str, config: &DataConfig) -> Result<Vec<Record>, String> {
    let records = read_records(&[path.to_owned()], config)
        .map_err(|error| format!("{error}\nhint: {}", error.hint().unwrap_or_default()))?;
    Ok(records.into_iter().map(|located| located.record).collect())
}

fn read_bytes(name: &str, bytes: &[u8]) -> Result<Vec<Record>, String> {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, name, bytes);
    read(&path, &DataConfig::default()).map_err(|error| error.replace(&format!("{}/", folder.path().display()), ""))
}

fn pair(prompt: &str, completion: &str) -> Record {
    Record::PromptCompletion { prompt: prompt.to_owned(), completion: completion.to_owned() }
}

#[test]
fn every_format_is_told_from_its_keys() {
    let lines = b"\xef\xbb\xbf{\"text\": \"a\"}\r\n\r\n  {\"text\": \"b\", \"more\": 1}";
    assert_eq!(read_bytes("a.jsonl", lines).unwrap(), [Record::Text("a".into()), Record::Text("b".into())]);
    assert_eq!(
        read_bytes("a.ndjson", b"{\"prompt\": \"\", \"completion\": \"b\", \"text\": null}").unwrap(),
        [pair("", "b")]
    );
    assert_eq!(read_bytes("a.json", b" [{\"text\": \"a\"}, {\"text\": \"b\"}]").unwrap().len(), 2);
    assert_eq!(
        read_bytes("lines.json", b"{\"text\": \"a\"}\n{\"text\": \"b\"}\n").unwrap().len(),
        2,
        ".json with one object a line"
    );
    assert_eq!(
        read_bytes("a.txt", "\u{feff}A document.\n\nIts second paragraph.".as_bytes()).unwrap(),
        [Record::Text("A document.\n\nIts second paragraph.".into())]
    );

    let alpaca = br#"[{"instruction": "Add.", "input": "1 2", "output": "3", "text": "x"}, {"instruction": "Greet.", "input": "", "output": "Hi"}, {"instruction": "Greet.", "output": "Hi"}]"#;
    let records = read_bytes("a.json", alpaca).unwrap();
    let with_input = "Below is an instruction that describes a task, paired with an input that provides further context. Write a response that appropriately completes the request.\n\n### Instruction:\nAdd.\n\n### Input:\n1 2\n\n### Response:\n";
    let without = "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n### Instruction:\nGreet.\n\n### Response:\n";
    assert_eq!(records, [pair(with_input, "3"), pair(without, "Hi"), pair(without, "Hi")]);

    let chat = br#"{"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "name": null}, {"role": "assistant", "content": null, "tool_calls": []}], "tools": "[{\"name\": \"f\"}]"}"#;
    let expected = vec![json!({"role": "user", "content": "ab"}), json!({"role": "assistant", "tool_calls": []})];
    assert_eq!(
        read_bytes("a.jsonl", chat).unwrap(),
        [Record::Messages { messages: expected, tools: json!([{"name": "f"}]) }]
    );
}

#[test]
fn fields_are_renamed_and_formats_forced() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, "a.jsonl", b"{\"question\": \"q\", \"answer\": \"a\", \"text\": \"t\"}");
    let fields = [("prompt".to_owned(), "question".to_owned()), ("completion".to_owned(), "answer".to_owned())].into();
    let config = DataConfig { fields, ..DataConfig::default() };
    assert_eq!(read(&path, &config).unwrap(), [pair("q", "a")]);
    let config = DataConfig { format: Format::Text, ..config };
    assert_eq!(read(&path, &config).unwrap(), [Record::Text("t".into())]);
    let config = DataConfig { format: Format::Alpaca, ..config };
    assert!(read(&path, &config).unwrap_err().contains("a.jsonl:1: field `instruction`: is missing"));
}

#[test]
fn a_question_is_what_comes_before_the_last_answer() {
    let user = json!({"role": "user", "content": "q"});
    let messages = vec![user.clone(), json!({"role": "assistant", "content": "a"})];
    let chat = Record::Messages { messages, tools: Value::Null };
    assert_eq!(
        chat.question(),
        Some((Prompt::Chat { messages: vec![user.clone()], tools: Value::Null }, "a".to_owned()))
    );
    assert_eq!(pair("q", "a").question(), Some((Prompt::Text("q".to_owned()), "a".to_owned())));
    assert_eq!(Record::Text("t".into()).question(), None);
    assert_eq!(Record::Messages { messages: vec![user], tools: Value::Null }.question(), None);
}

/// One file per rule: name, content, and what the message must contain.
#[test]
fn bad_files_and_records_are_named() {
    let ok = "{\"prompt\": \"p\", \"completion\": \"c\"}\n";
    let after_ok = |line: &str| format!("{ok}{line}").into_bytes();
    let chat = |messages: &str| format!("{{\"messages\": {messages}}}").into_bytes();
    let cases: Vec<(&str, Vec<u8>, &str)> = vec![
        ("empty.jsonl", vec![], "empty.jsonl: the file holds no records"),
        ("blank.jsonl", b"\n  \n\n".to_vec(), "blank.jsonl: the file holds no records"),
        ("empty.json", b"[]".to_vec(), "empty.json: the file holds no records"),
        ("data.csv", b"a,b".to_vec(), "cannot tell the kind of file from the ending `csv`"),
        ("data", b"a,b".to_vec(), "cannot tell the kind of file from the ending ``"),
        (
            "a.jsonl",
            after_ok("{\"prompt\": \"p\", \"comp"),
            "a.jsonl:2: not valid JSON at column 21: EOF while parsing a string\nhint: the line ends too early",
        ),
        (
            "a.jsonl",
            after_ok("{\"prompt\" \"p\"}"),
            "a.jsonl:2: not valid JSON at column 11: expected `:`\nhint: repair the record",
        ),
        ("a.jsonl", after_ok("[1, 2]"), "a.jsonl:2: expected a JSON object, found an array"),
        ("a.jsonl", after_ok("\"text\""), "a.jsonl:2: expected a JSON object, found a string"),
        ("a.jsonl", b"17\n".to_vec(), "a.jsonl:1: expected a JSON object, found a number"),
        (
            "a.jsonl",
            [ok.as_bytes(), b"{\"prompt\": \"\xff\xfe\"}"].concat(),
            "a.jsonl:2: not valid UTF-8: byte 12 is 0xff\nhint: convert the file to UTF-8",
        ),
        ("a.jsonl", [ok.as_bytes(), b"{\"prompt\": \"\0\"}"].concat(), "a.jsonl:2: byte 12 is NUL"),
        ("a.jsonl", after_ok("{\"prompt\": \"p\"}"), "a.jsonl:2: field `completion`: is missing"),
        ("a.jsonl", after_ok("{\"prompt\": \"p\", \"completion\": null}"), "a.jsonl:2: field `completion`: is null"),
        (
            "a.jsonl",
            after_ok("{\"prompt\": 3, \"completion\": \"c\"}"),
            "a.jsonl:2: field `prompt`: expected a string, found a number (3)",
        ),
        (
            "a.jsonl",
            after_ok("{\"prompt\": [], \"completion\": \"c\"}"),
            "a.jsonl:2: field `prompt`: expected a string, found an array\nhint: conversations belong",
        ),
        (
            "a.jsonl",
            after_ok("{\"prompt\": \"p\", \"completion\": \" \\n\"}"),
            "a.jsonl:2: field `completion`: is empty",
        ),
        (
            "a.jsonl",
            after_ok("{\"prompt\": \"p\\u0000\", \"completion\": \"c\"}"),
            "a.jsonl:2: field `prompt`: contains a NUL character at byte 1",
        ),
        ("a.jsonl", after_ok("{\"text\": \"other format\"}"), "a.jsonl:2: field `prompt`: is missing"),
        (
            "a.jsonl",
            b"{\"a\": 1, \"b\": 2}".to_vec(),
            "cannot tell the format from the first record (a.jsonl:1): it has the fields `a`, `b`; expected `text`",
        ),
        ("a.jsonl", b"{}".to_vec(), "it has no fields at all"),
        (
            "a.jsonl",
            b"{\n  \"text\": \"pretty\"\n}".to_vec(),
            "a.jsonl:1: not valid JSON at column 1: EOF while parsing an object\nhint: the line ends too early: the file may be truncated, or hold one object over several lines",
        ),
        (
            "a.json",
            b"[{\"text\": \"a\"}, {\"text\": \"b\"".to_vec(),
            "a.json: not valid JSON: EOF while parsing an object at line 1 column 28",
        ),
        ("a.json", b"17".to_vec(), "a.json: holds a number; expected an array of objects"),
        (
            "a.json",
            b"[{\"text\": \"a\"}, {\"text\": 1}]".to_vec(),
            "a.json, element 1 (from 0): field `text`: expected a string",
        ),
        ("a.json", b"[{\"text\": \"\xff\"}]".to_vec(), "a.json: not valid UTF-8"),
        ("a.txt", b"  \n ".to_vec(), "a.txt: field `text`: is empty"),
        ("a.txt", b"caf\xe9".to_vec(), "a.txt: not valid UTF-8: byte 3 is 0xe9"),
        ("a.txt", b"a\0b".to_vec(), "a.txt: byte 1 is NUL"),
        ("a.parquet", b"PAR1 this is no parquet".to_vec(), "a.parquet: not a usable Parquet file"),
        ("a.jsonl", chat("\"hello\""), "a.jsonl:1: field `messages`: expected an array of messages, found a string"),
        ("a.jsonl", chat("[]"), "a.jsonl:1: field `messages`: is an empty list"),
        ("a.jsonl", chat("[3]"), "field `messages`: message 0 (from 0): expected an object, found a number"),
        (
            "a.jsonl",
            chat("[{\"role\": \"user\", \"content\": \"a\"}, {\"content\": \"b\"}]"),
            "field `messages`: message 1 (from 0): `role` is missing",
        ),
        ("a.jsonl", chat("[{\"from\": \"human\", \"value\": \"b\"}]"), "rename `from` and `value`"),
        ("a.jsonl", chat("[{\"role\": 1, \"content\": \"a\"}]"), "`role` must be a non-empty string, found 1"),
        ("a.jsonl", chat("[{\"role\": \"user\"}]"), "message 0 (from 0): `content` is missing"),
        (
            "a.jsonl",
            chat("[{\"role\": \"user\", \"content\": 5}]"),
            "message 0 (from 0): `content`: expected a string, found a number (5)",
        ),
        (
            "a.jsonl",
            chat("[{\"role\": \"user\", \"content\": [{\"type\": \"image\"}]}]"),
            "`content` has a part of type `image`; only text",
        ),
        (
            "a.jsonl",
            b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": {}}".to_vec(),
            "field `tools`: expected an array of tools, found an object",
        ),
        (
            "a.jsonl",
            b"{\"messages\": [{\"role\": \"user\", \"content\": \"a\"}], \"tools\": \"{\"}".to_vec(),
            "field `tools`: is text that is not JSON",
        ),
    ];
    let mut wrong = Vec::new();
    for (name, content, expected) in cases {
        let error = read_bytes(name, &content).expect_err(expected);
        if !error.contains(expected) {
            wrong.push(format!("expected: {expected}\nfound: {error}"));
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n\n"));
}

#[test]
fn paths_that_cannot_be_opened_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("missing.jsonl");
    let error = read(missing.to_str().unwrap(), &DataConfig::default()).unwrap_err();
    assert!(
        error.contains("cannot read ")
            && error.contains("missing.jsonl: No such file")
            && error.contains("hint: relative paths"),
        "{error}"
    );
    let error = read(folder.path().to_str().unwrap(), &DataConfig::default()).unwrap_err();
    assert!(error.contains("is a folder; expected a file"), "{error}");
    let error = read_records(&[], &DataConfig::default()).unwrap_err().to_string();
    assert_eq!(error, "data.train is an empty list");
}

#[test]
fn a_text_file_refuses_another_format() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, "a.txt", b"words");
    let error = read(&path, &DataConfig { format: Format::Messages, ..DataConfig::default() }).unwrap_err();
    assert!(error.contains("is plain text, but data.format names another kind of record"), "{error}");
}

#[test]
fn bad_records_are_skipped_counted_and_reported() {
    let folder = tempfile::tempdir().unwrap();
    let good = "{\"text\": \"fine words\"}\n";
    let path = write(
        &folder,
        "a.jsonl",
        format!("oops\n{good}{{\"text\": 1}}\n{good}{{\"text\": 2}}\n{{\"text\": \"\"}}\n").as_bytes(),
    );
    let config = DataConfig { on_bad_record: OnBadRecord::Skip, ..DataConfig::default() };
    let tokenizer = tokenizer();
    let dataset = load("train", &Paths::One(path.clone()), &config, &encoder(&tokenizer), None).unwrap();
    assert_eq!(dataset.statistics().records, 2);
    assert_eq!(dataset.documents().iter().map(|document| document.record).collect::<Vec<_>>(), [1, 3]);
    assert_eq!(dataset.describe_record(3), format!("{path}:4"));
    let report = dataset.report();
    let counts: Vec<(&str, u64)> =
        report.skipped.iter().map(|(reason, skipped)| (reason.as_str(), skipped.count)).collect();
    assert_eq!(counts, [("`text`: empty", 1), ("`text`: wrong type", 2), ("not valid JSON", 1)]);
    assert_eq!(
        report.skipped["`text`: wrong type"].first,
        format!("{path}:3: field `text`: expected a string, found a number (1)")
    );

    let path = write(&folder, "b.jsonl", b"{\"text\": 1}\n{\"text\": \"\"}\n");
    let config = DataConfig { format: Format::Text, ..config };
    let error = load("train", &Paths::One(path), &config, &encoder(&tokenizer), None).unwrap_err().to_string();
    assert!(error.starts_with("no usable record: all 2 were skipped (1 x `text`: empty, first "), "{error}");
}

#[test]
fn several_files_keep_their_order_and_formats() {
    let folder = tempfile::tempdir().unwrap();
    let first = write(&folder, "a.jsonl", b"{\"text\": \"one\"}\n{\"text\": \"two\"}\n");
    let second = write(&folder, "b.json", b"[{\"prompt\": \"three\", \"completion\": \"four\"}]");
    let third = write(&folder, "c.txt", b"five");
    let tokenizer = tokenizer();
    let paths = Paths::Many(vec![first.clone(), second.clone(), third.clone()]);
    let dataset = load("train", &paths, &DataConfig::default(), &encoder(&tokenizer), None).unwrap();
    let places: Vec<String> = (0..4).map(|record| dataset.describe_record(record)).collect();
    assert_eq!(places, [format!("{first}:1"), format!("{first}:2"), format!("{second}, element 0 (from 0)"), third]);
    assert_eq!(dataset.describe_record(9), "record 9");
}

#[test]
fn large_files_are_read_chunk_by_chunk() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..5000).map(|i| format!("{{\"text\": \"{i}\"}}\n")).collect();
    let path = write(&folder, "a.jsonl", lines.as_bytes());
    let records = read(&path, &DataConfig::default()).unwrap();
    assert_eq!(records.len(), 5000);
    assert_eq!(records[4999], Record::Text("4999".into()));
    let path = write(&folder, "b.jsonl", format!("{lines}{{\"text\": 1}}\n").as_bytes());
    assert!(read(&path, &DataConfig::default()).unwrap_err().contains("b.jsonl:5001: field `text`"));
}

/// A column of byte arrays: values, definition levels, repetition levels.
type Column = (Vec<&'static str>, Vec<i16>, Vec<i16>);

fn write_parquet(folder: &TempDir, name: &str, schema: &str, compression: Compression, columns: Vec<Column>) -> String {
    let path = folder.path().join(name);
    let schema = Arc::new(parse_message_type(schema).unwrap());
    let properties = Arc::new(WriterProperties::builder().set_compression(compression).build());
    let mut writer = SerializedFileWriter::new(File::create(&path).unwrap(), schema, properties).unwrap();
    let mut group = writer.next_row_group().unwrap();
    for (values, definition, repetition) in columns {
        let values: Vec<ByteArray> = values.into_iter().map(ByteArray::from).collect();
        let mut column = group.next_column().unwrap().unwrap();
        column.typed::<ByteArrayType>().write_batch(&values, Some(&definition), Some(&repetition)).unwrap();
        column.close().unwrap();
    }
    group.close().unwrap();
    writer.close().unwrap();
    path.to_str().unwrap().to_owned()
}

const PAIR_SCHEMA: &str =
    "message schema { optional binary prompt (STRING); optional binary completion (STRING); optional binary image; }";

#[test]
fn parquet_tables_are_read() {
    let folder = tempfile::tempdir().unwrap();
    for compression in [Compression::UNCOMPRESSED, Compression::SNAPPY, Compression::ZSTD(Default::default())] {
        let columns = vec![
            (vec!["a", "b"], vec![1, 1], vec![0, 0]),
            (vec!["c", "d"], vec![1, 1], vec![0, 0]),
            (vec![], vec![0, 0], vec![0, 0]),
        ];
        let path = write_parquet(&folder, "a.parquet", PAIR_SCHEMA, compression, columns);
        assert_eq!(read(&path, &DataConfig::default()).unwrap(), [pair("a", "c"), pair("b", "d")]);
    }
    let columns = vec![
        (vec!["a", "b"], vec![1, 1], vec![0, 0]),
        (vec!["c"], vec![1, 0], vec![0, 0]),
        (vec![], vec![0, 0], vec![0, 0]),
    ];
    let path = write_parquet(&folder, "b.parquet", PAIR_SCHEMA, Compression::SNAPPY, columns);
    let error = read(&path, &DataConfig::default()).unwrap_err();
    assert!(error.contains("b.parquet, row 1 (from 0): field `completion`: is null"), "{error}");
}

#[test]
fn parquet_conversations_are_read() {
    let schema = "message schema { optional group messages (LIST) { repeated group list { optional group element { optional binary content (STRING); optional binary role (STRING); optional binary name (STRING); } } } }";
    let folder = tempfile::tempdir().unwrap();
    // Row 0: user and assistant; row 1: user, assistant with a name.
    let repetition = vec![0, 1, 0, 1];
    let columns = vec![
        (vec!["hi", "hello", "bye", "see you"], vec![4; 4], repetition.clone()),
        (vec!["user", "assistant", "user", "assistant"], vec![4; 4], repetition.clone()),
        (vec!["Ann"], vec![3, 3, 3, 4], repetition),
    ];
    let path = write_parquet(&folder, "chat.parquet", schema, Compression::SNAPPY, columns);
    let records = read(&path, &DataConfig::default()).unwrap();
    let message = |role: &str, content: &str| json!({"content": content, "role": role});
    let expected = [
        vec![message("user", "hi"), message("assistant", "hello")],
        vec![message("user", "bye"), json!({"content": "see you", "role": "assistant", "name": "Ann"})],
    ];
    for (record, expected) in records.iter().zip(expected) {
        assert_eq!(*record, Record::Messages { messages: expected, tools: Value::Null });
    }
    let (tokenizer, chat) = (tokenizer(), chat_template());
    let encoder = Encoder { tokenizer: &tokenizer, chat: Some(&chat) };
    assert_eq!(
        load("train", &Paths::One(path), &DataConfig::default(), &encoder, None).unwrap().statistics().records,
        2
    );
}

#[test]
fn damaged_parquet_files_are_errors() {
    let folder = tempfile::tempdir().unwrap();
    let columns = vec![
        (vec!["a", "b"], vec![1, 1], vec![0, 0]),
        (vec!["c", "d"], vec![1, 1], vec![0, 0]),
        (vec![], vec![0, 0], vec![0, 0]),
    ];
    let path = write_parquet(&folder, "a.parquet", PAIR_SCHEMA, Compression::UNCOMPRESSED, columns);
    let good = std::fs::read(&path).unwrap();
    for length in [0, 3, 8, good.len() / 2, good.len() - 1] {
        let path = write(&folder, "short.parquet", &good[..length]);
        let error = read(&path, &DataConfig::default()).unwrap_err();
        assert!(error.contains("short.parquet: "), "{error}");
    }
    // Any answer will do, but an answer there must be.
    for at in 0..good.len() {
        let mut damaged = good.clone();
        damaged[at] ^= 0x55;
        let path = write(&folder, "flipped.parquet", &damaged);
        let _ = read(&path, &DataConfig::default());
    }
}

proptest! {
    #[test]
    fn no_bytes_make_the_reader_panic(bytes in prop::collection::vec(any::<u8>(), 0..200), ending in 0usize..5) {
        let _ = read_bytes(&format!("a.{}", source::ENDINGS[ending]), &bytes);
    }

    #[test]
    fn every_string_survives(texts in prop::collection::vec("[^\0]*[a-z][^\0]*", 1..8)) {
        let expected: Vec<Record> = texts.iter().cloned().map(Record::Text).collect();
        let values: Vec<Value> = texts.iter().map(|text| json!({ "text": text })).collect();
        let lines: String = values.iter().map(|value| format!("{value}\n")).collect();
        prop_assert_eq!(&read_bytes("a.jsonl", lines.as_bytes()).unwrap(), &expected);
        prop_assert_eq!(&read_bytes("a.json", Value::from(values).to_string().as_bytes()).unwrap(), &expected);
    }
}

#[test]
fn hub_names_are_told_from_paths() {
    assert!(Path::new("owner/name.jsonl").extension().is_some());
    let error = read_records(&["data/absent.jsonl".to_owned()], &DataConfig::default()).unwrap_err().to_string();
    assert!(error.starts_with("cannot read data/absent.jsonl"), "a data file is never looked for on the hub: {error}");
}
