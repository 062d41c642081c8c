//! Labelled data from files to batches.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};

use lowrank_models::ClassifierBatch;
use lowrank_models::classifier::{Input, Labels};
use lowrank_models::hf::Tokenizer;
use serde_json::json;

use super::testing::write;
use super::*;

fn tokenizer() -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens/models/tiny-bert");
    Tokenizer::from_folder(&folder).unwrap()
}

fn loader_config(rows: usize) -> LoaderConfig {
    LoaderConfig {
        micro_batch_size: rows,
        max_seq_length: 32,
        packing: false,
        shuffle: true,
        seed: 5,
        pad_id: 3,
        pad_to_multiple_of: 8,
    }
}

fn texts(path: String) -> DataConfig {
    DataConfig { train: Paths::One(path), max_seq_length: 32, ..DataConfig::default() }
}

fn read(config: &DataConfig) -> Result<LabelledData, String> {
    prepare_texts(config, &tokenizer(), &LabelRules::default(), 1).map_err(|error| error.to_string())
}

fn records(loader: &mut LabelledLoader, batches: usize) -> Vec<Vec<u64>> {
    (0..batches).map(|_| loader.next_batch().unwrap().records).collect()
}

#[test]
fn all_kinds_of_files_give_the_same_batches() {
    let folder = tempfile::tempdir().unwrap();
    let rows = [("a cat", "a dog", "no"), ("the sun", "it shines", "yes"), ("rain, \"wet\"", "water", "yes")];
    let object = |(a, b, label): (&str, &str, &str)| json!({"sentence1": a, "sentence2": b, "label": label, "idx": 7});
    let lines: String = rows.iter().map(|row| format!("{}\n", object(*row))).collect();
    let array = serde_json::Value::from(rows.iter().map(|row| object(*row)).collect::<Vec<_>>()).to_string();
    let csv = "sentence1,sentence2,label\na cat,a dog,no\nthe sun,it shines,yes\n\"rain, \"\"wet\"\"\",water,yes\n";
    let tsv = "sentence1\tsentence2\tlabel\na cat\ta dog\tno\nthe sun\tit shines\tyes\nrain, \"wet\"\twater\tyes\n";
    let files = [("a.jsonl", lines.as_str()), ("a.json", array.as_str()), ("a.csv", csv), ("a.tsv", tsv)];
    let mut fingerprints = vec![];
    for (name, text) in files {
        let data = read(&texts(write(&folder, name, text.as_bytes()))).unwrap();
        assert_eq!(data.train.labels(), Labels::Classes(vec![0, 1, 1]), "{name}");
        assert_eq!(data.train.classes(), ["no", "yes"]);
        fingerprints.push(data.train.fingerprint().to_owned());
    }
    assert!(fingerprints.iter().all(|fingerprint| *fingerprint == fingerprints[0]));
}

#[test]
fn a_batch_is_padded_and_masked() {
    let folder = tempfile::tempdir().unwrap();
    let path = write(
        &folder,
        "a.jsonl",
        b"{\"text\": \"short\", \"label\": 1}\n{\"text\": \"a longer one is here\", \"label\": 0}\n",
    );
    let data = read(&texts(path)).unwrap();
    let batch = data.train.batch(&[0, 1], &loader_config(2), None).unwrap();
    let Input::Text { rows, cols, ids, types, mask } = &batch.input else { panic!("these are texts") };
    let tokenizer = tokenizer();
    let short = tokenizer.encode("short", true).unwrap();
    assert_eq!((*rows, cols % 8), (2, 0));
    assert_eq!(ids[..short.len()].iter().map(|&id| id as u32).collect::<Vec<_>>(), short);
    assert!(ids[short.len()..*cols].iter().all(|&id| id == 3));
    assert_eq!(mask[..*cols].iter().sum::<i32>() as usize, short.len());
    assert!(types.iter().all(|&kind| kind == 0));
    assert_eq!((batch.labels.clone(), batch.records.clone()), (Labels::Classes(vec![1, 0]), vec![0, 1]));
    assert_eq!(batch.token_count(), mask.iter().sum::<i32>() as usize);
}

