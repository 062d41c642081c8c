use std::path::Path;

use super::{assert_has, golden, put, temp, text_of};
use crate::hf::checkpoint::{INDEX_FILE, SINGLE_FILE};
use crate::hf::{Checkpoint, Dtype, OutTensor, write_safetensors, write_sharded};

/// A safetensors file with this header and this many data bytes.
fn write_raw(path: &Path, header: &str, data_bytes: usize) {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend(vec![0u8; data_bytes]);
    std::fs::write(path, bytes).unwrap();
}

fn open_error(header: &str, data_bytes: usize) -> String {
    let folder = temp();
    write_raw(&folder.path().join(SINGLE_FILE), header, data_bytes);
    let text = text_of(Checkpoint::open(folder.path()));
    assert_has(&text, &[SINGLE_FILE, "hint:"]);
    text
}

fn tensor(name: &str, values: &[f32]) -> OutTensor<'static> {
    OutTensor::from_f32(name, Dtype::F32, &[values.len()], values.to_vec())
}

#[test]
fn reads_the_reference_models() {
    for (name, tensors) in [("tiny-llama", 21), ("tiny-llama3", 20), ("tiny-qwen2", 26)] {
        let checkpoint = Checkpoint::open(&golden("models").join(name)).unwrap();
        assert_eq!(checkpoint.names().count(), tensors, "{name}");
        let view = checkpoint.get("model.norm.weight").unwrap();
        assert_eq!((view.dtype, view.shape, view.to_f32().len()), (Dtype::F32, &[64][..], 64));
        let total: usize = checkpoint.names().map(|name| checkpoint.get(name).unwrap().bytes.len()).sum();
        assert_eq!(total as u64, checkpoint.total_bytes());
    }
}

#[test]
fn a_sharded_copy_equals_the_original() {
    let source = Checkpoint::open(&golden("models/tiny-llama")).unwrap();
    let folder = temp();
    let copies = || {
        source.names().map(|name| {
            let view = source.get(name).unwrap();
            OutTensor::new(name, view.dtype, view.shape, move || view.bytes.to_vec())
        })
    };
    let files = write_sharded(folder.path(), copies().collect(), 100_000).unwrap();
    assert!(files.len() > 3 && files.contains(&INDEX_FILE.to_string()), "{files:?}");
    let copy = Checkpoint::open(folder.path()).unwrap();
    for name in source.names() {
        let (a, b) = (source.get(name).unwrap(), copy.get(name).unwrap());
        assert_eq!((a.dtype, a.shape, a.bytes), (b.dtype, b.shape, b.bytes), "{name}");
    }
}

#[test]
fn a_folder_without_weights_says_what_is_there() {
    let folder = temp();
    put(folder.path(), &[("pytorch_model.bin", "x"), ("config.json", "{}")]);
    let text = text_of(Checkpoint::open(folder.path()));
    assert_has(
        &text,
        &[
            "has no model.safetensors",
            "config.json, pytorch_model.bin",
            "hint: the weights are in PyTorch's pickle format",
        ],
    );
    let text = text_of(Checkpoint::open(&folder.path().join("nowhere")));
    assert_has(&text, &["it holds: nothing", "the folder does not exist"]);
}

#[test]
fn damaged_files_are_refused() {
    let folder = temp();
    let path = folder.path().join(SINGLE_FILE);
    std::fs::write(&path, b"abc").unwrap();
    assert_has(&text_of(Checkpoint::open(folder.path())), &["3 bytes long", "interrupted"]);
    std::fs::write(&path, b"").unwrap();
    assert_has(&text_of(Checkpoint::open(folder.path())), &["0 bytes long"]);
    std::fs::write(&path, [0xff; 64]).unwrap();
    assert_has(&text_of(Checkpoint::open(folder.path())), &["more than the format allows"]);

    write_safetensors(&path, vec![tensor("a", &[1.0, 2.0]), tensor("b", &[3.0])], &[]).unwrap();
    let whole = std::fs::read(&path).unwrap();
    // Cut anywhere, the file is refused with a reason, never read.
    for length in 0..whole.len() {
        std::fs::write(&path, &whole[..length]).unwrap();
        assert_has(&text_of(Checkpoint::open(folder.path())), &[SINGLE_FILE, "hint:"]);
    }
    std::fs::write(&path, &whole[..whole.len() - 2]).unwrap();
    assert_has(
        &text_of(Checkpoint::open(folder.path())),
        &["the header describes 12 bytes of tensors, but the file holds 10"],
    );
}

