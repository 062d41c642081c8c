use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};

use super::{assert_has, golden, put, temp, text_of};
use crate::hf::hub::{HubSettings, fetch_dataset_files, fetch_model};
use crate::hf::{Checkpoint, resolve_model};

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A server with the hub's addresses: the list of files, and each file by range with the headers the client asks for.
struct Hub {
    address: String,
    log: Arc<Mutex<Vec<String>>>,
}

impl Hub {
    /// Serves files of `org/tiny` (model) and `org/rows` (data set). `status` other than 200 is the answer to everything.
    fn start(files: BTreeMap<String, Vec<u8>>, status: u16) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = format!("http://{}", listener.local_addr().unwrap());
        let log = Arc::new(Mutex::new(Vec::new()));
        let requests = Arc::clone(&log);
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                answer(stream, &files, status, &requests);
            }
        });
        Self { address, log }
    }

    fn settings(&self, cache: &Path) -> HubSettings {
        HubSettings {
            endpoint: self.address.clone(),
            cache: cache.to_path_buf(),
            token: None,
            offline: false,
            progress: false,
        }
    }

    fn requests(&self) -> Vec<String> {
        self.log.lock().unwrap().clone()
    }
}

fn answer(mut stream: TcpStream, files: &BTreeMap<String, Vec<u8>>, status: u16, log: &Mutex<Vec<String>>) {
    let mut reader = BufReader::new(stream.try_clone().unwrap());
    let mut lines = Vec::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line).unwrap_or(0) == 0 || line == "\r\n" {
            break;
        }
        lines.push(line.trim().to_string());
    }
    let Some(first) = lines.first().cloned() else { return };
    let path = first.split(' ').nth(1).unwrap().to_string();
    let header = |name: &str| {
        lines.iter().find_map(|line| line.to_lowercase().strip_prefix(&format!("{name}: ")).map(str::to_string))
    };
    log.lock().unwrap().push(format!("{path} {}", header("authorization").unwrap_or_default()).trim().to_string());
    let (code, extra, body) = if status != 200 {
        (status, String::new(), Vec::new())
    } else if path.starts_with("/api/") {
        let siblings: Vec<_> = files.keys().map(|name| serde_json::json!({ "rfilename": name })).collect();
        (200, String::new(), serde_json::json!({ "sha": COMMIT, "siblings": siblings }).to_string().into_bytes())
    } else {
        let name = path.split(&format!("/resolve/{COMMIT}/")).nth(1).unwrap_or_default();
        match files.get(name) {
            None => (404, String::new(), Vec::new()),
            Some(content) => {
                let range = header("range").unwrap();
                let (from, to) = range.strip_prefix("bytes=").unwrap().split_once('-').unwrap();
                let from: usize = from.parse().unwrap();
                let to = to.parse().map_or(content.len(), |to: usize| to + 1);
                let extra = format!(
                    "etag: \"tag-{}\"\r\nx-repo-commit: {COMMIT}\r\ncontent-range: bytes {from}-{}/{}\r\n",
                    name.replace('/', "-"),
                    to - 1,
                    content.len()
                );
                (206, extra, content[from..to].to_vec())
            }
        }
    };
    let head = format!("HTTP/1.1 {code} X\r\nconnection: close\r\n{extra}content-length: {}\r\n\r\n", body.len());
    let _ = stream.write_all(head.as_bytes()).and_then(|()| stream.write_all(&body));
}

fn model_files(folder: &str) -> BTreeMap<String, Vec<u8>> {
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    for entry in std::fs::read_dir(golden(folder)).unwrap().flatten() {
        files.insert(entry.file_name().into_string().unwrap(), std::fs::read(entry.path()).unwrap());
    }
    files.insert("README.md".to_string(), b"not needed".to_vec());
    files
}

#[test]
fn downloads_once_and_works_offline_after() {
    let cache = temp();
    let hub = Hub::start(model_files("models/tiny-llama3"), 200);
    let mut settings = hub.settings(cache.path());
    let folder = fetch_model(&settings, "org/tiny").unwrap();
    assert!(folder.ends_with(format!("models--org--tiny/snapshots/{COMMIT}")), "{}", folder.display());
    let checkpoint = Checkpoint::open(&folder).unwrap();
    let original = Checkpoint::open(&golden("models/tiny-llama3")).unwrap();
    for name in original.names() {
        assert_eq!(checkpoint.get(name).unwrap().bytes, original.get(name).unwrap().bytes);
    }
    assert!(folder.join("tokenizer.json").exists() && !folder.join("README.md").exists());

    let before = hub.requests().len();
    assert_eq!(fetch_model(&settings, "org/tiny").unwrap(), folder);
    assert_eq!(hub.requests().len(), before + 1, "only the file list is asked for again");

    settings.offline = true;
    assert_eq!(fetch_model(&settings, "org/tiny").unwrap(), folder);
    assert_eq!(fetch_model(&settings, &format!("org/tiny@{COMMIT}")).unwrap(), folder);
    assert_eq!(hub.requests().len(), before + 1);
    assert_has(
        &text_of(fetch_model(&settings, "org/other")),
        &["HF_HUB_OFFLINE is set", "models there: org/tiny", "hint: run once with a network"],
    );
    std::fs::remove_file(folder.join("model-00002-of-00004.safetensors")).unwrap();
    assert_has(
        &text_of(fetch_model(&settings, "org/tiny")),
        &["cannot get model-00002-of-00004.safetensors of `org/tiny`"],
    );

    // A server that does not answer: the complete cache is good enough.
    settings.offline = false;
    fetch_model(&settings, "org/tiny").unwrap();
    settings.endpoint = "http://127.0.0.1:9".to_string();
    assert_eq!(fetch_model(&settings, "org/tiny").unwrap(), folder);
    assert_has(
        &text_of(fetch_model(&settings, "org/other")),
        &["cannot get the file list of `org/other`", "no answer", "hint: check the network"],
    );
}

