//! A temporary folder with a small run that works, ways to damage it, and the program run in it.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use serde_json::{Map, Value};

const CONFIG: &str = r#"base_model = "model"
output_dir = "out"
device = "cpu"

[adapter.lora]
r = 4

[data]
train = "data.jsonl"
max_seq_length = 32

[training]
max_steps = 1

[logging]
progress = "plain"
"#;

/// A folder with `model/`, `data.jsonl`, `run.toml` and `out/notes.txt`.
pub struct Workplace {
    root: tempfile::TempDir,
}

impl Workplace {
    pub fn new() -> Self {
        let place = Self { root: tempfile::tempdir().unwrap() };
        place.copy("models/tiny-llama", "model");
        place.write("data.jsonl", "{\"text\": \"one two three four\"}\n".repeat(3));
        place.write("run.toml", CONFIG);
        place.write("out/notes.txt", "not of this run");
        place
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) {
        let path = self.path(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
    }

    pub fn read(&self, name: &str) -> Vec<u8> {
        std::fs::read(self.path(name)).unwrap()
    }

    pub fn remove(&self, name: &str) {
        let path = self.path(name);
        if path.is_dir() { std::fs::remove_dir_all(path) } else { std::fs::remove_file(path) }.unwrap();
    }

    pub fn rename(&self, from: &str, to: &str) {
        std::fs::rename(self.path(from), self.path(to)).unwrap();
    }

    /// Copies a folder of the reference results.
    pub fn copy(&self, golden: &str, to: &str) {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens").join(golden);
        std::fs::create_dir_all(self.path(to)).unwrap();
        for entry in std::fs::read_dir(&from).unwrap() {
            let path = entry.unwrap().path();
            std::fs::copy(&path, self.path(to).join(path.file_name().unwrap())).unwrap();
        }
    }

    /// Changes the configuration; `old` must be in it.
    pub fn config(&self, old: &str, new: &str) {
        let text = String::from_utf8(self.read("run.toml")).unwrap();
        assert!(text.contains(old), "{old}");
        self.write("run.toml", text.replace(old, new));
    }

    /// Changes a JSON file.
    pub fn json(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>)) {
        let mut value: Value = serde_json::from_slice(&self.read(name)).unwrap();
        change(value.as_object_mut().unwrap());
        self.write(name, value.to_string());
    }

    /// Changes the header and the tensor bytes of a safetensors file, and writes the length of the header right.
    pub fn tensors(&self, name: &str, change: impl FnOnce(&mut Map<String, Value>, &mut Vec<u8>)) {
        let bytes = self.read(name);
        let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let mut header: Map<String, Value> = serde_json::from_slice(&bytes[8..8 + length]).unwrap();
        let mut data = bytes[8 + length..].to_vec();
        change(&mut header, &mut data);
        let header = serde_json::to_vec(&header).unwrap();
        self.write(name, [&(header.len() as u64).to_le_bytes()[..], &header, &data].concat());
    }

    /// Changes single bytes of a file.
    pub fn bytes(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = self.read(name);
        change(&mut bytes);
        self.write(name, bytes);
    }

    /// Puts an adapter of peft for `q_proj` and `v_proj`, rank 4, into `adapter/` and into the configuration.
    pub fn with_adapter(&self) {
        self.copy("lora_qv_r4/adapter_init", "adapter");
        self.config("device = \"cpu\"", "device = \"cpu\"\ninit_adapter = \"adapter\"");
    }

    /// Replaces the model by one in four shards.
    pub fn with_shards(&self) {
        self.remove("model");
        self.copy("models/tiny-llama3", "model");
    }

    /// Runs a program here, without network, caches in this folder, and nothing on standard input.
    pub fn run(&self, program: &str, arguments: &[&str]) -> Output {
        Command::new(program)
            .args(arguments)
            .current_dir(self.root.path())
            .env("LOWRANK_CACHE", self.path("cache"))
            .env("HF_HOME", self.path("huggingface"))
            .env("HF_HUB_OFFLINE", "1")
            .stdin(Stdio::null())
            .output()
            .unwrap()
    }

    /// The content of every file here, but for locks.
    pub fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut folders = vec![self.root.path().to_path_buf()];
        while let Some(folder) = folders.pop() {
            for entry in std::fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else if path.file_name().unwrap() != ".lock" {
                    files.insert(path.clone(), std::fs::read(&path).unwrap());
                }
            }
        }
        files
    }
}
