use std::path::Path;

use super::{assert_has, golden, put, temp, text_of};
use crate::hf::checkpoint::{INDEX_FILE, SINGLE_FILE};
use crate::hf::write::{TORCH_METADATA, copy_companion_files};
use crate::hf::{
    Checkpoint, Dtype, OutTensor, write_bytes_atomic, write_safetensors, write_sharded, write_text_atomic,
};

fn ramp(name: &str, dtype: Dtype, count: usize) -> OutTensor<'static> {
    OutTensor::from_f32(name, dtype, &[count], (0..count).map(|i| i as f32).collect())
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn reads_back_what_was_written() {
    let folder = temp();
    let path = folder.path().join("adapter_model.safetensors");
    let tensors = vec![
        ramp("b", Dtype::BF16, 5),
        ramp("a", Dtype::F32, 3),
        ramp("c", Dtype::F16, 1),
        ramp("empty", Dtype::F32, 0),
    ];
    write_safetensors(&path, tensors, TORCH_METADATA).unwrap();
    let read = Checkpoint::open_file(&path).unwrap();
    assert_eq!(read.names().collect::<Vec<_>>(), ["a", "b", "c", "empty"]);
    assert_eq!(read.get("b").unwrap().dtype, Dtype::BF16);
    assert_eq!(read.get("b").unwrap().to_f32(), [0.0, 1.0, 2.0, 3.0, 4.0]);
    assert_eq!(
        read.get("a").unwrap().to_dtype(Dtype::F16),
        read.get("a").map(|a| crate::hf::dtype::from_f32(&a.to_f32(), Dtype::F16)).unwrap()
    );
    // The reference reader agrees, with the metadata.
    let bytes = std::fs::read(&path).unwrap();
    let (header, metadata) = safetensors::SafeTensors::read_metadata(&bytes).unwrap();
    assert_eq!(header % 8, 0);
    assert_eq!(metadata.metadata().as_ref().unwrap()["format"], "pt");
    assert_eq!(names(folder.path()), ["adapter_model.safetensors"]);
}

#[test]
fn the_same_tensors_give_the_same_bytes() {
    let folder = temp();
    let (one, two) = (folder.path().join("one"), folder.path().join("two"));
    let metadata = [("format", "pt"), ("step", "7"), ("a", "b")];
    write_safetensors(&one, vec![ramp("x", Dtype::F32, 2), ramp("y", Dtype::F32, 2)], &metadata).unwrap();
    write_safetensors(&two, vec![ramp("y", Dtype::F32, 2), ramp("x", Dtype::F32, 2)], &metadata).unwrap();
    assert_eq!(std::fs::read(one).unwrap(), std::fs::read(two).unwrap());
}

#[test]
fn a_failed_write_leaves_the_earlier_file() {
    let folder = temp();
    let path = folder.path().join(SINGLE_FILE);
    write_safetensors(&path, vec![ramp("a", Dtype::F32, 4)], &[]).unwrap();
    let before = std::fs::read(&path).unwrap();
    let wrong = OutTensor::new("b", Dtype::F32, &[2], || vec![0; 3]);
    let text = text_of(write_safetensors(&path, vec![ramp("a", Dtype::F32, 1 << 20), wrong], &[]));
    assert_has(&text, &[SINGLE_FILE, "tensor `b` [2] F32: expected 8 bytes, got 3"]);
    let text = text_of(write_safetensors(&path, vec![ramp("a", Dtype::F32, 1), ramp("a", Dtype::F32, 1)], &[]));
    assert_has(&text, &["two tensors are named `a`"]);
    let text = text_of(write_sharded(
        folder.path(),
        vec![ramp("a", Dtype::F32, 1), ramp("b", Dtype::F32, 9), ramp("a", Dtype::F32, 1)],
        1,
    ));
    assert_has(&text, &["two tensors are named `a`"]);
    assert_eq!(std::fs::read(&path).unwrap(), before);
    assert_eq!(names(folder.path()), [SINGLE_FILE]);
}

#[test]
fn a_missing_folder_is_named() {
    let folder = temp();
    let text = text_of(write_text_atomic(&folder.path().join("no/such/file.json"), "x"));
    assert_has(&text, &["cannot write", "no/such/file.json", "hint: check the path"]);
    assert_has(&text_of(write_bytes_atomic(Path::new("/"), b"x")), &["not a file name"]);
}

#[test]
fn text_is_replaced_whole() {
    let folder = temp();
    let path = folder.path().join("note.txt");
    write_text_atomic(&path, "a long first text").unwrap();
    write_text_atomic(&path, "short").unwrap();
    assert_eq!(std::fs::read_to_string(&path).unwrap(), "short");
    assert_eq!(names(folder.path()), ["note.txt"]);
}

#[test]
fn shards_respect_the_limit_and_replace_earlier_files() {
    let folder = temp();
    let tensors = || (0..5).map(|i| ramp(&format!("t{i}"), Dtype::F32, 10)).collect::<Vec<_>>();
    assert_eq!(write_sharded(folder.path(), tensors(), 1000).unwrap(), [SINGLE_FILE]);
    assert_eq!(names(folder.path()), [SINGLE_FILE]);
    let files = write_sharded(folder.path(), tensors(), 80).unwrap();
    assert_eq!(names(folder.path()), files);
    assert_eq!(files.len(), 4);
    let index: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(folder.path().join(INDEX_FILE)).unwrap()).unwrap();
    assert_eq!(index["metadata"]["total_size"], 200);
    assert_eq!(index["weight_map"]["t2"], "model-00002-of-00003.safetensors");
    assert_eq!(Checkpoint::open(folder.path()).unwrap().names().count(), 5);
    // A tensor above the limit gets its own shard; back to one file, the index goes.
    assert_eq!(write_sharded(folder.path(), tensors(), 1).unwrap().len(), 6);
    write_sharded(folder.path(), tensors(), u64::MAX).unwrap();
    assert_eq!(names(folder.path()), [SINGLE_FILE]);
    assert_eq!(write_sharded(folder.path(), Vec::new(), 10).unwrap(), [SINGLE_FILE]);
}

#[test]
fn companions_are_carried_along() {
    let folder = temp();
    put(folder.path(), &[("config.json", "{}")]);
    let copied = copy_companion_files(&golden("models/tiny-llama"), folder.path()).unwrap();
    assert_eq!(copied, ["generation_config.json", "tokenizer.json", "tokenizer_config.json"]);
    assert_eq!(names(folder.path()).len(), 4);
}
