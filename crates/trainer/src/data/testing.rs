//! What the tests of this folder share: a tiny tokenizer, a chat template, files, data sets made of given tokens.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};
use std::sync::Arc;

use lowrank_models::hf::{ChatTemplate, Tokenizer};
use serde_json::{Map, Value};

use super::source::Numbering;
use super::store::{DataFile, Dataset, Document, ReadReport, Tokens};
use super::tokenize::Encoder;

/// A byte-level tokenizer: `<unk>` 0, `<s>` 1 (put before every text), `</s>` 2, `<pad>` 3.
pub fn tokenizer() -> Tokenizer {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens/models/tiny-llama");
    Tokenizer::from_folder(&folder).unwrap()
}

pub fn encoder(tokenizer: &Tokenizer) -> Encoder<'_> {
    Encoder { tokenizer, chat: None }
}

/// `<s>role: content</s>\n` for each message.
pub fn chat_template() -> ChatTemplate {
    let source = "{% for message in messages %}{{ bos_token + message['role'] + ': ' + message['content'] + eos_token + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ bos_token + 'assistant: ' }}{% endif %}";
    let special = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let special: Map<String, Value> = special.iter().map(|(key, text)| (key.to_string(), Value::from(*text))).collect();
    ChatTemplate::new(source, Path::new("chat_template.jinja"), special).unwrap()
}

/// Writes a file and returns its path.
pub fn write(folder: &tempfile::TempDir, name: &str, bytes: &[u8]) -> String {
    let path = folder.path().join(name);
    std::fs::write(&path, bytes).unwrap();
    path.to_str().unwrap().to_owned()
}

/// A data set of documents with these ids and marks, one record each.
pub fn dataset(documents: &[(Vec<u32>, Vec<bool>)]) -> Arc<Dataset> {
    let mut tokens = Tokens::default();
    let mut index = Vec::new();
    for (record, (ids, counted)) in documents.iter().enumerate() {
        let record = record as u64;
        index.push(Document { start: tokens.ids.len(), length: ids.len(), record, file: 0, position: record + 1 });
        tokens.ids.extend(ids);
        tokens.counted.extend(counted);
    }
    let file = DataFile { path: PathBuf::from("made-up.jsonl"), numbering: Numbering::Line };
    Arc::new(Dataset::new(Arc::new(tokens), index, Arc::new([file]), Arc::new(ReadReport::default())))
}
