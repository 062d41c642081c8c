//! `lowrank-train merge`: adapter and base model to one Hugging Face folder.

use std::path::Path;

use lowrank_models::hf::{Checkpoint, Dtype as FileDtype, resolve_model};
use lowrank_models::{adapters, save};

use crate::cli::MergeArgs;
use crate::config::{Dtype, ProgressStyle};
use crate::error::Problem;
use crate::session::{Session, file_dtype};

/// Shards of the written model hold at most this.
const SHARD_BYTES: u64 = 5 << 30;

/// Runs the command.
///
/// # Errors
/// A model or adapter that cannot be used; an output folder that is in use or cannot be written.
pub fn run(args: &MergeArgs) -> anyhow::Result<()> {
    let config = super::configuration(&args.config)?;
    let model = args.model.clone().unwrap_or_else(|| config.base_model.clone());
    let adapter = args.adapter.clone().unwrap_or_else(|| config.output_dir.join("adapter"));
    let out = args.out.clone().unwrap_or_else(|| config.output_dir.join("model"));
    refuse_to_overwrite(&out, args.overwrite)?;
    // f32 throughout: the sum is rounded once, to the type that is written.
    let mut session = Session::open(&model, "cpu", Dtype::F32, ProgressStyle::Auto)?;
    session.load_adapter(&adapter)?;
    adapters::merge(&mut session.decoder);
    let dtype = args.dtype.map_or_else(|| base_dtype(&model), file_dtype);
    save::save_model(&session.decoder, &session.folder, &out, dtype, SHARD_BYTES)
        .map_err(|error| Problem::run(format!("cannot write {}", out.display())).source(error))?;
    tracing::info!("wrote {} in {}", out.display(), dtype.name());
    Ok(())
}

fn refuse_to_overwrite(out: &Path, overwrite: bool) -> Result<(), Problem> {
    match out.join("config.json").exists() && !overwrite {
        true => Err(Problem::config(format!("{} already holds a model", out.display()))
            .hint("choose another --out, or pass --overwrite")),
        false => Ok(()),
    }
}

/// The type most of the base model is stored in.
fn base_dtype(model: &str) -> FileDtype {
    let first = || {
        let folder = resolve_model(model).ok()?;
        let checkpoint = Checkpoint::open(&folder).ok()?;
        checkpoint.get("model.embed_tokens.weight").ok().map(|view| view.dtype)
    };
    first().unwrap_or(FileDtype::F32)
}
