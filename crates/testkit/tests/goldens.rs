//! The committed cases: all of them on the CPU, a few on software Vulkan.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use std::path::{Path, PathBuf};

use lowrank_testkit::goldens::{self, Options, Outcome, Report};

/// Cases that must pass; all others belong to methods that may not be there yet.
const MUST_PASS: &[&str] = &[
    "forward_tiny-bert",
    "forward_tiny-gemma2",
    "forward_tiny-llama",
    "forward_tiny-llama-tied",
    "forward_tiny-llama3",
    "forward_tiny-mistral",
    "forward_tiny-qwen2",
    "forward_tiny-qwen3",
    "forward_tiny-vit",
    "full_adamw",
    "full_qwen3",
    "full_tied_wd_clip",
    "image_vit_lora",
    "lora_all_qwen2",
    "lora_all_rslora_r8",
    "lora_attn_qwen3",
    "lora_embeddings",
    "lora_llama3_long",
    "lora_mistral_window",
    "lora_one_layer_lm_head",
    "lora_padded_accum3_tokens",
    "lora_patterns",
    "lora_qv_r4",
    "lora_wd_accum2_clip1",
    "qlora_nf4_double_r8",
    "qlora_nf4_r8",
    "quant_nf4",
    "seqcls_bert_full",
    "seqcls_bert_lora",
];

fn run_all(folder: &Path, options: &Options) -> Vec<Report> {
    let names = goldens::names(folder).unwrap();
    names.iter().map(|name| goldens::run(folder, name, options)).collect()
}

/// Settings that the committed cases leave out; every one of them must pass.
fn more_folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("more_goldens")
}

/// No case failed, and those that must pass did.
fn assert_good(reports: &[Report], must_pass: &[&str]) {
    let lines: Vec<String> = reports.iter().map(Report::line).collect();
    let failed: Vec<&String> = lines.iter().filter(|line| line.starts_with("failed")).collect();
    assert!(failed.is_empty(), "{failed:#?}");
    for name in must_pass {
        let line = format!("passed {name}");
        assert!(lines.contains(&line), "no line \"{line}\" in {lines:#?}");
    }
}

/// The real checkpoint where `scripts/fetch_smollm2.py` puts it.
fn real_checkpoint() -> Option<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/smollm2-135m-instruct");
    folder.join("config.json").is_file().then_some(folder)
}

#[test]
fn committed_cases_pass_on_the_cpu() {
    let mut options = Options::on("cpu").unwrap();
    options.smollm2 = options.smollm2.or_else(real_checkpoint);
    let reports = run_all(&goldens::committed_folder(), &options);
    assert_good(&reports, MUST_PASS);
    for report in reports.iter().filter(|report| report.name.starts_with("smollm2_")) {
        match options.smollm2 {
            Some(_) => assert_eq!(report.outcome, Outcome::Passed, "{}", report.line()),
            None => {
                assert!(report.line().ends_with("needs the real checkpoint (LOWRANK_SMOLLM2)"), "{}", report.line())
            }
        }
    }
}

#[test]
fn saving_memory_changes_nothing() {
    let mut options = Options::on("cpu").unwrap().with_small_memory();
    options.smollm2 = None;
    assert_good(&run_all(&goldens::committed_folder(), &options), MUST_PASS);
    assert_good(&run_all(&more_folder(), &options), &[]);
}

#[test]
fn every_further_case_passes() {
    let reports = run_all(&more_folder(), &Options::on("cpu").unwrap());
    assert!(reports.len() >= 23, "{reports:#?}");
    for report in reports {
        assert_eq!(report.outcome, Outcome::Passed, "{}", report.line());
    }
}

#[test]
fn a_few_cases_pass_on_vulkan() {
    let has_driver = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"]
        .iter()
        .any(|folder| std::fs::read_dir(folder).is_ok_and(|mut entries| entries.next().is_some()));
    if !has_driver {
        eprintln!("skipped: no Vulkan driver is installed (Debian: mesa-vulkan-drivers)");
        return;
    }
    // Software Vulkan is slow to tune and wants a runtime folder; a process of its own gets both settings.
    let runtime = tempfile::tempdir().unwrap();
    let output = std::process::Command::new(env!("CARGO_BIN_EXE_goldens"))
        .arg(goldens::committed_folder())
        .args(["--device", "wgpu", "--only", "forward_tiny-llama", "--only", "lora_qv_r4"])
        .env("CUBECL_AUTOTUNE_LEVEL", "minimal")
        .env("XDG_RUNTIME_DIR", runtime.path())
        .output()
        .unwrap();
    let (out, problem) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert_eq!(out, "passed forward_tiny-llama\npassed lora_qv_r4\n", "{problem}");
}

#[test]
fn a_wrong_reference_is_noticed() {
    let folder = tempfile::tempdir().unwrap();
    let case = folder.path().join("lora_wrong");
    let source = goldens::committed_folder().join("lora_qv_r4");
    std::fs::create_dir_all(case.join("adapter_init")).unwrap();
    for file in ["batches.safetensors", "adapter_init/adapter_config.json", "adapter_init/adapter_model.safetensors"] {
        std::fs::copy(source.join(file), case.join(file)).unwrap();
    }
    let mut json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(source.join("case.json")).unwrap()).unwrap();
    json["expected"].as_object_mut().unwrap().remove("tensors");
    json["expected"]["losses"][4] = 1.0.into();
    std::fs::write(case.join("case.json"), json.to_string()).unwrap();
    let report = goldens::run(folder.path(), "lora_wrong", &Options::on("cpu").unwrap());
    assert!(report.line().starts_with("failed lora_wrong: losses is off by"), "{}", report.line());

    json["method"]["init_lora_weights"] = "loftq".into();
    std::fs::write(case.join("case.json"), json.to_string()).unwrap();
    let report = goldens::run(folder.path(), "lora_wrong", &Options::on("cpu").unwrap());
    assert_eq!(report.line(), "unsupported lora_wrong: loftq is not implemented yet");
}
