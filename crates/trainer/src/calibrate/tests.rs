//! A calibration pass against the references' numbers, against plain gradients, and on disk.
#![allow(clippy::unwrap_used, clippy::panic)]

use std::path::PathBuf;

use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use lowrank_core::adapters::Site;
use lowrank_core::adapters::corda::{Corda, CordaMethod};
use lowrank_core::adapters::eora::Eora;
use lowrank_core::adapters::lora_sb::LoraSb;
use lowrank_core::linalg;
use lowrank_core::quant::Quantisation;
use lowrank_core::random::Stream;
use lowrank_core::{Delta, Projection};
use lowrank_models::hf::Tokenizer;
use lowrank_models::{Decoder, load, parameters};

use super::*;
use crate::config::GradientCheckpointing;
use crate::data::{DataConfig, Encoder, Paths, prepare};

const OPTIONS: StepOptions =
    StepOptions { checkpointing: GradientCheckpointing::None, head_chunk_tokens: 4096, seed: 0 };

fn goldens() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens")
}

fn device() -> Device {
    crate::device::choose("cpu").unwrap().device
}

fn model(name: &str) -> Decoder {
    load::load(&goldens().join("models").join(name), FloatDType::F32, &device(), &mut |_, _, _| {}).unwrap()
}

/// A tensor of a case in f32, by rows.
fn read(file: &str, name: &str) -> Tensor<2> {
    let bytes = std::fs::read(goldens().join(file)).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap();
    let values: Vec<f32> = match view.dtype() {
        safetensors::Dtype::F32 => view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
        safetensors::Dtype::I64 => {
            view.data().as_chunks::<8>().0.iter().map(|b| i64::from_le_bytes(*b) as f32).collect()
        }
        other => panic!("{other:?}"),
    };
    Tensor::from_data(TensorData::new(values, [view.shape()[0], view.shape()[1]]), &device())
}

fn rows(case: &str) -> Vec<Vec<i32>> {
    let ids = read(&format!("{case}/init_batches.safetensors"), "input_ids");
    let cols = ids.dims()[1];
    linalg::host(ids).chunks(cols).map(|row| row.iter().map(|&id| id as i32).collect()).collect()
}

fn batches(rows: &[Vec<i32>], size: usize) -> Vec<Batch> {
    rows.chunks(size).map(|rows| Batch::from_rows(rows, rows, None)).collect()
}

fn norm(a: &Tensor<2>) -> f64 {
    linalg::host(a.clone()).iter().map(|&v| f64::from(v).powi(2)).sum::<f64>().sqrt()
}

#[track_caller]
fn assert_near(what: &str, got: &Tensor<2>, want: &Tensor<2>, limit: f64) {
    let error = norm(&(got.clone() - want.clone())) / norm(want);
    assert!(error <= limit, "{what}: relative error {error:.2e}, allowed {limit:.0e}");
}

fn weights(model: &mut Decoder) -> BTreeMap<String, Tensor<2>> {
    let mut found = BTreeMap::new();
    model.for_each_projection(&mut |module, projection| {
        found.insert(module.to_owned(), projection.weight.values());
    });
    found
}

fn wanted(modules: impl IntoIterator<Item = String>, wanted: Wanted) -> BTreeMap<String, Wanted> {
    modules.into_iter().filter(|module| module != "lm_head").map(|module| (module, wanted)).collect()
}

fn plan<'a>(wanted: &'a BTreeMap<String, Wanted>, batches: &'a [Batch]) -> Plan<'a, Batch> {
    Plan { wanted, batches, sequences: &decoder_sequences, options: OPTIONS, repair: None, style: ProgressStyle::None }
}

fn site<'a>(module: &'a str, weight: &Tensor<2>, found: &'a Statistics) -> Site<'a> {
    let (weight, stream) = (weight.clone(), Stream::new(0, module));
    Site { module, weight, residual: None, seed: 0, stream, statistics: Some(found) }
}

