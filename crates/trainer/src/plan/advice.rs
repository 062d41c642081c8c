//! What to change so that a run needs less memory, with what each change would save by itself.

use lowrank_models::config::DecoderConfig;
use lowrank_models::network::head_chunk;
use serde::Serialize;

use super::{Machine, Plan, Subject, predict};
use crate::config::{
    GaloreConfig, GradientCheckpointing, Init, Inner, Nf4Config, OnNonFinite, OptimizerConfig, Purpose,
    QuantizationConfig, RunConfig, Task, problems,
};
use crate::error::Problem;

/// A change of the configuration.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Suggestion {
    /// The keys and their new values, as `--set` takes them.
    pub set: Vec<String>,
    /// What it costs.
    pub cost: &'static str,
    /// Bytes that it saves at the peak.
    pub saves_bytes: u64,
    /// The peak with it.
    pub peak_bytes: u64,
}

/// A changed configuration with its keys and its price.
type Change = (Vec<String>, &'static str, RunConfig);

/// Every change that saves at least a hundredth of the peak, the one that saves most first.
///
/// # Errors
/// As [`predict`].
pub fn suggestions<'a>(
    config: &RunConfig,
    subject: impl Into<Subject<'a>>,
    machine: Machine,
    plan: &Plan,
) -> Result<Vec<Suggestion>, Problem> {
    let (mut found, subject) = (vec![], subject.into());
    for (set, cost, changed) in changes(config, subject) {
        let peak_bytes = predict(&changed, subject, machine)?.peak_bytes;
        let saves_bytes = plan.peak_bytes.saturating_sub(peak_bytes);
        if saves_bytes > plan.peak_bytes / 100 {
            found.push(Suggestion { set, cost, saves_bytes, peak_bytes });
        }
    }
    found.sort_by_key(|suggestion| suggestion.peak_bytes);
    Ok(found)
}

fn changes(config: &RunConfig, subject: Subject<'_>) -> Vec<Change> {
    let makers = [
        rebuilt_blocks,
        smaller_batch,
        shorter_rows,
        immediate_updates,
        eight_bit_moments,
        low_rank_gradients,
        packed_base,
    ];
    let mut changes: Vec<Change> = makers.iter().filter_map(|make| make(config)).collect();
    if let Subject::Decoder(decoder) = subject {
        changes.extend(smaller_chunks(config, decoder));
    }
    changes
}

fn rebuilt_blocks(config: &RunConfig) -> Option<Change> {
    let mut changed = config.clone();
    changed.training.gradient_checkpointing = GradientCheckpointing::Block;
    let set = vec!["training.gradient_checkpointing=block".to_owned()];
    (changed != *config).then_some((set, "about a third more time", changed))
}

fn smaller_batch(config: &RunConfig) -> Option<Change> {
    let (rows, steps) = (config.training.micro_batch_size, config.training.gradient_accumulation_steps);
    if rows < 2 || !rows.is_multiple_of(2) {
        return None;
    }
    let mut changed = config.clone();
    (changed.training.micro_batch_size, changed.training.gradient_accumulation_steps) = (rows / 2, steps * 2);
    let set = vec![
        format!("training.micro_batch_size={}", rows / 2),
        format!("training.gradient_accumulation_steps={}", steps * 2),
    ];
    Some((set, "the same updates, a little more time", changed))
}

fn shorter_rows(config: &RunConfig) -> Option<Change> {
    let tokens = config.data.max_seq_length;
    if tokens < 128 || config.task == Task::ImageClassification {
        return None;
    }
    let mut changed = config.clone();
    changed.data.max_seq_length = tokens / 2;
    let set = vec![format!("data.max_seq_length={}", tokens / 2)];
    Some((set, "longer records are cut, and a step sees half the tokens", changed))
}

fn smaller_chunks(config: &RunConfig, decoder: &DecoderConfig) -> Option<Change> {
    let now = config.training.head_chunk_tokens.unwrap_or_else(|| head_chunk(decoder.vocab_size));
    let tokens = config.training.micro_batch_size * config.data.max_seq_length;
    let smaller = now.min(tokens) / 4;
    if smaller < 32 {
        return None;
    }
    let mut changed = config.clone();
    changed.training.head_chunk_tokens = Some(smaller);
    Some((vec![format!("training.head_chunk_tokens={smaller}")], "a little more time in the head", changed))
}

fn immediate_updates(config: &RunConfig) -> Option<Change> {
    let mut changed = config.clone();
    let training = &mut changed.training;
    (training.max_grad_norm, training.on_non_finite) = (0.0, OnNonFinite::Stop);
    let is_possible = training.gradient_accumulation_steps == 1;
    let set = vec!["training.max_grad_norm=0".to_owned(), "training.on_non_finite=stop".to_owned()];
    let cost = "no clipping; a layer is updated as soon as its gradient is there";
    (is_possible && changed != *config).then_some((set, cost, changed))
}

fn eight_bit_moments(config: &RunConfig) -> Option<Change> {
    let mut changed = config.clone();
    let OptimizerConfig::Galore(table) = &mut changed.optimizer else { return None };
    if table.inner != Inner::Adamw {
        return None;
    }
    table.inner = Inner::Adamw8bit;
    let set = vec!["optimizer.galore.inner=adamw8bit".to_owned()];
    Some((set, "moments in 8 bits; their step runs on the host", changed))
}

fn low_rank_gradients(config: &RunConfig) -> Option<Change> {
    if config.adapter.is_some() || config.init_adapter.is_some() || config.optimizer.low_rank().is_some() {
        return None;
    }
    let optimizer = OptimizerConfig::Galore(GaloreConfig::default());
    let set = vec!["optimizer={ galore = {} }".to_owned()];
    Some((
        set,
        "low-rank gradients and moments; wants a learning rate of its own",
        RunConfig { optimizer, ..config.clone() },
    ))
}

fn packed_base(config: &RunConfig) -> Option<Change> {
    if config.adapter.is_none() || config.quantization.is_some() || config.init == Init::Random {
        return None;
    }
    let quantization = Some(QuantizationConfig::Nf4(Nf4Config::default()));
    let changed = RunConfig { quantization, ..config.clone() };
    let is_allowed = problems(&changed, Purpose::Train).len() <= problems(config, Purpose::Train).len();
    let set = vec!["quantization={ nf4 = {} }".to_owned()];
    is_allowed.then_some((set, "the base is rounded to 4 bits, and unpacked in every product", changed))
}