#[test]
fn lying_headers_are_refused() {
    let text = open_error(r#"{"w":{"dtype":"F32","shape":[2,3],"data_offsets":[0,20]}}"#, 20);
    assert_has(&text, &["tensor `w`: 6 elements of F32 take 24 bytes, but its offsets span 20"]);
    let two = r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}}"#;
    assert_has(&open_error(two, 12), &["tensor `b`: its offsets overlap"]);
    assert_has(
        &open_error(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}"#, 4),
        &["describes 8 bytes", "holds 4"],
    );
    assert_has(&open_error(r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[8,0]}}"#, 8), &["tensor `a`"]);
    let huge = format!(r#"{{"a":{{"dtype":"F32","shape":[{0},{0}],"data_offsets":[0,8]}}}}"#, u64::MAX / 2);
    assert_has(&open_error(&huge, 8), &["larger than memory"]);
    assert_has(
        &open_error(r#"{"a":{"dtype":"F99","shape":[2],"data_offsets":[0,8]}}"#, 8),
        &["the header is not valid", "F99"],
    );
    assert_has(&open_error("{not json", 8), &["the header is not valid"]);
    assert_has(&open_error("[]", 0), &["the header is not valid"]);
}

#[test]
fn an_index_is_checked_as_a_whole() {
    let folder = temp();
    write_safetensors(&folder.path().join("one.safetensors"), vec![tensor("a", &[1.0])], &[]).unwrap();
    let index = r#"{"weight_map":{"a":"one.safetensors","b":"one.safetensors","c":"two.safetensors","d":"../three.safetensors","e":"/etc/passwd"}}"#;
    put(folder.path(), &[(INDEX_FILE, index)]);
    let text = text_of(Checkpoint::open(folder.path()));
    assert_has(
        &text,
        &[
            INDEX_FILE,
            "4 of its entries",
            "tensor `b` is not in one.safetensors",
            "shard two.safetensors is missing",
            "`../three.safetensors` is not a file inside the folder",
            "`/etc/passwd` is not a file inside the folder",
        ],
    );
    for (content, reason) in [
        ("{", "not valid JSON"),
        ("{}", "no `weight_map` object"),
        (r#"{"weight_map":{}}"#, "`weight_map` is empty"),
        (r#"{"weight_map":{"a":3}}"#, "weight_map[`a`]: expected a file name, got 3"),
    ] {
        put(folder.path(), &[(INDEX_FILE, content)]);
        assert_has(&text_of(Checkpoint::open(folder.path())), &[INDEX_FILE, reason]);
    }
}

#[test]
fn check_reports_everything_at_once() {
    let folder = temp();
    let path = folder.path().join(SINGLE_FILE);
    write_raw(
        &path,
        r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"I8","shape":[2],"data_offsets":[8,10]},"extra":{"dtype":"F32","shape":[0],"data_offsets":[10,10]},"rotary.inv_freq":{"dtype":"F32","shape":[0],"data_offsets":[10,10]}}"#,
        10,
    );
    let checkpoint = Checkpoint::open(folder.path()).unwrap();
    let expected = [("a".to_string(), vec![3]), ("b".to_string(), vec![2]), ("c".to_string(), vec![1, 2])];
    let text = text_of(checkpoint.check(&expected, |name| name.ends_with("inv_freq")));
    assert_has(
        &text,
        &[
            "missing: 1\n  c [1, 2]",
            "not expected: 1\n  extra",
            "wrong shape: 1\n  a: expected [3], got [2]",
            "unsupported element type: 1\n  b: expected F32, F16 or BF16, got I8",
            "hint:",
        ],
    );
    assert!(!text.contains("inv_freq"), "{text}");
    assert_has(&text_of(checkpoint.get("b")), &["tensor `b` is stored as I8"]);
    assert_has(&text_of(checkpoint.get("model.a")), &["no tensor named `model.a`; the nearest names are: a"]);
    let ok = [("a".to_string(), vec![2])];
    checkpoint.check(&ok, |name| name != "a").unwrap();
}

#[test]
fn check_guesses_the_cause() {
    let folder = temp();
    let path = folder.path().join(SINGLE_FILE);
    write_safetensors(&path, vec![tensor("layers.0.w", &[1.0])], &[]).unwrap();
    let expected = [("model.layers.0.w".to_string(), vec![1])];
    assert_has(&text_of(Checkpoint::open(folder.path()).unwrap().check(&expected, |_| false)), &["differ by a prefix"]);
    write_safetensors(&path, vec![tensor("base_model.model.q_proj.lora_A.weight", &[1.0])], &[]).unwrap();
    assert_has(&text_of(Checkpoint::open(folder.path()).unwrap().check(&expected, |_| false)), &["this is an adapter"]);
    let many: Vec<_> = (0..30).map(|i| (format!("t{i:02}"), vec![1])).collect();
    assert_has(
        &text_of(Checkpoint::open(folder.path()).unwrap().check(&many, |_| true)),
        &["missing: 30", "t09", "and 20 more"],
    );
}
