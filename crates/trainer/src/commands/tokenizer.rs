//! `lowrank-train tokenizer`: learn a tokenizer from text, for a model that is trained from nothing.
//!
//! Byte-level BPE as in GPT-2: every text has ids and gets back to the byte. Ids begin with `<unk>` 0, `<s>` 1,
//! `</s>` 2 and `<pad>` 3; `<s>` is put before every text. The same corpus gives the same bytes.

use std::collections::HashSet;
use std::path::Path;

use lowrank_models::hf::write_text_atomic;
use serde_json::json;
use tokenizers::models::TrainerWrapper;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::processors::template::TemplateProcessing;
use tokenizers::{AddedToken, Tokenizer};

use crate::cli::TokenizerArgs;
use crate::data::{DataConfig, DataError, Paths, TextFiles};
use crate::error::Problem;
use crate::task::data_problem;

/// The special tokens of every tokenizer made here, in the order of their ids.
const SPECIAL: [&str; 4] = ["<unk>", "<s>", "</s>", "<pad>"];

/// Place of the begin-of-text token in [`SPECIAL`].
const BOS: usize = 1;

/// The symbols of a byte-level vocabulary.
const BYTES: usize = 256;

/// Pairs that occur less often are not merged.
const MIN_FREQUENCY: u64 = 2;

const FILES: [&str; 2] = ["tokenizer_config.json", "tokenizer.json"];

/// Runs the command.
///
/// # Errors
/// A vocabulary that is too small, files that are there already (exit code 2); text that cannot be read (1).
pub fn run(args: &TokenizerArgs) -> anyhow::Result<()> {
    let special = special_tokens(&args.special)?;
    let smallest = BYTES + special.len();
    if args.vocab_size < smallest {
        let what = format!("--vocab-size is {}, must be at least {smallest}", args.vocab_size);
        let hint = format!("{BYTES} bytes and {} special tokens are always in the vocabulary", special.len());
        return Err(Problem::config(what).hint(hint).into());
    }
    if let Some(name) = FILES.iter().find(|name| args.output.join(name).exists() && !args.force) {
        let what = format!("{} is there already", args.output.join(name).display());
        return Err(Problem::config(what).hint("pass --force to replace it, or name another --output").into());
    }
    let tokenizer = learn(args, &special)?;
    let size = tokenizer.get_vocab_size(true);
    if size < args.vocab_size {
        tracing::warn!("the text is too short for {} tokens: the vocabulary has {size}", args.vocab_size);
    }
    write(&tokenizer, &special, &args.output)?;
    tracing::info!("wrote {} with {size} tokens", args.output.display());
    Ok(())
}

/// All special tokens: the usual ones, then those of the command line.
fn special_tokens(more: &[String]) -> Result<Vec<String>, Problem> {
    let mut tokens: Vec<String> = SPECIAL.map(str::to_owned).to_vec();
    for token in more {
        if token.trim().is_empty() {
            return Err(Problem::config("--special names an empty token"));
        }
        if !tokens.contains(token) {
            tokens.push(token.clone());
        }
    }
    Ok(tokens)
}

/// Counts the words of the corpus and merges until the vocabulary is full.
fn learn(args: &TokenizerArgs, special: &[String]) -> Result<Tokenizer, Problem> {
    let paths = args.corpus.iter().map(|path| path.to_string_lossy().into_owned()).collect();
    let text = TextFiles::open(&Paths::Many(paths), &DataConfig::default()).map_err(data_problem)?;
    tracing::info!("learning {} tokens from {} bytes of text", args.vocab_size, text.bytes());
    let failed = |error: tokenizers::Error| Problem::run(format!("cannot train the tokenizer: {error}"));
    let template = TemplateProcessing::builder()
        .try_single(format!("{} $A", SPECIAL[BOS]))
        .and_then(|builder| builder.try_pair(format!("{0} $A {0} $B", SPECIAL[BOS])))
        .map_err(|error| Problem::run(format!("cannot train the tokenizer: {error}")))?
        .special_tokens(vec![(SPECIAL[BOS], BOS as u32)])
        .build()
        .map_err(|error| Problem::run(format!("cannot train the tokenizer: {error}")))?;
    let byte_level = ByteLevel::new(false, true, true);
    let mut tokenizer = Tokenizer::new(BPE::default());
    tokenizer.with_pre_tokenizer(Some(byte_level));
    tokenizer.with_decoder(Some(byte_level));
    tokenizer.with_post_processor(Some(template));
    let alphabet: HashSet<char> = ByteLevel::alphabet().into_iter().collect();
    let trainer = BpeTrainer::builder()
        .vocab_size(args.vocab_size)
        .min_frequency(MIN_FREQUENCY)
        .show_progress(false)
        .initial_alphabet(alphabet)
        .special_tokens(special.iter().map(|token| AddedToken::from(token.as_str(), true)).collect())
        .build();
    let mut trainer = TrainerWrapper::from(trainer);
    // The iterator of the trainer cannot fail: it ends early, and the reason is kept here.
    let mut unreadable: Option<DataError> = None;
    let texts = text.texts().map_while(|text| text.map_err(|error| unreadable = Some(error)).ok());
    tokenizer.train(&mut trainer, texts).map_err(failed)?;
    match unreadable {
        Some(error) => Err(data_problem(error)),
        None => Ok(tokenizer),
    }
}