#[test]
fn corda_starts_as_in_peft() {
    let cases = [
        ("corda_ipm_r8", "tiny-llama", CordaMethod::Ipm, 8, 2e-4),
        ("corda_kpm_r4", "tiny-qwen2", CordaMethod::Kpm, 4, 2e-3),
    ];
    for (case, name, method, r, limit) in cases {
        let (mut model, rows) = (model(name), rows(case));
        let weights = weights(&mut model);
        let mean = Wanted { covariance: Some(Covariance::MeanOfSequences), gradient: false };
        let wanted = wanted(weights.keys().cloned(), mean);
        let one_by_one = measure(&mut model, &plan(&wanted, &batches(&rows, 1))).unwrap();
        let in_fours = measure(&mut model, &plan(&wanted, &batches(&rows, 4))).unwrap();
        let mut compared = 0;
        for (module, found) in &one_by_one {
            assert_eq!(found.samples, rows.len());
            let covariance = found.covariance.as_ref().unwrap();
            assert_near(module, in_fours[module].covariance.as_ref().unwrap(), covariance, 2e-6);
            let expected = format!("{case}/expected.safetensors");
            let key = format!("base_model.model.{module}.lora_A.weight");
            let adapter = format!("{case}/adapter_init/adapter_model.safetensors");
            let bytes = std::fs::read(goldens().join(&adapter)).unwrap();
            if !safetensors::SafeTensors::deserialize(&bytes).unwrap().names().contains(&key.as_str()) {
                continue;
            }
            if module.contains("layers.0.") {
                assert_near(module, covariance, &read(&expected, &format!("covariance.{module}")), 2e-6);
            }
            let corda = Corda { r, scale: 1.0, dropout: 0.0, method };
            let delta = corda.init(&site(module, &weights[module], found)).unwrap();
            let [a, b] = [read(&adapter, &key), read(&adapter, &key.replace("lora_A", "lora_B"))];
            assert_near(module, &delta.delta(), &b.matmul(a).transpose(), limit);
            compared += 1;
        }
        assert!(compared >= 8, "{compared}");
    }
}

#[test]
fn lora_sb_starts_from_the_gradient_of_the_mean_loss() {
    let case = "lora_sb_r8";
    let (mut model, rows) = (model("tiny-llama"), rows(case));
    let weights = weights(&mut model);
    let wanted = wanted(weights.keys().cloned(), Wanted { covariance: None, gradient: true });
    let found = measure(&mut model, &plan(&wanted, &batches(&rows, 1))).unwrap();
    let file = format!("{case}/adapter_init/adapter_model.safetensors");
    for (module, found) in &found {
        let method = LoraSb { r: 8, scale: 1.0, dropout: 0.0, eta: 1e-3 };
        let delta = method.init(&site(module, &weights[module], found)).unwrap();
        let [a, m, b] = ["lora_A", "lora_R", "lora_B"].map(|part| read(&file, &format!("{module}.{part}")));
        // A gradient next to nothing may come out with the other sign, which turns one entry of thousands.
        assert_near(module, &delta.delta(), &a.transpose().matmul(m.transpose()).matmul(b.transpose()), 1e-3);
    }
}

