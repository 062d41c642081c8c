//! Tests of streamed data: what is in a row, that a resumed stream goes on exactly, and what is refused.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
use super::*;
use crate::data::testing::{encoder, tokenizer, write};
use crate::data::{DataConfig, Loader, LoaderState, Paths, Prepared, TrainingData, ValSetSize, prepare};
use proptest::prelude::*;

const BOS: u32 = 1;
const EOS: u32 = 2;

fn loader_config(rows: usize, cols: usize) -> LoaderConfig {
    LoaderConfig {
        micro_batch_size: rows,
        max_seq_length: cols,
        packing: true,
        shuffle: false,
        seed: 7,
        pad_id: 3,
        pad_to_multiple_of: 8,
    }
}

fn data_config(paths: &[String]) -> DataConfig {
    DataConfig { train: Paths::Many(paths.to_vec()), streaming: true, ..DataConfig::default() }
}

fn corpus(config: &DataConfig) -> Result<Corpus, DataError> {
    Corpus::open(&config.train, config, &tokenizer())
}

fn loader(paths: &[String], config: LoaderConfig, state: Option<&LoaderState>) -> Loader {
    Loader::stream(&corpus(&data_config(paths)).unwrap(), config, state).unwrap()
}

fn jsonl(texts: &[&str]) -> Vec<u8> {
    let line = |text: &&str| serde_json::json!({ "text": text, "id": 7 }).to_string() + "\n";
    texts.iter().map(line).collect::<String>().into_bytes()
}

/// A document's ids, for short documents.
fn ids_of(text: &str) -> Vec<u32> {
    [&[BOS], tokenizer().encode(text, false).unwrap().as_slice(), &[EOS]].concat()
}

/// The batches of these documents, packed by the plainest means: all tokens in one list, cut into rows.
fn reference(documents: &[Vec<u32>], rows: usize, cols: usize) -> Vec<Batch> {
    let tokens: Vec<(u32, usize)> =
        documents.iter().enumerate().flat_map(|(number, ids)| ids.iter().map(move |id| (*id, number))).collect();
    let mut batches = Vec::new();
    for part in tokens.chunks_exact(rows * cols) {
        let mut batch = Batch { rows, cols, ..Batch::default() };
        for row in part.chunks_exact(cols) {
            for (column, (id, document)) in row.iter().enumerate() {
                let first = row.iter().position(|(_, other)| other == document).unwrap();
                let next = row.get(column + 1).filter(|(_, other)| other == document);
                batch.input_ids.push(*id as i32);
                batch.targets.push(next.map_or(IGNORE, |(id, _)| *id as i32));
                batch.positions.push((column - first) as i32);
                batch.first_key.push(first as i32);
            }
        }
        batches.push(batch);
    }
    batches
}

fn without_records(mut batch: Batch) -> Batch {
    batch.records.clear();
    batch
}

#[test]
fn rows_equal_a_plain_packing_over_files_and_passes() {
    let folder = tempfile::tempdir().unwrap();
    let texts = ["one", "a longer second text", "3", "the fourth text of these\nwith two lines"];
    let whole = "A file of plain text.\n\nIt is one document.\n";
    let paths = [
        write(&folder, "a.jsonl", &[b"\xef\xbb\xbf".as_slice(), &jsonl(&texts[..2]), b"\n  \n"].concat()),
        write(&folder, "b.txt", whole.as_bytes()),
        write(&folder, "c.ndjson", &jsonl(&texts[2..])),
    ];
    let pass: Vec<Vec<u32>> = [texts[0], texts[1], whole, texts[2], texts[3]].map(ids_of).to_vec();
    let three_passes = [pass.clone(), pass.clone(), pass].concat();
    for (rows, cols) in [(1, 4), (2, 7), (3, 16)] {
        let expected = reference(&three_passes, rows, cols);
        assert!(expected.len() > 1);
        let mut loader = loader(&paths, loader_config(rows, cols), None);
        for batch in &expected {
            assert_eq!(without_records(loader.next_batch().unwrap()), *batch);
        }
    }
    let mut loader = loader(&paths, loader_config(1, 12), None);
    let first = loader.next_batch().unwrap();
    assert_eq!(loader.describe_record(first.records[0]), format!("{}:1", paths[0]));
    let mut seen: Vec<String> = Vec::new();
    while loader.epoch() == 0 {
        let batch = loader.next_batch().unwrap();
        seen.extend(batch.records.iter().map(|record| loader.describe_record(*record)));
    }
    assert!(seen.contains(&paths[1]) && seen.contains(&format!("{}:2", paths[2])), "{seen:?}");
    assert!(loader.progress() >= 1.0 && loader.progress() < 2.0);
}