#[test]
fn revision_and_token_are_sent() {
    let cache = temp();
    let hub = Hub::start(model_files("models/tiny-llama"), 200);
    let mut settings = hub.settings(cache.path());
    settings.token = Some("hf_secret".to_string());
    fetch_model(&settings, "org/tiny@v1.0").unwrap();
    let requests = hub.requests();
    assert_eq!(requests[0], "/api/models/org/tiny/revision/v1.0 bearer hf_secret");
    assert!(requests[1].starts_with(&format!("/org/tiny/resolve/{COMMIT}/config.json")), "{requests:?}");
    settings.offline = true;
    fetch_model(&settings, "org/tiny@v1.0").unwrap();
    assert_has(&text_of(fetch_model(&settings, "org/tiny")), &["not in the cache"]);
}

#[test]
fn an_interrupted_download_goes_on() {
    let cache = temp();
    let files = model_files("models/tiny-llama");
    let blobs = cache.path().join("models--org--tiny/blobs");
    std::fs::create_dir_all(&blobs).unwrap();
    std::fs::write(blobs.join("tag-model.part"), &files["model.safetensors"][..1000]).unwrap();
    let hub = Hub::start(files.clone(), 200);
    let folder = fetch_model(&hub.settings(cache.path()), "org/tiny").unwrap();
    assert_eq!(std::fs::read(folder.join("model.safetensors")).unwrap(), files["model.safetensors"]);
}

#[test]
fn refusals_have_hints() {
    for (status, parts) in [
        (401, ["asks for a login (401)", "set HF_TOKEN"]),
        (403, ["access denied (403)", "accept the licence at"]),
        (404, ["not found (404)", "check the name"]),
    ] {
        let cache = temp();
        let hub = Hub::start(BTreeMap::new(), status);
        let text = text_of(fetch_model(&hub.settings(cache.path()), "org/tiny"));
        assert_has(&text, &["cannot get the file list of `org/tiny` from http://127.0.0.1"]);
        assert_has(&text, &parts);
    }
}

#[test]
fn a_model_without_safetensors_is_explained() {
    let cache = temp();
    let files = ["config.json", "pytorch_model.bin"].map(|name| (name.to_string(), b"{}".to_vec()));
    let hub = Hub::start(files.into_iter().collect(), 200);
    let text = text_of(fetch_model(&hub.settings(cache.path()), "org/tiny"));
    assert_has(&text, &["org/tiny has no model.safetensors", "config.json, pytorch_model.bin", "only safetensors"]);
    let index = br#"{"weight_map":{"a":"../../evil"}}"#.to_vec();
    let files = [("config.json".to_string(), b"{}".to_vec()), ("model.safetensors.index.json".to_string(), index)];
    let hub = Hub::start(files.into_iter().collect(), 200);
    let text = text_of(fetch_model(&hub.settings(temp().path()), "org/tiny"));
    assert_has(&text, &["`../../evil` is not a file inside the folder"]);
}

#[test]
fn data_set_files_are_chosen_by_pattern() {
    let cache = temp();
    let files = ["data/train-0.parquet", "data/train-1.parquet", "data/test-0.parquet", "all.jsonl", "README.md"];
    let hub = Hub::start(files.map(|name| (name.to_string(), name.as_bytes().to_vec())).into_iter().collect(), 200);
    let settings = hub.settings(cache.path());
    let names = |pattern: &str| -> Vec<String> {
        let paths = fetch_dataset_files(&settings, "org/rows", pattern).unwrap();
        paths.iter().map(|path| std::fs::read_to_string(path).unwrap()).collect()
    };
    assert_eq!(names("data/train-*.parquet"), ["data/train-0.parquet", "data/train-1.parquet"]);
    assert_eq!(names("**-0.parquet"), ["data/test-0.parquet", "data/train-0.parquet"]);
    assert_eq!(names("").len(), 4);
    assert!(hub.requests()[0].starts_with("/api/datasets/org/rows/revision/main"));
    assert_has(
        &text_of(fetch_dataset_files(&settings, "org/rows", "*.csv")),
        &["has no file matching `*.csv`", "all.jsonl"],
    );
}

#[test]
fn names_are_told_from_paths() {
    let folder = temp();
    let path = folder.path().to_string_lossy().into_owned();
    assert_eq!(resolve_model(&path).unwrap(), folder.path());
    put(folder.path(), &[("config.json", "{}")]);
    assert_has(&text_of(resolve_model(&format!("{path}/config.json"))), &["is a file, not a model folder"]);
    for name in [
        "",
        "gpt2",
        "./missing",
        "../org/name",
        "a/b/c",
        "org/na me",
        "org/name@",
        "org/..",
        "/nowhere/at/all",
        "org/name@../x",
    ] {
        assert_has(&text_of(resolve_model(name)), &[&format!("`{name}`: no such folder, and not a hub id"), "hint:"]);
    }
    // Beside an existing folder a name is a mistyped path. Tests run in the crate's folder, which has `src`.
    assert_has(&text_of(resolve_model("src/modle")), &["no such folder"]);
}
