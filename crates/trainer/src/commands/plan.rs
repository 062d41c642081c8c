//! `lowrank-train plan`: how much memory a run will need, before it is started.

use std::fmt::Write;
use std::path::Path;

use lowrank_models::classifier::ClassifierConfig;
use lowrank_models::config::DecoderConfig;
use lowrank_models::hf;
use serde_json::json;

use crate::cli::PlanArgs;
use crate::config::{Purpose, RunConfig, Task, load_for};
use crate::device::{self, ChosenDevice};
use crate::error::Problem;
use crate::metrics::process_memory;
use crate::plan::advice::{Suggestion, suggestions};
use crate::plan::{self, Machine, Plan, Subject, predict, show};

/// Runs the command: a table, or JSON.
///
/// # Errors
/// A wrong configuration; a model without a usable `config.json`.
pub fn run(args: &PlanArgs) -> anyhow::Result<()> {
    let Some(path) = &args.config.config else {
        return Err(Problem::config("no configuration was given").hint("lowrank-train plan --config FILE").into());
    };
    let config = load_for(Purpose::Use, path, &args.config.sets)?;
    let model = ModelConfig::read(&config)?;
    let device = device::choose(args.device.as_deref().unwrap_or(&config.device))?;
    let machine = plan::machine_of(&device.description);
    let plan = predict(&config, model.subject(), machine)?;
    let advice = suggestions(&config, model.subject(), machine, &plan)?;
    let available = available_bytes(machine);
    let text = match args.json {
        true => to_json(&plan, &advice, &device, available)?,
        false => table(&plan, &advice, &device, available),
    };
    Ok(super::deliver(&text, args.out.as_deref())?)
}

/// The model of a configuration by its `config.json`. Which parameters a checkpoint of a classifier lacks is not looked at: all but
/// the map to the classes are taken to be there.
enum ModelConfig {
    Decoder(Box<DecoderConfig>),
    Classifier(Box<ClassifierConfig>),
}

impl ModelConfig {
    fn read(config: &RunConfig) -> Result<Self, Problem> {
        let unusable = || Problem::config(format!("base_model = \"{}\" cannot be used", config.base_model));
        let local = Path::new(&config.base_model);
        let folder = match local.is_dir() {
            true => local.to_owned(),
            false => hf::resolve_model(&config.base_model).map_err(|error| unusable().source(error))?,
        };
        let labels = config.classification.as_ref().map(|table| table.labels.len()).filter(|&count| count > 0);
        let read = match config.task {
            Task::CausalLm => DecoderConfig::read(&folder).map(|decoder| Self::Decoder(Box::new(decoder))),
            _ => ClassifierConfig::read(&folder, labels).map(|model| Self::Classifier(Box::new(model))),
        };
        read.map_err(|error| unusable().source(error))
    }

    fn subject(&self) -> Subject<'_> {
        match self {
            Self::Decoder(decoder) => Subject::Decoder(decoder),
            Self::Classifier(config) => Subject::Classifier { config, fresh: &[] },
        }
    }
}

/// Memory that a run could have: that of the machine on the CPU; a graphics card does not tell.
pub(crate) fn available_bytes(machine: Machine) -> Option<u64> {
    match machine {
        Machine::Cpu { .. } => {
            let text = std::fs::read_to_string("/proc/meminfo").ok()?;
            let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
            let kibibytes: u64 = line.trim().trim_end_matches("kB").trim().parse().ok()?;
            Some(kibibytes * 1024)
        }
        Machine::Gpu => None,
    }
}

fn to_json(
    plan: &Plan,
    advice: &[Suggestion],
    device: &ChosenDevice,
    available: Option<u64>,
) -> Result<String, Problem> {
    let value = json!({
        "device": device.description,
        "plan": plan,
        "process_bytes": process_memory().current_bytes,
        "available_bytes": available,
        "fits": available.map(|available| needed(plan) <= available),
        "suggestions": advice,
    });
    let text = serde_json::to_string_pretty(&value)
        .map_err(|error| Problem::run("cannot write the plan as JSON").source(error))?;
    Ok(text + "\n")
}

/// The plan with the program itself, which is as large now as it will be at the start of a run.
fn needed(plan: &Plan) -> u64 {
    plan.peak_bytes + process_memory().current_bytes
}