/// Writes the two files that Hugging Face libraries read, `tokenizer.json` last.
fn write(tokenizer: &Tokenizer, special: &[String], folder: &Path) -> Result<(), Problem> {
    let cannot = |error: &dyn std::fmt::Display| Problem::run(format!("cannot write the tokenizer: {error}"));
    std::fs::create_dir_all(folder)
        .map_err(|error| Problem::run(format!("cannot create {}", folder.display())).source(error))?;
    let more: Vec<&String> = special.iter().skip(SPECIAL.len()).collect();
    let mut config = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": SPECIAL[0],
        "bos_token": SPECIAL[BOS],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[3],
        "clean_up_tokenization_spaces": false,
    });
    if let (Some(map), false) = (config.as_object_mut(), more.is_empty()) {
        map.insert("additional_special_tokens".to_owned(), json!(more));
    }
    let config = serde_json::to_string_pretty(&config).map_err(|error| cannot(&error))? + "\n";
    let tokens = tokenizer.to_string(true).map_err(|error| cannot(&error))? + "\n";
    for (name, text) in FILES.iter().zip([config, tokens]) {
        write_text_atomic(&folder.join(name), &text).map_err(|error| cannot(&error))?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use crate::error::Kind;

    const WORDS: &str = "the rain in Spain stays mainly in the plain, and the train too. ";

    fn arguments(folder: &Path, output: &str) -> TokenizerArgs {
        std::fs::write(folder.join("a.txt"), WORDS.repeat(50)).unwrap();
        std::fs::write(folder.join("b.jsonl"), "{\"text\": \"snow <end> snow snow\"}\n".repeat(20)).unwrap();
        TokenizerArgs {
            corpus: vec![folder.join("a.txt"), folder.join("b.jsonl")],
            vocab_size: 290,
            output: folder.join(output),
            special: vec!["<end>".to_owned(), "<s>".to_owned()],
            force: false,
        }
    }

    #[test]
    fn a_tokenizer_is_read_back_and_keeps_every_byte() {
        let folder = tempfile::tempdir().unwrap();
        let args = arguments(folder.path(), "made");
        run(&args).unwrap();
        let tokenizer = lowrank_models::hf::Tokenizer::from_folder(&args.output).unwrap();
        assert_eq!(tokenizer.vocab_size(), 290);
        assert_eq!((tokenizer.bos_id(), tokenizer.eos_id().unwrap(), tokenizer.pad_id()), (Some(1), 2, 3));
        assert_eq!((tokenizer.token_to_id("<unk>"), tokenizer.token_to_id("<end>")), (Some(0), Some(4)));
        for text in ["the rain stays", "  Grüße,\n\t𝄞 never seen \u{7f}", "", "snow<end>"] {
            let ids = tokenizer.encode(text, true).unwrap();
            assert_eq!(ids[0], 1);
            assert_eq!(tokenizer.decode(&ids[1..], false).unwrap(), text);
        }
        assert!(tokenizer.encode("the rain in", false).unwrap().len() < 6, "words are merged");

        let again = arguments(folder.path(), "again");
        run(&again).unwrap();
        for name in FILES {
            let bytes = |folder: &Path| std::fs::read(folder.join(name)).unwrap();
            assert_eq!(bytes(&args.output), bytes(&again.output), "{name} is the same every time");
        }
    }

    #[test]
    fn what_cannot_be_done_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let args = arguments(folder.path(), "made");
        let refused = |args: &TokenizerArgs| {
            let error = run(args).unwrap_err();
            let problem = error.downcast_ref::<Problem>().unwrap();
            (format!("{error:#}"), problem.kind)
        };
        let (error, kind) = refused(&TokenizerArgs { vocab_size: 260, ..args.clone() });
        assert_eq!((error.as_str(), kind), ("--vocab-size is 260, must be at least 261", Kind::Config));
        let (error, _) = refused(&TokenizerArgs { special: vec![" ".to_owned()], ..args.clone() });
        assert_eq!(error, "--special names an empty token");
        let missing = vec![folder.path().join("missing.txt")];
        let (error, kind) = refused(&TokenizerArgs { corpus: missing, ..args.clone() });
        assert!(error.contains("missing.txt") && kind == Kind::Config, "{error}");
        std::fs::write(folder.path().join("bad.txt"), b"good\xff").unwrap();
        let (error, _) = refused(&TokenizerArgs { corpus: vec![folder.path().join("bad.txt")], ..args.clone() });
        assert!(error.contains("bad.txt: not valid UTF-8: byte 4 is 0xff"), "{error}");
        assert!(!args.output.exists(), "nothing is written before all is well");

        run(&args).unwrap();
        let (error, kind) = refused(&args);
        assert!(error.contains("tokenizer_config.json is there already") && kind == Kind::Config, "{error}");
        run(&TokenizerArgs { force: true, ..args }).unwrap();
    }
}
