//! `lowrank-train eval`: loss and exact match on held-out data.

use std::sync::Arc;

use lowrank_models::Network;
use serde_json::json;

use crate::cli::EvalArgs;
use crate::config::{ProgressStyle, Task};
use crate::data::{self, Evaluation, LoaderConfig, Paths};
use crate::error::Problem;
use crate::evaluate;
use crate::progress::Phase;
use crate::task::data_problem;

/// Runs the command and prints its result as JSON.
///
/// # Errors
/// A model, adapter or data file that cannot be used.
pub fn run(args: &EvalArgs) -> anyhow::Result<()> {
    let mut config = super::configuration(&args.config)?;
    let paths = match (&args.data, &config.data.eval) {
        (Some(path), _) => Paths::One(path.to_string_lossy().into_owned()),
        (None, Some(paths)) => paths.clone(),
        (None, None) => {
            let problem = Problem::config("there is nothing to evaluate on: the configuration has no data.eval");
            return Err(problem.hint("give a file with --data FILE").into());
        }
    };
    if let Some(count) = args.max_samples {
        config.evaluation.num_samples = Some(count as usize);
    }
    if config.task != Task::CausalLm {
        return super::classify::evaluate(&config, args, &paths);
    }
    let session = super::open(&config, &args.model, args.device.device.as_deref(), args.device.dtype)?;
    let cache = data::default_cache_folder();
    let dataset =
        data::load("eval", &paths, &config.data, &session.encoder(), cache.as_deref()).map_err(data_problem)?;
    let evaluation = Evaluation::new(
        Arc::new(dataset),
        LoaderConfig {
            micro_batch_size: config.training.micro_batch_size,
            max_seq_length: config.data.max_seq_length,
            packing: config.data.packing,
            shuffle: false,
            seed: config.seed,
            pad_id: session.tokenizer.pad_id(),
            pad_to_multiple_of: config.data.pad_to_multiple_of,
        },
    )
    .map_err(data_problem)?;
    let phase = Phase::start(ProgressStyle::Auto, "loss");
    let chunk = config.training.head_chunk_tokens.unwrap_or_else(|| session.decoder.default_head_chunk());
    let (loss, tokens) = evaluate::loss(&session.decoder, &evaluation, chunk, |done, total| phase.update(done, total));
    phase.finish();
    let mut result = json!({ "loss": loss, "perplexity": loss.exp(), "tokens": tokens });
    let questions = match config.evaluation.generate && !args.no_generate {
        true => evaluate::questions(&session, paths.entries(), &config.data)?,
        false => vec![],
    };
    if !questions.is_empty() {
        let phase = Phase::start(ProgressStyle::Auto, "answers");
        let answers =
            evaluate::exact_match(&session, &questions, &config.evaluation, |done, total| phase.update(done, total))?;
        phase.finish();
        result["exact_match"] = answers.exact_match().into();
        result["exact_match_samples"] = answers.total.into();
        if let Some((expected, given)) = answers.first_wrong {
            result["first_wrong"] = json!({ "expected": expected, "given": given });
        }
    }
    let text = serde_json::to_string_pretty(&result)? + "\n";
    Ok(super::deliver(&text, args.out.as_deref())?)
}