#[test]
fn sums_are_those_of_plain_gradients_and_inputs_without_padding() {
    let base = model("tiny-llama");
    let ids = |length: i32, from: i32| -> Vec<i32> { (0..length).map(|i| 5 + (from + 7 * i * i) % 200).collect() };
    let documents = [ids(9, 1), ids(5, 50), ids(12, 3)];
    let padded = |documents: &[Vec<i32>]| {
        let cols = documents.iter().map(Vec::len).max().unwrap();
        let fill = |document: &Vec<i32>, value: i32| -> Vec<i32> {
            (0..cols).map(|i| document.get(i).copied().unwrap_or(value)).collect()
        };
        let mask = |document: &Vec<i32>| -> Vec<i32> { (0..cols).map(|i| i32::from(i < document.len())).collect() };
        let rows: Vec<Vec<i32>> = documents.iter().map(|document| fill(document, 3)).collect();
        let labels: Vec<Vec<i32>> = documents.iter().map(|document| fill(document, lowrank_models::IGNORE)).collect();
        let masks: Vec<Vec<i32>> = documents.iter().map(mask).collect();
        Batch::from_rows(&rows, &labels, Some(&masks))
    };
    let together = padded(&documents);
    assert_eq!(decoder_sequences(&together), (36, vec![0..9, 12..17, 24..36]));
    let apart: Vec<Batch> = documents.iter().map(|document| padded(std::slice::from_ref(document))).collect();

    let mut model = base.clone();
    let names = weights(&mut model).into_keys();
    let wanted = wanted(names, Wanted { covariance: Some(Covariance::Sum), gradient: true });
    let one = measure(&mut model, &plan(&wanted, std::slice::from_ref(&together))).unwrap();
    let three = measure(&mut model, &plan(&wanted, &apart)).unwrap();
    for (module, found) in &one {
        let sum = three[module].covariance.as_ref().unwrap();
        assert_near(module, found.covariance.as_ref().unwrap(), sum, 2e-6);
        assert_eq!((found.samples, three[module].samples), (3, 3));
    }

    // The model is as it was.
    assert!(parameters::trained(&model).is_empty());
    model.for_each_projection(&mut |module, projection| {
        assert!(matches!(projection.gradient, Gradient::Full), "{module}");
    });

    let mut whole = parameters::set_trained(base, |_| Some(true));
    let mut into = Accumulated::default();
    let mut optimizer = Optimizer::adamw(AdamWConfig::default());
    let denominator = (3 * together.target_count()) as f64;
    Pass::new(&mut whole, OPTIONS).run(&together, denominator, 0, &mut into, &mut optimizer, None);
    for (module, found) in &one {
        assert_near(module, found.gradient.as_ref().unwrap(), &into.gradients[&format!("{module}.weight")], 2e-6);
    }
}

#[test]
fn layers_of_one_input_measure_it_once() {
    let names = ["q_proj", "k_proj", "v_proj", "o_proj"].map(|name| format!("model.layers.0.self_attn.{name}"));
    let covariance = Wanted { covariance: Some(Covariance::Sum), gradient: false };
    let mut all = wanted(names.clone(), covariance);
    all.insert("model.layers.1.self_attn.q_proj".to_owned(), covariance);
    all.insert(names[0].clone(), Wanted { gradient: true, ..covariance });
    let own = own(&all);
    // k_proj comes first; q_proj still has a gradient of its own; v_proj has nothing left to measure.
    assert_eq!(
        own.keys().map(|name| &name["model.layers.".len()..]).collect::<Vec<_>>(),
        ["0.self_attn.k_proj", "0.self_attn.o_proj", "0.self_attn.q_proj", "1.self_attn.q_proj"]
    );
    assert_eq!(own[&names[0]], Wanted { covariance: None, gradient: true });
    let mut model = model("tiny-llama");
    let batches = batches(&[(5..25).collect()], 1);
    let measured = measure(&mut model, &plan(&all, &batches)).unwrap();
    assert_eq!(measured.keys().collect::<Vec<_>>(), all.keys().collect::<Vec<_>>());
    let single = measure(&mut model, &plan(&wanted([names[2].clone()], covariance), &batches)).unwrap();
    let value = |measured: &Measured| linalg::host(measured[&names[2]].covariance.clone().unwrap());
    assert_eq!(value(&measured), value(&single));
    assert_eq!(measured[&names[2]].samples, 1);
}

