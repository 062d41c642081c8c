//! Loads a Hugging Face folder, perhaps an adapter, and continues a text.
//!
//!     cargo run --release -p lowrank-examples --bin load_and_generate -- MODEL_DIR "Once upon a time" [ADAPTER_DIR]

use std::io::Write;
use std::path::Path;

use burn::tensor::{Device, FloatDType};
use lowrank_models::generate::{Sampling, generate};
use lowrank_models::hf::Tokenizer;
use lowrank_models::{adapters, load};

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [model, text, rest @ ..] = arguments.as_slice() else {
        anyhow::bail!("usage: load_and_generate MODEL_DIR TEXT [ADAPTER_DIR]");
    };
    let folder = Path::new(model);
    let tokenizer = Tokenizer::from_folder(folder)?;
    let mut decoder = load::load(folder, FloatDType::F32, &Device::flex(), &mut |_, _, _| {})?;
    if let Some(adapter) = rest.first() {
        adapters::load_adapter(&mut decoder, Path::new(adapter))?;
    }
    let prompt = tokenizer.encode(text, true)?;
    let out = generate(&decoder, &[prompt], 40, tokenizer.eos_ids(), &Sampling::default(), |_, _| true);
    writeln!(std::io::stdout(), "{text}{}", tokenizer.decode(&out[0], true)?)?;
    Ok(())
}