/// Text of many pieces without a letter that repeats in a simple way, in lines of uneven length.
fn long_text(bytes: usize, seed: u64) -> String {
    let mut random = crate::data::packing::Random::new(&[seed]);
    let mut text = String::new();
    while text.len() < bytes {
        for _ in 0..random.below(40) {
            text.push_str(["be", "ä€", "rain ", "in", "42", " ", "𝄞"][random.below(7)]);
        }
        text.push('\n');
    }
    text
}

#[test]
fn a_long_text_loses_nothing_and_is_one_document() {
    let folder = tempfile::tempdir().unwrap();
    let lines = long_text(3 * PIECE_BYTES + 17, 1);
    let one_line = lines.replace('\n', " ");
    let one_word = "äbc".repeat(PIECE_BYTES / 2);
    for (name, text) in [("lines.txt", lines), ("one-line.txt", one_line), ("one-word.txt", one_word)] {
        let path = write(&folder, name, text.as_bytes());
        let mut loader = loader(&[path], loader_config(4, 512), None);
        let mut ids = Vec::new();
        while ids.last() != Some(&EOS) {
            let batch = loader.next_batch().unwrap();
            ids.extend(batch.input_ids.iter().map(|id| *id as u32));
            match ids.iter().position(|id| *id == EOS) {
                Some(end) => ids.truncate(end + 1),
                None => assert!(batch.first_key.iter().all(|key| *key == 0), "{name}: a piece is no new document"),
            }
        }
        assert_eq!(ids.iter().filter(|id| **id == BOS).count(), 1, "{name}");
        assert_eq!(tokenizer().decode(&ids[1..ids.len() - 1], false).unwrap(), text, "{name}");
    }
}

#[test]
fn a_stream_resumes_after_every_batch() {
    let folder = tempfile::tempdir().unwrap();
    let texts: Vec<String> = (0..60).map(|i| format!("text {i} {}", "word ".repeat(i * 7 % 23))).collect();
    let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
    let paths = [
        write(&folder, "a.jsonl", &jsonl(&texts[..40])),
        write(&folder, "b.txt", long_text(PIECE_BYTES * 5 / 4, 3).as_bytes()),
        write(&folder, "c.jsonl", &jsonl(&texts[40..])),
    ];
    for shuffle in [false, true] {
        let config = LoaderConfig { shuffle, ..loader_config(8, 512) };
        let mut whole = loader(&paths, config.clone(), None);
        let mut states = vec![serde_json::to_string(&whole.state()).unwrap()];
        let mut batches = Vec::new();
        while whole.epoch() < 2 {
            batches.push(whole.next_batch().unwrap());
            states.push(serde_json::to_string(&whole.state()).unwrap());
        }
        for (step, text) in states[..batches.len()].iter().enumerate() {
            let state: LoaderState = serde_json::from_str(text).unwrap();
            let mut resumed = loader(&paths, config.clone(), Some(&state));
            assert_eq!(resumed.state(), state);
            for later in step..batches.len().min(step + 3) {
                assert_eq!(resumed.next_batch().unwrap(), batches[later], "step {later}, resumed at {step}");
                assert_eq!(serde_json::to_string(&resumed.state()).unwrap(), states[later + 1]);
            }
        }
    }
}

#[test]
fn files_are_shuffled_by_the_seed_in_every_pass() {
    let folder = tempfile::tempdir().unwrap();
    // One file fills one row, so that a pass ends with a batch.
    let texts: Vec<String> = (10..22).map(|number| number.to_string()).collect();
    let paths: Vec<String> = texts.iter().map(|text| write(&folder, &format!("{text}.txt"), text.as_bytes())).collect();
    let cols = ids_of(&texts[0]).len();
    assert!(texts.iter().all(|text| ids_of(text).len() == cols));
    let order = |seed: u64, shuffle: bool| -> Vec<Vec<u64>> {
        let mut loader = loader(&paths, LoaderConfig { seed, shuffle, ..loader_config(1, cols) }, None);
        let mut passes = vec![Vec::new(); 3];
        loop {
            let batch = loader.next_batch().unwrap();
            let Some(pass) = passes.get_mut(loader.epoch() as usize) else { return passes };
            pass.extend(batch.records);
        }
    };
    let plain = order(1, false);
    assert!(plain[0].is_sorted() && plain[1].is_sorted());
    let shuffled = order(1, true);
    assert_ne!(shuffled[0], plain[0]);
    assert_ne!(shuffled[0], shuffled[1]);
    assert_eq!(shuffled, order(1, true));
    assert_ne!(shuffled, order(2, true));
}