#[test]
fn the_first_samples_come_in_the_order_of_the_data() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.jsonl");
    let lines: String = (0..7).map(|i| format!("{{\"text\": \"{}\"}}\n", "word ".repeat(1 + (i * 3) % 5))).collect();
    std::fs::write(&path, lines).unwrap();
    let tokenizer = Tokenizer::from_folder(&goldens().join("models/tiny-llama")).unwrap();
    let data = DataConfig { train: Paths::One(path.to_str().unwrap().to_owned()), ..DataConfig::default() };
    let data = prepare(&data, &Encoder { tokenizer: &tokenizer, chat: None }, 0, None).unwrap().train;
    let loading = LoaderConfig {
        micro_batch_size: 8,
        max_seq_length: 512,
        packing: true,
        shuffle: true,
        seed: 1,
        pad_id: 3,
        pad_to_multiple_of: 8,
    };
    let take = |samples, batch_size| {
        let config = CalibrationConfig { samples, batch_size, ..CalibrationConfig::default() };
        first_batches(&data, &loading, &config).unwrap()
    };
    let batches = take(5, 2);
    assert_eq!(batches.iter().map(|batch| batch.rows).collect::<Vec<_>>(), [2, 2, 1]);
    let lengths = |batches: &[Batch]| -> Vec<usize> {
        batches.iter().flat_map(|batch| decoder_sequences(batch).1).map(|rows| rows.len()).collect()
    };
    let alone = take(100, 1);
    assert_eq!(alone.len(), 7, "the data has no more");
    assert!(alone.iter().all(|batch| batch.token_count() == batch.cols), "no padding");
    assert_eq!(lengths(&batches), lengths(&alone)[..5]);
    assert_eq!(alone[0].records, [0]);
}

#[test]
fn what_was_measured_is_kept_to_the_bit() {
    let folder = tempfile::tempdir().unwrap();
    let cache = folder.path().join("calibration");
    let mut model = model("tiny-llama");
    let names = ["q_proj", "k_proj"].map(|name| format!("model.layers.0.self_attn.{name}"));
    let wanted = wanted(names.clone(), Wanted { covariance: Some(Covariance::Sum), gradient: true });
    let identity = |samples: &str| Identity {
        base: hash_model(&goldens().join("models/tiny-llama")).unwrap(),
        samples: samples.to_owned(),
        settings: String::new(),
    };
    assert_eq!(
        identity("").base.iter().map(|(name, _)| name.as_str()).collect::<Vec<_>>(),
        ["config.json", "model.safetensors"]
    );
    let batches = batches(&[(5..25).collect(), (50..70).collect()], 1);
    let mut run = |samples: &str, count: usize| {
        measure_cached(&mut model, &plan(&wanted, &batches[..count]), &identity(samples), Some(&cache)).unwrap()
    };
    let values = |measured: &Measured| -> Vec<Vec<f32>> {
        names
            .iter()
            .flat_map(|name| [measured[name].covariance.clone().unwrap(), measured[name].gradient.clone().unwrap()])
            .map(linalg::host)
            .collect()
    };
    let first = run("a", 2);
    let files = || -> Vec<PathBuf> { std::fs::read_dir(&cache).unwrap().map(|file| file.unwrap().path()).collect() };
    let path = files().remove(0);
    // Without a batch to run, so that it can only come from the disk.
    let again = run("a", 0);
    assert_eq!(values(&again), values(&first));
    assert_eq!(again[&names[0]].samples, 2);
    let good = std::fs::read(&path).unwrap();
    let mut flipped = good.clone();
    *flipped.last_mut().unwrap() ^= 1;
    let mut inside = good.clone();
    inside[good.len() / 2] ^= 4;
    for bad in [&good[..good.len() - 3], &flipped, &inside, b"", b"no safetensors at all"] {
        std::fs::write(&path, bad).unwrap();
        assert_eq!(values(&run("a", 2)), values(&first), "measured again");
        assert_eq!(std::fs::read(&path).unwrap(), good, "the file is repaired");
    }
    run("b", 1);
    assert_eq!(files().len(), 2);
    let blocked = folder.path().join("file");
    std::fs::write(&blocked, "not a folder").unwrap();
    let unwritable =
        measure_cached(&mut model, &plan(&wanted, &batches), &identity("a"), Some(&blocked.join("deeper"))).unwrap();
    assert_eq!(values(&unwritable), values(&first));
}

