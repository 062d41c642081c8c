//! `lowrank-train merge`: an adapter for other programs, added to its base model or as a plain LoRA.

use std::path::{Path, PathBuf};

use lowrank_models::adapters::Attached;
use lowrank_models::export::{self, Limit, Module};
use lowrank_models::hf::peft::{AdapterTensor, CONFIG_FILE, KeyForm, MethodConfig, Part};
use lowrank_models::hf::{AdapterConfig, Checkpoint, Dtype as FileDtype, OutTensor, resolve_model};
use lowrank_models::{adapters, save};

use crate::cli::{Format, MergeArgs};
use crate::config::{Dtype, ProgressStyle, Task};
use crate::error::Problem;
use crate::progress::Phase;
use crate::session::{Adapter, Session, file_dtype};

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
    let (name, file) = match args.format {
        Format::Hf => ("model", "config.json"),
        Format::Peft => ("peft", CONFIG_FILE),
    };
    let out = args.out.clone().unwrap_or_else(|| config.output_dir.join(name));
    refuse_to_overwrite(&out, file, args.overwrite)?;
    let limit = Limit { rank: args.rank.map(|rank| rank as usize), tolerance: args.tolerance };
    if args.format == Format::Hf && (args.same_rank || !limit.is_none()) {
        return Err(Problem::config(
            "--rank, --tolerance and --same-rank are for --format peft: a merged model keeps the whole update",
        )
        .into());
    }
    if config.task != Task::CausalLm {
        if args.format == Format::Peft {
            let what = format!("merge --format peft is for language models, and task is \"{}\"", config.task.name());
            return Err(Problem::config(what).hint("merge --format hf writes the whole classifier").into());
        }
        return Ok(super::classify::merge(&model, &adapter, &out, args.dtype)?);
    }
    // f32 throughout: the sum is rounded once, to the type that is written.
    let mut session = Session::open(&model, "cpu", Dtype::F32, ProgressStyle::Auto)?;
    session.load_adapter(&adapter)?;
    match args.format {
        Format::Hf => merge(session, &model, &out, args.dtype)?,
        Format::Peft => fold(session, &out, limit, args)?,
    }
    Ok(())
}

/// The base model with the adapter in its weights.
fn merge(mut session: Session, model: &str, out: &Path, dtype: Option<Dtype>) -> Result<(), Problem> {
    if session.adapter.as_ref().is_some_and(|adapter| matches!(adapter.config.method, MethodConfig::Eora { .. })) {
        let what = "an eora adapter repairs a quantised base: added to the full weights, it would repair a fault that they do \
                    not have";
        return Err(Problem::config(what)
            .hint("serve it as a LoRA beside the quantised base: merge --format peft, or the adapter folder itself"));
    }
    adapters::merge(&mut session.decoder);
    let dtype = dtype.map_or_else(|| base_dtype(model), file_dtype);
    save::save_model(&session.decoder, &session.folder, out, dtype, SHARD_BYTES)
        .map_err(|error| Problem::run(format!("cannot write {}", out.display())).source(error))?;
    tracing::info!("wrote {} in {}", out.display(), dtype.name());
    Ok(())
}

/// The adapter as a plain LoRA.
fn fold(mut session: Session, out: &Path, limit: Limit, args: &MergeArgs) -> Result<(), Problem> {
    let Some(Adapter { config, attached }) = session.adapter.take() else {
        return Err(Problem::run("there is no adapter to export"));
    };
    let saved = saved_tensors(&session, &config, &attached);
    let phase = Phase::start(ProgressStyle::Auto, "folding the adapter".to_owned());
    let folded = export::fold_adapters(&mut session.decoder, &config, limit, &mut |_, done, total| {
        phase.update(done as u64, total as u64);
    });
    phase.finish();
    let mut modules = folded
        .map_err(|error| Problem::config(format!("cannot fold the {} adapter", config.method.name())).source(error))?;
    report(&modules);
    if matches!(config.method, MethodConfig::Eora { .. }) {
        tracing::warn!("this LoRA repairs the quantised base of its run: serve it beside weights in the same format");
    }
    if args.same_rank {
        export::same_rank(&mut modules);
    }
    let all = module_names(&mut session);
    let (lora, factors) = export::lora_config(&config, &modules, &all);
    if !lora.rank_pattern.is_empty() {
        tracing::warn!(
            "the layers have different ranks (rank_pattern): peft reads them, many servers do not; --same-rank fills them up"
        );
    }
    let (rank, count) = (lora.r, modules.len());
    let dtype = args.dtype.map_or(FileDtype::F32, file_dtype);
    export::write_lora(out, &lora, modules, &factors, saved, dtype)
        .map_err(|error| Problem::run(format!("cannot write {}", out.display())).source(error))?;
    tracing::info!("wrote {}: a LoRA of rank {rank} on {count} modules in {}", out.display(), dtype.name());
    Ok(())
}

/// Modules that were trained whole, under the keys of a PEFT folder.
fn saved_tensors(session: &Session, config: &AdapterConfig, attached: &Attached) -> Vec<OutTensor<'static>> {
    let tensors = adapters::adapter_tensors(&session.decoder, config, attached).into_iter();
    let saved = tensors.filter_map(|tensor| {
        let known = AdapterTensor::from_key(&tensor.name, config.method.key_form())?;
        (known.part == Part::Saved).then(|| OutTensor { name: known.key(KeyForm::Peft), ..tensor })
    });
    saved.collect()
}

/// Every module that a reader of `target_modules` may know.
fn module_names(session: &mut Session) -> Vec<String> {
    let mut all = session.decoder.config.linear_modules();
    all.extend(["lm_head", "model.embed_tokens"].map(str::to_owned));
    all
}

/// What the LoRA leaves out of the update, by module and on the whole.
fn report(modules: &[Module]) {
    for module in modules {
        let (rank, error) = (module.folded.down.dims()[1], module.folded.error);
        tracing::debug!("{}: rank {rank}, relative error of the update {error:.1e}", module.name);
    }
    let worst = modules.iter().max_by(|a, b| a.folded.error.total_cmp(&b.folded.error));
    let Some(worst) = worst else { return };
    let mean = modules.iter().map(|module| module.folded.error).sum::<f64>() / modules.len() as f64;
    match worst.folded.error > 0.0 {
        true => tracing::info!(
            "relative error of the update: max {:.1e} ({}), mean {mean:.1e} over {} modules",
            worst.folded.error,
            worst.name,
            modules.len()
        ),
        false => tracing::info!("the LoRA is the adapter exactly: nothing was left out"),
    }
}

fn refuse_to_overwrite(out: &Path, file: &str, overwrite: bool) -> Result<(), Problem> {
    let holds: PathBuf = out.join(file);
    let what = if file == CONFIG_FILE { "an adapter" } else { "a model" };
    match holds.exists() && !overwrite {
        true => Err(Problem::config(format!("{} already holds {what}", out.display()))
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