#[test]
fn long_pairs_lose_the_end_of_the_longer_text() {
    let tokenizer = tokenizer();
    let long = "one two three four five six seven eight nine ten ".repeat(4);
    let cutting = tokenizer.cutting_at(16).unwrap();
    let (short_ids, long_ids) = (tokenizer.encode("cat", false).unwrap(), tokenizer.encode(&long, false).unwrap());
    for (first, second) in [("cat", long.as_str()), (long.as_str(), "cat")] {
        let pair = cutting.encode_pair(first, Some(second)).unwrap();
        assert_eq!((pair.ids.len(), pair.types.len(), pair.cut), (16, 16, true));
        let holds = |part: &[u32]| pair.ids.windows(part.len()).any(|window| window == part);
        assert!(holds(&short_ids) && holds(&long_ids[..8]), "{:?}", pair.ids);
    }
    assert!(!cutting.encode_pair("cat", None).unwrap().cut);
}

#[test]
fn a_loader_goes_on_where_it_stood() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..11).map(|i| format!("{{\"text\": \"number {i}\", \"label\": {}}}\n", i % 2)).collect();
    let data = read(&texts(write(&folder, "a.jsonl", lines.as_bytes()))).unwrap();
    let mut whole = LabelledLoader::open(data.train.clone(), loader_config(4), None).unwrap();
    assert_eq!(whole.batches_per_epoch(0), Some(3));
    let expected = records(&mut whole, 9);
    assert_eq!(whole.progress(), 3.0);
    for epoch in expected.chunks(3) {
        let mut all = epoch.concat();
        all.sort_unstable();
        assert_eq!(all, (0..11).collect::<Vec<u64>>());
    }
    assert_ne!(expected[..3], expected[3..6]);
    for stop in 0..9 {
        let mut before = LabelledLoader::open(data.train.clone(), loader_config(4), None).unwrap();
        records(&mut before, stop);
        let mut after = LabelledLoader::open(data.train.clone(), loader_config(4), Some(&before.state())).unwrap();
        assert_eq!(records(&mut after, 9 - stop), expected[stop..], "after {stop}");
    }
    let state = whole.state();
    let error = LabelledLoader::open(data.train.clone(), loader_config(3), Some(&state)).unwrap_err().to_string();
    assert!(error.contains("micro_batch_size: 4 in the checkpoint, 3 now"), "{error}");
}

#[test]
fn records_are_held_out_once() {
    let folder = tempfile::tempdir().unwrap();
    let lines: String = (0..20).map(|i| format!("{{\"sentence\": \"number {i}\", \"label\": {}}}\n", i % 3)).collect();
    let config =
        DataConfig { val_set_size: ValSetSize::Fraction(0.25), ..texts(write(&folder, "a.jsonl", lines.as_bytes())) };
    let data = read(&config).unwrap();
    let eval = LabelledEvaluation::new(data.eval.clone().unwrap(), loader_config(2)).unwrap();
    assert_eq!((eval.len(), data.train.len()), (3, 15));
    let seen =
        |batches: Vec<ClassifierBatch>| batches.iter().flat_map(|batch| batch.records.clone()).collect::<Vec<u64>>();
    let mut all = seen(eval.batches().unwrap().map(Result::unwrap).collect());
    let mut loader = LabelledLoader::open(data.train.clone(), loader_config(15), None).unwrap();
    all.extend(loader.next_batch().unwrap().records);
    all.sort_unstable();
    assert_eq!(all, (0..20).collect::<Vec<u64>>());
}