#[test]
fn a_position_of_other_data_or_settings_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, "a.jsonl", &jsonl(&["one", "two"]));
    let state = loader(std::slice::from_ref(&path), loader_config(2, 8), None).state();
    let resume = |config: LoaderConfig| {
        let corpus = corpus(&data_config(std::slice::from_ref(&path))).unwrap();
        Loader::stream(&corpus, config, Some(&state)).map(drop).map_err(|error| error.to_string())
    };
    resume(loader_config(2, 8)).unwrap();
    let error = resume(loader_config(2, 16)).unwrap_err();
    assert!(error.contains("max_seq_length: 8 in the checkpoint, 16 now") && !error.contains("content"), "{error}");

    let dataset = crate::data::testing::dataset(&[(vec![1, 2], vec![true; 2])]);
    let error = Loader::resume(dataset, loader_config(2, 8), &state).unwrap_err().to_string();
    assert!(error.contains("streaming: true in the checkpoint, false now"), "{error}");

    std::fs::write(&path, jsonl(&["one", "too"])).unwrap();
    let error = resume(loader_config(2, 8)).unwrap_err();
    assert!(error.contains("content of the data"), "{error}");
    assert!(resume(LoaderConfig { micro_batch_size: 0, ..loader_config(2, 8) }).unwrap_err().contains("is 0"));
}

/// The first error of a stream of some files.
fn first_error(config: &DataConfig) -> DataError {
    let corpus = match corpus(config) {
        Ok(corpus) => corpus,
        Err(error) => return error,
    };
    let mut loader = Loader::stream(&corpus, loader_config(4, 512), None).unwrap();
    for _ in 0..1000 {
        if let Err(error) = loader.next_batch() {
            return error;
        }
    }
    panic!("no error");
}

#[test]
fn bad_inputs_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let good = String::from_utf8(jsonl(&["good"])).unwrap();
    let cases: [(&str, &[u8], &[&str]); 9] = [
        ("a.jsonl", b"{\"text\": \"cut", &["a.jsonl:2: not valid JSON"]),
        ("b.jsonl", b"[1]", &["b.jsonl:2: expected a JSON object with the field `text`"]),
        ("c.jsonl", b"{\"prompt\": \"a\", \"completion\": \"b\"}", &["c.jsonl:2: field `text`: is missing"]),
        ("d.jsonl", b"{\"text\": 5}", &["d.jsonl:2: field `text`: expected a string, found a number"]),
        ("e.jsonl", b"{\"text\": \" \"}", &["e.jsonl:2: is empty"]),
        ("f.jsonl", b"{\"text\": \"\xff\"}", &["f.jsonl:2: not valid UTF-8"]),
        ("g.txt", b"", &["g.txt: the file holds no records"]),
        ("h.parquet", b"PAR1", &["h.parquet: a `parquet` file cannot be streamed; expected one of .txt, .jsonl"]),
        ("i.txt", b"bin\0ary", &["i.txt: byte 3 is NUL"]),
    ];
    for (name, bytes, expected) in cases {
        let lines = [good.as_bytes(), bytes].concat();
        let path = write(&folder, name, if name.ends_with("jsonl") { &lines } else { bytes });
        let error = first_error(&data_config(&[path])).to_string();
        assert!(expected.iter().all(|part| error.contains(part)), "{name}: {error}");
    }
    let blank = write(&folder, "blank.jsonl", b"\n\n  \n");
    assert!(first_error(&data_config(&[blank])).to_string().contains("blank.jsonl: the file holds no records"));
    let missing = folder.path().join("missing.txt").display().to_string();
    assert!(first_error(&data_config(&[missing])).to_string().contains("cannot read"));

    // A fault far inside a text is named by its place in the file.
    let mut text = long_text(2 * PIECE_BYTES, 5).into_bytes();
    let at = text.len() - 3;
    text[at] = 0xff;
    text.truncate(at + 1);
    let path = write(&folder, "far.txt", &text);
    let error = first_error(&data_config(std::slice::from_ref(&path))).to_string();
    assert!(error.contains(&format!("far.txt: not valid UTF-8: byte {at} is 0xff")), "{error}");
}