#[test]
fn what_cannot_be_measured_is_named() {
    let mut model = model("tiny-llama");
    let gradient = Wanted { covariance: None, gradient: true };
    let known = "model.layers.0.self_attn.q_proj";
    let batches = batches(&[(5..25).collect()], 1);
    let problem = |model: &mut Decoder, names: &[&str]| {
        let wanted = wanted(names.iter().map(|name| (*name).to_owned()), gradient);
        measure(model, &plan(&wanted, &batches)).unwrap_err()
    };
    let unknown = problem(&mut model, &[known, "model.layers.9.self_attn.q_proj"]);
    assert!(unknown.what.contains("layers.9") && !unknown.what.contains("layers.0"), "{}", unknown.what);
    assert!(parameters::trained(&model).is_empty(), "the model is as it was");
    model.for_each_projection(&mut |module, projection| {
        if module == known {
            let lora = lowrank_core::adapters::lora::Lora { r: 2, scale: 1.0, dropout: 0.0, init: Default::default() };
            let [d_in, d_out] = projection.dims();
            projection.attach(Delta::LowRank(lora.init(d_in, d_out, Stream::new(0, module), &device())));
        }
    });
    assert!(problem(&mut model, &[known]).hint.unwrap().contains("before an adapter"));
}

/// What NF4 leaves of a layer, with EoRA's repair.
fn eora(module: &str, projection: &Projection, measured: &Measured) -> Result<Projection, Problem> {
    let full = projection.weight.values();
    let weight = Base::dense(Quantisation::NF4.pack_tensor(full.clone()).dense(FloatDType::F32));
    let residual = Some(full.clone() - weight.values());
    let site = Site { residual, ..site(module, &full, &measured[module]) };
    let mut repaired = Projection { weight, ..projection.clone() };
    repaired.attach(Delta::LowRank(Eora { r: 4, dropout: 0.0, trained: true }.init(&site).unwrap()));
    Ok(repaired)
}

/// Inputs of a block are those that the repaired blocks before it make, with its own weights inside.
#[test]
fn a_repair_is_measured_behind_the_repaired_blocks() {
    let base = model("tiny-llama");
    let names = weights(&mut base.clone()).into_keys();
    let wanted = wanted(names, Wanted { covariance: Some(Covariance::Sum), gradient: false });
    let batches = batches(&[(5..25).collect(), (50..70).collect(), (30..50).collect()], 2);
    let one_pass = plan(&wanted, &batches);
    let at_once = measure(&mut base.clone(), &one_pass).unwrap();
    let nothing: Repair<'_> = &|_, projection, _| Ok(projection.clone());
    let unrepaired = measure(&mut base.clone(), &Plan { repair: Some(nothing), ..plan(&wanted, &batches) }).unwrap();
    let mut model = base.clone();
    let in_order = measure(&mut model, &Plan { repair: Some(&eora), ..plan(&wanted, &batches) }).unwrap();
    assert!(in_order.keys().eq(at_once.keys()) && unrepaired.keys().eq(at_once.keys()));
    assert!(parameters::trained(&model).is_empty(), "the model is as it was");

    // The same by hand: repair the blocks below, and measure everything in one pass.
    let mut by_hand = base.clone();
    let (mut measured, mut apart) = (at_once.clone(), 0.0f64);
    for block in 0..base.blocks().len() {
        let inside = format!("model.layers.{block}.");
        for module in wanted.keys().filter(|module| module.starts_with(&inside)) {
            let covariance = |found: &Measured| found[module].covariance.clone().unwrap();
            assert_near(module, &covariance(&in_order), &covariance(&measured), 1e-5);
            assert_near(module, &covariance(&unrepaired), &covariance(&at_once), 1e-5);
            assert_eq!(in_order[module].samples, 3);
            apart = apart.max(norm(&(covariance(&in_order) - covariance(&at_once))) / norm(&covariance(&at_once)));
        }
        by_hand.for_each_projection(&mut |module, projection| {
            if module.starts_with(&inside) {
                *projection = eora(module, projection, &measured).unwrap();
                projection.merge();
            }
        });
        measured = measure(&mut by_hand, &one_pass).unwrap();
    }
    assert!(apart > 1e-3, "{apart:.1e}: the repairs change too little to tell");
}
