//! The command on run folders of a tiny model, and what it refuses.
#![allow(clippy::unwrap_used)]

use super::*;
use lowrank_models::hf::peft::Modules;
use lowrank_models::{parameters, save};

fn base() -> String {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens/models/tiny-llama");
    folder.canonicalize().unwrap().display().to_string()
}

fn load_base() -> (hf::AdapterConfig, Decoder) {
    let decoder = Source::Model { name: base(), from: None }.load().unwrap();
    (hf::AdapterConfig::new(4, 8.0, Modules::AllLinear), decoder)
}

/// Adds `factor` to every value whose name ends so.
fn shifted(decoder: &mut Decoder, end: &str, factor: f64) {
    decoder.map_parameters(&mut |name, value| if name.ends_with(end) { value + factor } else { value });
}

fn write_config(folder: &Path) {
    std::fs::create_dir_all(folder).unwrap();
    let text = format!("base_model = {:?}\noutput_dir = \"unused\"\n", base());
    std::fs::write(folder.join("config.toml"), text).unwrap();
}

/// A run that trained a LoRA: B starts at zero and is moved by a constant.
fn lora_run(folder: &Path, moved: f64) {
    write_config(folder);
    let (config, mut decoder) = load_base();
    let style = ProgressStyle::None;
    let fresh = crate::attach::fresh(&mut decoder, config, &Default::default(), Path::new(&base()), 1, style).unwrap();
    shifted(&mut decoder, ".delta.up", moved);
    adapters::save_adapter(&decoder, &fresh.config, &fresh.attached, &base(), &folder.join("adapter")).unwrap();
}

/// A run that trained the whole model.
fn full_run(folder: &Path, moved: f64) {
    write_config(folder);
    let (_, decoder) = load_base();
    let mut decoder = parameters::set_trained(decoder, |_| Some(true));
    shifted(&mut decoder, "o_proj.weight", moved);
    save::save_model(&decoder, Path::new(&base()), &folder.join("model"), hf::Dtype::F32, 1 << 30).unwrap();
}

fn analysed(run: &Path, against: Option<&Path>) -> String {
    let args = AnalyzeArgs {
        run: run.to_owned(),
        against: against.map(|folder| folder.display().to_string()),
        data: Some(Path::new(env!("CARGO_MANIFEST_DIR")).join("../../data/smoke/eval.jsonl")),
        tokens: 256,
        directions: 4,
        json: false,
        markdown: true,
    };
    super::run(&args).unwrap();
    std::fs::read_to_string(run.join("analysis.md")).unwrap()
}

/// A constant B makes an update of rank one, in every layer.
#[test]
fn an_adapter_run_is_compared_with_its_base() {
    let folder = tempfile::tempdir().unwrap();
    lora_run(folder.path(), 0.01);
    let text = analysed(folder.path(), None);
    let row = text.lines().find(|line| line.starts_with("| model.layers.0.self_attn.q_proj |")).unwrap();
    let cells: Vec<&str> = row.split('|').map(str::trim).collect();
    for (index, what) in [(3, "rank"), (4, "effective rank"), (5, "stable rank")] {
        assert!((cells[index].parse::<f64>().unwrap() - 1.0).abs() < 0.01, "{what}: {row}");
    }
    for part in ["## Updates", "## Weights", "## Activations behind each block", "mean relative size of the update"] {
        assert!(text.contains(part), "{part} is missing in\n{text}");
    }
    // The head has no adapter: it stays as it is.
    let head = text.lines().find(|line| line.starts_with("| lm_head |") && line.contains("->"));
    assert!(head.is_none_or(|line| line.trim_end().ends_with("1.000 |")), "{head:?}");
}

#[test]
fn a_full_run_and_another_run_are_compared_too() {
    let folder = tempfile::tempdir().unwrap();
    let (lora, full) = (folder.path().join("lora"), folder.path().join("full"));
    lora_run(&lora, 0.01);
    full_run(&full, 0.02);
    let unchanged = |text: &str, module: &str| {
        let line = format!("| model.layers.0.{module} |");
        let row = text.lines().filter(|row| row.starts_with(&line)).nth(1).unwrap().to_owned();
        row.trim_end().ends_with("1.000 |")
    };
    let text = analysed(&full, None);
    assert!(unchanged(&text, "mlp.up_proj") && !unchanged(&text, "self_attn.o_proj"), "{text}");
    let text = analysed(&full, Some(&lora));
    assert!(!unchanged(&text, "mlp.up_proj"), "{text}");
}

#[test]
fn what_is_no_run_or_does_not_match_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let refused = |run: &Path, against: Option<String>| {
        let args = AnalyzeArgs { run: run.to_owned(), against, tokens: 64, directions: 2, ..AnalyzeArgs::default() };
        format!("{:#}", super::run(&args).unwrap_err())
    };
    assert!(refused(folder.path(), None).contains("is not a run folder (it has no config.toml)"));
    write_config(folder.path());
    assert!(refused(folder.path(), None).contains("holds neither an adapter nor a model"));
    assert!(refused(Path::new(&base()), None).contains("does not say what it was trained from"));
    let other = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens/models/tiny-qwen2");
    let error = refused(Path::new(&base()), Some(other.display().to_string()));
    assert!(error.contains("the two models do not match"), "{error}");
}