#[test]
fn bad_records_can_be_skipped() {
    let folder = tempfile::tempdir().unwrap();
    let mut text = long_text(2 * PIECE_BYTES, 5).into_bytes();
    text[PIECE_BYTES + 100] = 0xff;
    let lines = [jsonl(&["one"]), b"{}\n".to_vec(), jsonl(&["two"])].concat();
    let paths = [write(&folder, "a.jsonl", &lines), write(&folder, "b.txt", &text)];
    let config = DataConfig { on_bad_record: OnBadRecord::Skip, ..data_config(&paths) };
    let mut loader = Loader::stream(&corpus(&config).unwrap(), loader_config(1, 8), None).unwrap();
    let mut ids = Vec::new();
    while loader.epoch() < 2 {
        ids.extend(loader.next_batch().unwrap().input_ids.iter().map(|id| *id as u32));
    }
    let begins = ids.iter().filter(|id| **id == BOS).count();
    let ends = ids.iter().filter(|id| **id == EOS).count();
    assert!((6..=9).contains(&begins), "two records and the beginning of a text in each of two passes, {begins}");
    assert!(begins > ends, "a text that turns out bad has no end");

    let nothing = write(&folder, "nothing.jsonl", b"{}\n{}\n");
    let error = first_error(&DataConfig { on_bad_record: OnBadRecord::Skip, ..data_config(&[nothing]) });
    assert!(error.to_string().contains("no usable record: all 2 were skipped"), "{error}");
}

#[test]
fn settings_that_streaming_cannot_have_are_named() {
    let config = DataConfig {
        packing: false,
        val_set_size: ValSetSize::Fraction(0.1),
        format: crate::data::Format::Messages,
        ..data_config(&["a.txt".to_owned()])
    };
    let problems = config.problems();
    let keys: Vec<&str> = problems.iter().map(|(key, _)| *key).collect();
    assert_eq!(keys, ["packing", "val_set_size", "format"]);
    assert!(problems[1].1.contains("name other files as `eval`"));
}

#[test]
fn a_run_streams_its_training_data_and_loads_what_it_evaluates_on() {
    let folder = tempfile::tempdir().unwrap();
    let train = write(&folder, "train.txt", b"Some text to train on.");
    let eval = write(&folder, "eval.txt", b"Some text to evaluate on.");
    let config = DataConfig { eval: Some(Paths::One(eval)), ..data_config(&[train]) };
    let tokenizer = tokenizer();
    let Prepared { train, eval } = prepare(&config, &encoder(&tokenizer), 1, None).unwrap();
    assert!(matches!(train, TrainingData::Streamed(_)));
    assert_eq!(eval.unwrap().statistics().records, 1);
    let mut loader = Loader::open(&train, loader_config(2, 16), None).unwrap();
    assert_eq!((loader.batches_per_epoch(0), loader.efficiency()), (None, 1.0));
    assert_eq!(loader.next_batch().unwrap().rows, 2);
}

#[test]
fn little_is_held_in_memory() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(&folder, "a.txt", long_text(3 * CHUNK_BYTES, 9).as_bytes());
    let corpus = corpus(&data_config(&[path])).unwrap();
    let mut reader = PieceReader::new(corpus.text(), None, StreamPosition::default());
    for _ in 0..8 {
        let sizes: Vec<usize> =
            reader.next_pieces(CHUNK_BYTES).unwrap().iter().map(|piece| piece.bytes.len()).collect();
        assert!(sizes.iter().all(|size| *size <= PIECE_BYTES), "{sizes:?}");
        assert!(sizes.iter().sum::<usize>() < CHUNK_BYTES + PIECE_BYTES);
    }
    let (sender, batches) = sync_channel(BATCHES_AHEAD);
    let thread = std::thread::spawn(move || {
        produce(&corpus, None, StreamPosition::default(), Packer::new(1, 64, 3), &sender).is_ok()
    });
    let (_, position) = batches.recv().unwrap().unwrap();
    assert_eq!((position.pass, position.file, position.offset, position.skip), (0, 0, 0, 64));
    drop(batches);
    assert!(thread.join().unwrap(), "the thread ends when nobody listens");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn any_texts_pack_as_the_reference(
        texts in prop::collection::vec("[a-zä€ \n]{0,30}[a-z]", 1..20),
        rows in 1usize..4,
        cols in 4usize..40,
    ) {
        let folder = tempfile::tempdir().unwrap();
        let texts: Vec<&str> = texts.iter().map(String::as_str).collect();
        let path = write(&folder, "a.jsonl", &jsonl(&texts));
        let pass: Vec<Vec<u32>> = texts.iter().map(|text| ids_of(text)).collect();
        let documents: Vec<Vec<u32>> = std::iter::repeat_n(pass, 30).flatten().collect();
        let mut loader = loader(&[path], loader_config(rows, cols), None);
        for batch in reference(&documents, rows, cols).iter().take(20) {
            prop_assert_eq!(&without_records(loader.next_batch().unwrap()), batch);
        }
    }
}
