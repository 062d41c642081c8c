//! Whole runs of the program on a graphics device: software Vulkan is enough. Without a driver the test says so and stops.
//!
//! One test, because every process compiles its pipelines anew, which takes seconds each on a software device.
#![cfg(all(unix, feature = "flex", feature = "wgpu"))]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stderr)]

use std::path::{Path, PathBuf};
use std::process::Command;

use burn::tensor::{FloatDType, Tensor};
use lowrank_models::save::host_values;
use lowrank_train::shortage;
use serde_json::Value;
use tempfile::TempDir;

fn has_driver() -> bool {
    let named = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].iter().any(|name| std::env::var_os(name).is_some());
    let folders = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d", "/usr/local/share/vulkan/icd.d"];
    named || folders.iter().any(|folder| std::fs::read_dir(folder).is_ok_and(|mut files| files.next().is_some()))
}

/// Runs of a tiny Llama.
struct Scene(TempDir);

/// What a process left.
struct Ended {
    code: i32,
    said: String,
}

impl Scene {
    fn new() -> Self {
        let folder = TempDir::new().unwrap();
        let records: String =
            (0..600).map(|i| format!("{{\"text\": \"{}\"}}\n", "the quick brown fox ".repeat(1 + i % 3))).collect();
        std::fs::write(folder.path().join("train.jsonl"), records).unwrap();
        let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens/models/tiny-llama");
        let config = format!(
            "base_model = {:?}\nseed = 7\n[adapter.lora]\nr = 4\n[optimizer.adamw]\nlearning_rate = 5e-3\n\
             [data]\ntrain = {:?}\nmax_seq_length = 32\npacking = true\n\
             [training]\nlr_scheduler = \"constant\"\nsave_steps = 1000\n\
             [logging]\nlogging_steps = 10\ntensorboard = false\n",
            model.canonicalize().unwrap().display().to_string(),
            folder.path().join("train.jsonl").display().to_string(),
        );
        std::fs::write(folder.path().join("config.toml"), config).unwrap();
        Self(folder)
    }

    fn dir(&self, run: &str) -> PathBuf {
        self.0.path().join(run)
    }

    fn run(&self, run: &str, sets: &[&str]) -> Ended {
        self.run_with(run, sets, &[])
    }

    fn run_with(&self, run: &str, sets: &[&str], variables: &[(&str, &str)]) -> Ended {
        let out = Command::new(env!("CARGO_BIN_EXE_lowrank-train"))
            .arg("--config")
            .arg(self.0.path().join("config.toml"))
            .arg("--out")
            .arg(self.dir(run))
            .args(sets.iter().flat_map(|set| ["--set", *set]))
            .env("LOWRANK_CACHE", self.0.path().join("cache"))
            .env("CUBECL_AUTOTUNE_LEVEL", "minimal")
            .env_remove("RUST_LOG")
            .envs(variables.iter().copied())
            .output()
            .unwrap();
        Ended { code: out.status.code().unwrap_or(-1), said: String::from_utf8_lossy(&out.stderr).into_owned() }
    }

    /// Lines of a kind.
    fn lines(&self, run: &str, kind: &str) -> Vec<Value> {
        let text = std::fs::read_to_string(self.dir(run).join("metrics.jsonl")).unwrap();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["kind"] == kind).collect()
    }
}

#[test]
fn runs_on_a_graphics_device() {
    if !has_driver() {
        eprintln!("no Vulkan driver: nothing was tested");
        return;
    }
    let scene = Scene::new();
    a_run_is_that_of_the_cpu_and_its_memory_does_not_grow(&scene);
    attention_by_tiles_passes_its_trial(&scene);
    bf16_is_refused_where_the_device_has_none(&scene);
    a_buffer_that_is_too_large_is_an_error(&scene);
}

