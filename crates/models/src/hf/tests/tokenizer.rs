use serde_json::Value;

use super::{assert_has, golden, put, temp, text_of};
use crate::hf::Tokenizer;

fn tiny() -> Tokenizer {
    Tokenizer::from_folder(&golden("models/tiny-llama")).unwrap()
}

fn copy_tokenizer(to: &std::path::Path) {
    std::fs::copy(golden("models/tiny-llama/tokenizer.json"), to.join("tokenizer.json")).unwrap();
}

#[test]
fn gives_the_ids_of_the_reference() {
    for case in ["llama", "llama-tied", "llama3", "mistral", "qwen2", "qwen3", "gemma2"]
        .map(|name| format!("forward_tiny-{name}"))
    {
        let json: Value =
            serde_json::from_str(&std::fs::read_to_string(golden(&case).join("case.json")).unwrap()).unwrap();
        let tokenizer = Tokenizer::from_folder(&golden(json["model"].as_str().unwrap())).unwrap();
        let ids =
            |value: &Value| value.as_array().unwrap().iter().map(|id| id.as_u64().unwrap() as u32).collect::<Vec<_>>();
        let examples = json["tokenizer"].as_array().unwrap();
        for example in examples {
            let text = example["text"].as_str().unwrap();
            assert_eq!(tokenizer.encode(text, true).unwrap(), ids(&example["ids"]), "{case}: {text}");
            assert_eq!(tokenizer.encode(text, false).unwrap(), ids(&example["ids_no_special"]), "{case}: {text}");
            assert_eq!(tokenizer.decode(&ids(&example["ids"]), true).unwrap(), text);
        }
        let texts: Vec<&str> = examples.iter().map(|example| example["text"].as_str().unwrap()).collect();
        let batch = tokenizer.encode_batch(&texts, true).unwrap();
        assert!(batch.iter().zip(examples).all(|(got, example)| *got == ids(&example["ids"])));
    }
}

#[test]
fn offsets_are_bytes_of_the_text() {
    let tokenizer = tiny();
    let text = "Ünïcödé 🙂 and\ttabs";
    let encoding = tokenizer.encode_with_offsets(text, true).unwrap();
    assert_eq!(encoding.ids, tokenizer.encode(text, true).unwrap());
    assert_eq!(encoding.offsets[0], 0..0);
    let mut reached = 0;
    for range in &encoding.offsets[1..] {
        assert!(text.is_char_boundary(range.start) && text.is_char_boundary(range.end), "{range:?}");
        assert!(range.start <= reached && range.end >= reached, "{range:?} after {reached}");
        reached = range.end;
    }
    assert_eq!(reached, text.len());
    assert_eq!(tokenizer.encode_batch_with_offsets(&[text, ""], true).unwrap()[0], encoding);
}