fn table(plan: &Plan, advice: &[Suggestion], device: &ChosenDevice, available: Option<u64>) -> String {
    let mut text = format!("device {}\n\n", device.description);
    let _ = writeln!(
        text,
        "{} of {} parameters are trained; a micro batch has {} tokens\n",
        plan.trainable_parameters, plan.total_parameters, plan.tokens
    );
    let _ = writeln!(text, "at the peak ({}):", plan.peak_phase.name());
    for share in &plan.categories {
        let percent = 100.0 * share.bytes as f64 / plan.peak_bytes.max(1) as f64;
        let _ = writeln!(text, "  {:<12} {:>11}  {percent:>5.1} %", share.category.name(), show(share.bytes));
    }
    let _ = writeln!(text, "  {:<12} {:>11}", "sum", show(plan.peak_bytes));
    let _ = writeln!(text, "  {:<12} {:>11}  the program itself, without its data", "process", process());
    text.push('\n');
    for plan::Storage { format, values, bytes } in &plan.storage {
        let _ = writeln!(text, "  weights: {values} values in {format}, {}", show(*bytes));
    }
    let _ = writeln!(text, "\nmost in each part of a step:");
    for phase in plan.phases.iter().filter(|phase| phase.bytes > 0) {
        let _ = writeln!(text, "  {:<14} {:>11}", phase.phase.name(), show(phase.bytes));
    }
    let _ = writeln!(text, "\n{}", verdict(plan, available));
    if !advice.is_empty() {
        let _ = writeln!(text, "\nto need less, each by itself:");
    }
    for Suggestion { set, cost, saves_bytes, .. } in advice {
        let keys: Vec<String> = set.iter().map(|key| format!("--set {}", quoted(key))).collect();
        let _ = writeln!(text, "  {:>11} less: {}\n               ({cost})", show(*saves_bytes), keys.join(" "));
    }
    text
}

fn process() -> String {
    show(process_memory().current_bytes)
}

/// An override as a shell takes it.
fn quoted(key: &str) -> String {
    if key.contains([' ', '{', '"']) { format!("'{key}'") } else { key.to_owned() }
}

fn verdict(plan: &Plan, available: Option<u64>) -> String {
    let needed = needed(plan);
    match available {
        Some(available) if needed <= available => {
            format!("fits: {} of {} that are available", show(needed), show(available))
        }
        Some(available) => format!("DOES NOT FIT: {} are needed, {} are available", show(needed), show(available)),
        None => format!("needs {}; this device does not tell how much it has", show(needed)),
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn arguments(folder: &Path, json: bool) -> PlanArgs {
        let model = serde_json::json!({
            "model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 300, "rope_theta": 10000.0,
        });
        std::fs::write(folder.join("config.json"), model.to_string()).unwrap();
        let config = folder.join("run.toml");
        std::fs::write(&config, format!("base_model = {:?}\ndevice = \"cpu\"\n", folder.display().to_string()))
            .unwrap();
        let config = crate::cli::ConfigArgs { config: Some(config), sets: vec!["adapter.lora.r=4".to_owned()] };
        PlanArgs { config, device: None, json, out: Some(folder.join("plan.txt")) }
    }

    /// Nothing but config.json and the configuration is there.
    #[test]
    fn a_plan_needs_no_weights() {
        let folder = tempfile::tempdir().unwrap();
        let args = arguments(folder.path(), false);
        run(&args).unwrap();
        let text = std::fs::read_to_string(folder.path().join("plan.txt")).unwrap();
        for part in ["at the peak (", "activations", "fits: ", "--set training.gradient_checkpointing=block"] {
            assert!(text.contains(part), "{part} is missing in\n{text}");
        }
        run(&arguments(folder.path(), true)).unwrap();
        let text = std::fs::read_to_string(folder.path().join("plan.txt")).unwrap();
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        let shares = value["plan"]["categories"].as_array().unwrap();
        let sum: u64 = shares.iter().map(|share| share["bytes"].as_u64().unwrap()).sum();
        assert_eq!(Some(sum), value["plan"]["peak_bytes"].as_u64());
        assert_eq!(value["fits"], true);
    }

    #[test]
    fn a_model_without_a_configuration_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let args = arguments(folder.path(), false);
        std::fs::remove_file(folder.path().join("config.json")).unwrap();
        let error = format!("{:#}", run(&args).unwrap_err());
        assert!(error.contains("base_model = ") && error.contains("config.json"), "{error}");
    }
}