/// The device's own count of live bytes does not rise after some 130 steps, in which caches of launch data fill. What is on its way
/// to the device when they are counted makes 5 KB more or less, so over 30 steps what would show is a step that leaves 170 bytes
/// behind: any tensor of this model but a vector of 40 values.
fn a_run_is_that_of_the_cpu_and_its_memory_does_not_grow(scene: &Scene) {
    let sets = ["training.max_steps=240"];
    for (run, device) in [("cpu", "device=cpu"), ("card", "device=wgpu")] {
        let ended = scene.run(run, &[&sets[..], &[device]].concat());
        assert_eq!(ended.code, 0, "{}", ended.said);
    }
    let (cpu, card) = (scene.lines("cpu", "train"), scene.lines("card", "train"));
    assert_eq!(cpu.len(), card.len());
    for (cpu, card) in cpu.iter().zip(&card) {
        // Rounding differs, and training amplifies it.
        for key in ["loss", "grad_norm"] {
            let (a, b) = (cpu[key].as_f64().unwrap(), card[key].as_f64().unwrap());
            assert!((a / b - 1.0).abs() < 0.02, "{key}: {cpu} {card}");
        }
        assert!(card["host_ms"].as_f64().unwrap() <= card["step_ms"].as_f64().unwrap(), "{card}");
        assert!(card["launches"].as_f64().unwrap() > 50.0 && cpu.get("launches").is_none(), "{card}");
    }
    let bytes: Vec<u64> = card.iter().map(|line| line["tensor_bytes"].as_u64().unwrap()).collect();
    assert_eq!((&card[18]["step"], &card[24]["step"]), (&180.into(), &240.into()));
    assert!(bytes[22..].iter().min() <= bytes[18..20].iter().max(), "{bytes:?}");
    let summary = &scene.lines("card", "summary")[0];
    let measured = summary["measured_memory_bytes"].as_object().unwrap();
    let sum: u64 = measured.values().map(|bytes| bytes.as_u64().unwrap()).sum();
    assert_eq!(sum, summary["peak_memory_bytes"].as_u64().unwrap(), "{summary}");
    assert_eq!(measured["weights"], summary["predicted_memory_bytes"]["weights"], "{summary}");
}

/// Before tiles are chosen on a device they are compared with the CPU there; the run is then that of the CPU.
fn attention_by_tiles_passes_its_trial(scene: &Scene) {
    let sets = ["device=wgpu", "training.max_steps=2", "logging.logging_steps=1"];
    let ended = scene.run_with("tiles", &sets, &[("LOWRANK_ATTENTION", "registers")]);
    assert_eq!(ended.code, 0, "{}", ended.said);
    let said = "attention with heads of 16 numbers of F32: Registers in tiles, within ";
    assert!(ended.said.contains(said), "{}", ended.said);
    // a software device has no tensor cores, and a run that does without them says so
    let without = scene.run("chunks", &sets);
    let said = "attention with heads of 16 numbers of F32: by chunks, no Fragments on this device";
    assert!(without.said.contains(said), "{}", without.said);
    let losses = |run| scene.lines(run, "train").iter().map(|line| line["loss"].as_f64().unwrap()).collect::<Vec<_>>();
    let ended = scene.run("host", &[&["device=cpu"], &sets[1..]].concat());
    assert_eq!(ended.code, 0, "{}", ended.said);
    for (card, cpu) in losses("tiles").iter().zip(losses("host")) {
        assert!((card / cpu - 1.0).abs() < 1e-5, "{card} {cpu}");
    }
}

/// A driver that does not compute in bf16 gives garbage and no error, so the device is asked first.
fn bf16_is_refused_where_the_device_has_none(scene: &Scene) {
    let device = lowrank_train::device::choose("wgpu").unwrap().device;
    if !device.supports_dtype(FloatDType::BF16) {
        let ended = scene.run("bf16", &["device=wgpu", "dtype=bf16", "training.max_steps=2"]);
        assert_eq!(ended.code, 2, "{}", ended.said);
        assert!(ended.said.contains("does not compute in bf16") && ended.said.contains("hint: "), "{}", ended.said);
    }
}

/// Eight gibibytes are more than a buffer of WebGPU may have, and few enough for addresses of 32 bits: the allocation fails without a
/// word, and the read of what was computed from it tells.
fn a_buffer_that_is_too_large_is_an_error(_scene: &Scene) {
    let device = lowrank_train::device::choose("wgpu").unwrap().device;
    let caught = shortage::catch(|| {
        let huge = Tensor::<2>::zeros([1 << 15, 1 << 16], &device);
        host_values(huge.slice([0..1, 0..8]) * 2.0)
    });
    assert_eq!(caught, Err(shortage::Shortage { bytes: Some(1 << 33) }));
    // The device can be used on.
    assert_eq!(shortage::catch(|| host_values(Tensor::<2>::ones([1, 8], &device) * 2.0)), Ok(vec![2.0; 8]));
}