#[test]
fn special_ids_come_from_the_configuration() {
    let tokenizer = tiny();
    assert_eq!(tokenizer.bos_id(), Some(1));
    assert_eq!(tokenizer.eos_id().unwrap(), 2);
    assert_eq!(tokenizer.eos_ids(), [2]);
    assert_eq!(tokenizer.pad_id(), 3);
    assert_eq!(tokenizer.vocab_size(), 384);
    assert_eq!(tokenizer.token_to_id("</s>"), Some(2));
    assert_eq!(tokenizer.id_to_token(0).as_deref(), Some("<unk>"));

    let folder = temp();
    copy_tokenizer(folder.path());
    assert_has(&text_of(Tokenizer::from_folder(folder.path()).unwrap().eos_id()), &["no end-of-text token", "hint:"]);
    assert_eq!(Tokenizer::from_folder(folder.path()).unwrap().pad_id(), 0);
    put(
        folder.path(),
        &[
            ("special_tokens_map.json", r#"{"eos_token":{"content":"</s>","lstrip":false}}"#),
            ("generation_config.json", r#"{"eos_token_id":[3,2,99999]}"#),
        ],
    );
    let tokenizer = Tokenizer::from_folder(folder.path()).unwrap();
    assert_eq!(tokenizer.eos_ids(), [2, 3]);
    assert_eq!(tokenizer.pad_id(), 2);
}

#[test]
fn the_fingerprint_follows_the_content() {
    let folder = temp();
    copy_tokenizer(folder.path());
    let first = Tokenizer::from_folder(folder.path()).unwrap().fingerprint().to_string();
    assert_eq!(first.len(), 64);
    assert_eq!(first, Tokenizer::from_folder(folder.path()).unwrap().fingerprint());
    put(folder.path(), &[("generation_config.json", r#"{"eos_token_id":3}"#)]);
    assert_ne!(first, Tokenizer::from_folder(folder.path()).unwrap().fingerprint());
}

#[test]
fn bad_folders_are_explained() {
    let folder = temp();
    assert_has(&text_of(Tokenizer::from_folder(folder.path())), &["has no tokenizer.json", "it holds: nothing"]);
    put(folder.path(), &[("tokenizer.model", "x")]);
    assert_has(
        &text_of(Tokenizer::from_folder(folder.path())),
        &["it holds: tokenizer.model", "older tokenizer format"],
    );
    put(folder.path(), &[("tokenizer.json", r#"{"version":"1.0","model":{}"#)]);
    assert_has(&text_of(Tokenizer::from_folder(folder.path())), &["tokenizer.json: not a usable tokenizer", "hint:"]);
    copy_tokenizer(folder.path());
    put(folder.path(), &[("tokenizer_config.json", r#"{"eos_token":"<|im_end|>"}"#)]);
    assert_has(
        &text_of(Tokenizer::from_folder(folder.path())),
        &["tokenizer_config.json", "eos_token `<|im_end|>` is not in the vocabulary"],
    );
    put(folder.path(), &[("tokenizer_config.json", "{")]);
    assert_has(&text_of(Tokenizer::from_folder(folder.path())), &["tokenizer_config.json: not valid JSON"]);
}

#[test]
fn truncation_and_padding_of_the_file_are_off() {
    let folder = temp();
    let text = std::fs::read_to_string(golden("models/tiny-llama/tokenizer.json")).unwrap();
    let mut json: Value = serde_json::from_str(&text).unwrap();
    json["truncation"] = serde_json::json!({"direction":"Right","max_length":3,"strategy":"LongestFirst","stride":0});
    json["padding"] = serde_json::json!({"strategy":{"Fixed":64},"direction":"Right","pad_to_multiple_of":null,"pad_id":3,"pad_type_id":0,"pad_token":"<pad>"});
    put(folder.path(), &[("tokenizer.json", &json.to_string())]);
    let changed = Tokenizer::from_folder(folder.path()).unwrap();
    let long = "The small cat sees a matrix near the lake.";
    assert_eq!(changed.encode(long, true).unwrap(), tiny().encode(long, true).unwrap());
}

#[test]
fn a_stream_shows_whole_characters_only() {
    let tokenizer = tiny();
    for text in ["Ünïcödé 🙂 and\ttabs\n\nnewlines", "  leading spaces", "12 + 34 = 46."] {
        let ids = tokenizer.encode(text, true).unwrap();
        let mut stream = tokenizer.decode_stream(true);
        let mut shown = String::new();
        for id in &ids {
            let piece = stream.push(*id).unwrap();
            assert!(!piece.contains(char::REPLACEMENT_CHARACTER), "{piece:?}");
            shown.push_str(&piece);
        }
        shown.push_str(&stream.finish().unwrap());
        assert_eq!(shown, text);
    }
    let smile = tokenizer.encode("🙂", false).unwrap();
    assert!(smile.len() > 1);
    let mut stream = tokenizer.decode_stream(true);
    assert_eq!(stream.push(smile[0]).unwrap(), "");
    assert!(stream.finish().unwrap().contains(char::REPLACEMENT_CHARACTER));
}