#[test]
fn bad_labelled_records_are_named() {
    let folder = tempfile::tempdir().unwrap();
    let ok = "{\"text\": \"a\", \"label\": 0}\n";
    let cases = [
        ("a.jsonl", format!("{ok}{{\"text\": \"b\"}}\n"), "a.jsonl:2: field `label`: is missing"),
        ("a.jsonl", format!("{ok}{{\"text\": 3, \"label\": 1}}\n"), "a.jsonl:2: field `text`: expected a string"),
        (
            "a.jsonl",
            format!("{ok}{{\"text\": \"b\", \"label\": [1]}}\n"),
            "a.jsonl:2: field `label`: expected a number or a name",
        ),
        (
            "a.jsonl",
            format!("{ok}{{\"text\": \"b\", \"label\": -1}}\n"),
            "a.jsonl:2: field `label`: expected a whole number",
        ),
        (
            "a.jsonl",
            "{\"headline\": \"b\", \"label\": 1}\n".to_owned(),
            "it has the fields `headline`, `label`; expected `sentence1`",
        ),
        ("a.csv", "text,label\nb\n".to_owned(), "a.csv:2: expected 2 fields as in the first row, found 1"),
        ("a.txt", "words".to_owned(), "a.txt: plain text has no labels"),
    ];
    for (name, text, expected) in cases {
        let error = read(&texts(write(&folder, name, text.as_bytes()))).unwrap_err();
        assert!(error.contains(expected), "{name}: {error}");
    }
    let named = DataConfig {
        fields: [("text".to_owned(), "headline".to_owned()), ("label".to_owned(), "topic".to_owned())].into(),
        on_bad_record: OnBadRecord::Skip,
        ..texts(write(&folder, "a.csv", b"headline,topic\nbig news,sport\nx\nmore,art\n"))
    };
    let data = read(&named).unwrap();
    assert_eq!((data.train.classes(), data.train.len()), (&["art".to_owned(), "sport".to_owned()][..], 2));
    assert_eq!(data.train.report().skipped_count(), 1);
    assert!(data.train.describe_record(2).ends_with("a.csv:4"));
}

/// Two classes of four 2 x 3 pictures each.
fn pictures(folder: &Path) -> PathBuf {
    for (class, base) in [("cat", 0u8), ("dog", 100)] {
        std::fs::create_dir_all(folder.join("pictures").join(class)).unwrap();
        for index in 0..4u8 {
            let bytes: Vec<u8> = (0..18).map(|at| base + index * 18 + at).collect();
            let path = folder.join("pictures").join(class).join(format!("{index}.png"));
            image::save_buffer(path, &bytes, 3, 2, image::ColorType::Rgb8).unwrap();
        }
    }
    folder.join("pictures")
}

#[test]
fn folders_of_images_are_classes() {
    let folder = tempfile::tempdir().unwrap();
    let root = pictures(folder.path());
    let rules = ImageRules::read(folder.path(), 3, Some([2, 3])).unwrap();
    let config = texts(root.to_str().unwrap().to_owned());
    let read = |flip| prepare_images(&config, &rules, &LabelRules::default(), 1, flip).unwrap().train;
    let plain = read(false);
    assert_eq!(plain.classes(), ["cat", "dog"]);
    assert_eq!(plain.labels(), Labels::Classes(vec![0, 0, 0, 0, 1, 1, 1, 1]));
    let mut whole = LabelledLoader::open(plain.clone(), loader_config(3), None).unwrap();
    let batches: Vec<ClassifierBatch> = (0..7).map(|_| whole.next_batch().unwrap()).collect();
    let Input::Image { rows: 3, channels: 3, height: 2, width: 3, pixels } = &batches[0].input else {
        panic!("three pictures were to come")
    };
    assert_eq!(pixels.len(), 3 * 18);
    let mut resumed = LabelledLoader::open(plain.clone(), loader_config(3), None).unwrap();
    (0..4).for_each(|_| drop(resumed.next_batch().unwrap()));
    let mut resumed = LabelledLoader::open(plain.clone(), loader_config(3), Some(&resumed.state())).unwrap();
    assert_eq!((4..7).map(|_| resumed.next_batch().unwrap()).collect::<Vec<_>>(), batches[4..]);
    // Mirrored images differ from epoch to epoch, and are the same whenever they are made again.
    let flipped = read(true);
    let epoch = |epoch| flipped.batch(&[0, 1, 2, 3, 4, 5, 6, 7], &loader_config(8), epoch).unwrap().input;
    assert_eq!(epoch(Some(0)), epoch(Some(0)));
    assert_ne!(epoch(Some(0)), epoch(Some(1)));
    assert_eq!(epoch(None), plain.batch(&[0, 1, 2, 3, 4, 5, 6, 7], &loader_config(8), None).unwrap().input);
    std::fs::write(root.join("cat/0.png"), b"no picture").unwrap();
    let eval = LabelledEvaluation::new(plain, loader_config(8)).unwrap();
    let error = eval.batches().unwrap().find_map(Result::err).unwrap().to_string();
    assert!(error.contains("0.png: not a readable image"), "{error}");
}
