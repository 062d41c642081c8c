//! Classifiers against what transformers computes (the cases `forward_tiny-bert` and `forward_tiny-vit`), their files, and the
//! text of every error.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]

use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use lowrank_core::quant::Quantisation;
use lowrank_models::classifier::{self, Classifier, ClassifierBatch, ClassifierConfig, Input, Labels};
use lowrank_models::hf::{Checkpoint, Dtype};
use lowrank_models::network::Network;
use lowrank_models::parameters;
use lowrank_models::save::host_values;
use safetensors::SafeTensors;

/// Loss of the case `forward_tiny-resnet`.
const RESNET_LOSS: f32 = 1.099_114_7;

fn goldens() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens")
}

fn load(model: &str, num_labels: Option<usize>) -> (Classifier, Vec<String>) {
    let folder = goldens().join("models").join(model);
    classifier::load(&folder, FloatDType::F32, &Device::flex(), num_labels, 7, &mut |_, _, _| {}).unwrap()
}

/// Tensors of a case as numbers.
struct Case(Vec<u8>);

impl Case {
    fn open(name: &str) -> Self {
        Self(std::fs::read(goldens().join(name).join("expected.safetensors")).unwrap())
    }
    fn values(&self, name: &str) -> (Vec<usize>, Vec<f32>) {
        let tensors = SafeTensors::deserialize(&self.0).unwrap();
        let view = tensors.tensor(name).unwrap();
        let values = match view.dtype() {
            safetensors::Dtype::I64 => {
                view.data().chunks(8).map(|eight| i64::from_le_bytes(eight.try_into().unwrap()) as f32).collect()
            }
            _ => view.data().chunks(4).map(|four| f32::from_le_bytes(four.try_into().unwrap())).collect(),
        };
        (view.shape().to_vec(), values)
    }
    fn integers(&self, name: &str) -> Vec<i32> {
        self.values(name).1.into_iter().map(|value| value as i32).collect()
    }
}

fn texts(case: &Case) -> ClassifierBatch {
    let (shape, _) = case.values("input_ids");
    let ids = case.integers("input_ids");
    let types = vec![0; ids.len()];
    let mask = case.integers("attention_mask");
    let input = Input::Text { rows: shape[0], cols: shape[1], ids, types, mask };
    ClassifierBatch { input, labels: Labels::Classes(case.integers("labels")), records: vec![] }
}

fn images(case: &Case) -> ClassifierBatch {
    let (shape, pixels) = case.values("pixel_values");
    let input = Input::Image { rows: shape[0], channels: shape[1], height: shape[2], width: shape[3], pixels };
    ClassifierBatch { input, labels: Labels::Classes(case.integers("labels")), records: vec![] }
}

fn close(expected: &[f32], got: Tensor<2>, limit: f32) {
    let got = host_values(got);
    assert_eq!(expected.len(), got.len());
    let largest = expected.iter().zip(&got).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(largest < limit, "off by {largest}");
}

fn mean_loss(model: &Classifier, batch: &ClassifierBatch) -> f32 {
    let hidden = model.last_hidden(&model.inputs(batch));
    let rows = model.counted(batch);
    let x = hidden.select(0, lowrank_models::network::integers(&rows, &model.device()));
    let losses = model.losses(&model.head(), x, &rows, batch, false);
    losses.sum().into_scalar::<f32>() / batch.target_count() as f32
}

fn compare(model: &Classifier, case: &Case, batch: &ClassifierBatch, loss: f32) {
    for (index, state) in model.hidden_states(batch).into_iter().enumerate() {
        let (shape, expected) = case.values(&format!("hidden.{index}"));
        close(&expected, state.slice(burn::tensor::s![0..shape[0]]), 1e-4);
    }
    close(&case.values("logits").1, model.logits(batch), 1e-4);
    let got = mean_loss(model, batch);
    assert!((got - loss).abs() < 1e-5, "expected {loss}, got {got}");
}

#[test]
fn a_bert_computes_what_transformers_computes() {
    let (case, (model, fresh)) = (Case::open("forward_tiny-bert"), load("tiny-bert", None));
    assert!(fresh.is_empty());
    let batch = texts(&case);
    assert_eq!(batch.token_count(), 107);
    compare(&model, &case, &batch, 4.423_544_4);
}

#[test]
fn a_vit_computes_what_transformers_computes() {
    let (case, (model, fresh)) = (Case::open("forward_tiny-vit"), load("tiny-vit", None));
    assert!(fresh.is_empty());
    compare(&model, &case, &images(&case), 0.016_147_7);
}

#[test]
fn names_are_those_of_transformers_in_memory() {
    let (mut vit, _) = load("tiny-vit", None);
    let mut modules = vec![];
    vit.for_each_projection(&mut |name, _| modules.push(name.to_owned()));
    assert_eq!(modules.len(), 2 * 6 + 1);
    assert_eq!(modules[0], "vit.layers.0.attention.q_proj");
    assert_eq!(modules[11], "vit.layers.1.mlp.fc2");
    assert_eq!(modules[12], "classifier");
    let mut names = vec![];
    parameters::visit(&vit, "", |entry| names.push(entry.name.to_owned()));
    assert_eq!(names.len(), 40);
    assert_eq!(names[0], "vit.embeddings.cls_token");
    assert!(names.contains(&"vit.layers.1.layernorm_after.bias".to_owned()), "{names:?}");
    // Segment by segment the names are the same.
    let mut mapped = vec![];
    vit.map_parameters(&mut |name, value| {
        mapped.push(name.to_owned());
        value
    });
    mapped.sort();
    names.sort();
    assert_eq!(mapped, names);
    let (bert, _) = load("tiny-bert", None);
    let mut names = vec![];
    parameters::visit(&bert, "", |entry| names.push(entry.name.to_owned()));
    let checkpoint = Checkpoint::open(&goldens().join("models/tiny-bert")).unwrap();
    names.sort();
    assert_eq!(names, checkpoint.names().collect::<Vec<_>>());
}

#[test]
fn what_is_written_reads_back_the_same() {
    for (model, case) in [("tiny-bert", "forward_tiny-bert"), ("tiny-vit", "forward_tiny-vit")] {
        let ((mut before, _), case) = (load(model, None), Case::open(case));
        let names: Vec<String> = (0..before.num_labels()).map(|index| format!("class {index}")).collect();
        before.set_labels(names.clone());
        let (origin, folder) = (goldens().join("models").join(model), tempfile::tempdir().unwrap());
        classifier::save(&before, &origin, folder.path(), Dtype::F32, u64::MAX).unwrap();
        let written = Checkpoint::open(folder.path()).unwrap();
        let given = Checkpoint::open(&origin).unwrap();
        assert_eq!(written.names().collect::<Vec<_>>(), given.names().collect::<Vec<_>>());
        for name in given.names() {
            assert_eq!(written.get(name).unwrap().bytes, given.get(name).unwrap().bytes, "{name}");
        }
        let (after, fresh) =
            classifier::load(folder.path(), FloatDType::F32, &Device::flex(), None, 0, &mut |_, _, _| {}).unwrap();
        assert!(fresh.is_empty());
        assert_eq!(after.config.labels, names);
        let batch = if model == "tiny-vit" { images(&case) } else { texts(&case) };
        close(&host_values(before.logits(&batch)), after.logits(&batch), 1e-6);
    }
}

/// Linear layers of blocks are packed from the values of the file; nothing else is, whatever is asked for.
#[test]
fn blocks_alone_are_packed() {
    for (name, case) in [("tiny-bert", "forward_tiny-bert"), ("tiny-vit", "forward_tiny-vit")] {
        let (folder, case) = (goldens().join("models").join(name), Case::open(case));
        let ((mut dense, _), form) = (load(name, None), Quantisation { block: 32, ..Quantisation::INT8 });
        let quantise = |_: &str| Some(form);
        let load = |dtype| {
            let device = Device::flex();
            classifier::load_quantised(&folder, dtype, &quantise, &device, None, 7, &mut |_, _, _| {}).unwrap()
        };
        let (mut packed, fresh) = load(FloatDType::F32);
        assert!(fresh.is_empty());
        let mut held = vec![];
        packed.for_each_projection(&mut |module, projection| {
            held.push((module.to_owned(), projection.weight.is_quantised(), projection.weight.values()));
        });
        let mut index = 0;
        dense.for_each_projection(&mut |module, projection| {
            let (name, is_packed, values) = &held[index];
            let in_block = module.contains(".layer");
            assert_eq!((name.as_str(), *is_packed), (module, in_block));
            let full = projection.weight.values();
            let expected = if in_block { form.pack_tensor(full).dense(FloatDType::F32) } else { full };
            assert_eq!(host_values(values.clone()), host_values(expected), "{module}");
            index += 1;
        });
        let batch = if name == "tiny-vit" { images(&case) } else { texts(&case) };
        close(&host_values(dense.logits(&batch)), packed.logits(&batch), 0.05);
        // Codes are made of the file's values, not of those in the type of the run.
        let (mut narrow, _) = load(FloatDType::BF16);
        let mut index = 0;
        narrow.for_each_projection(&mut |module, projection| {
            if module.contains(".layer") {
                assert_eq!(host_values(projection.weight.values()), host_values(held[index].2.clone()), "{module}");
            }
            index += 1;
        });
    }
}

#[test]
fn a_head_of_another_size_starts_afresh() {
    let (bert, fresh) = load("tiny-bert", Some(2));
    assert_eq!(fresh, ["classifier.weight", "classifier.bias"]);
    assert_eq!(bert.config.labels, ["LABEL_0", "LABEL_1"]);
    let weight = host_values(bert.head.linear[1].weight.values());
    let deviation = (weight.iter().map(|value| value * value).sum::<f32>() / weight.len() as f32).sqrt();
    assert!((deviation - 0.08).abs() < 0.02, "{deviation}");
    assert_eq!(load("tiny-bert", Some(2)).1, fresh);
    let (again, _) = load("tiny-bert", Some(2));
    assert_eq!(host_values(again.head.linear[1].weight.values()), weight);
    let case = Case::open("forward_tiny-bert");
    let mut batch = texts(&case);
    let (one, _) = load("tiny-bert", Some(1));
    let logits = host_values(one.logits(&batch));
    batch.labels = Labels::Values(vec![0.5, -1.0, 2.0]);
    let expected = logits.iter().zip([0.5, -1.0, 2.0]).map(|(got, wanted)| (got - wanted).powi(2)).sum::<f32>() / 3.0;
    assert!((mean_loss(&one, &batch) - expected).abs() < 1e-5);
}

#[test]
fn padding_on_either_side_changes_nothing() {
    let case = Case::open("forward_tiny-bert");
    let (model, _) = load("tiny-bert", None);
    let whole = host_values(model.logits(&texts(&case)));
    let (mut ids, mut mask) = (case.integers("input_ids"), case.integers("attention_mask"));
    let kept = mask[40..80].iter().sum::<i32>() as usize;
    (ids, mask) = (ids[40..40 + kept].to_vec(), mask[40..40 + kept].to_vec());
    let input = Input::Text { rows: 1, cols: kept, types: vec![0; kept], ids, mask };
    let alone = ClassifierBatch { input, labels: Labels::Classes(vec![0]), records: vec![] };
    close(&whole[3..6], model.logits(&alone), 1e-5);
}

#[test]
fn the_trunk_alone_and_old_names_are_read() {
    let origin = goldens().join("models/tiny-bert");
    let given = Checkpoint::open(&origin).unwrap();
    let folder = tempfile::tempdir().unwrap();
    let trunk = given.names().filter_map(|name| Some((name, name.strip_prefix("bert.")?)));
    let tensors = trunk.map(|(name, bare)| {
        let view = given.get(name).unwrap();
        let old = bare.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta");
        lowrank_models::hf::OutTensor::from_f32(old, Dtype::F32, view.shape, view.to_f32())
    });
    lowrank_models::hf::write_sharded(folder.path(), tensors.collect(), u64::MAX).unwrap();
    let config = std::fs::read_to_string(origin.join("config.json")).unwrap();
    let config = config.replace("BertForSequenceClassification", "BertModel");
    std::fs::write(folder.path().join("config.json"), config).unwrap();
    let (model, fresh) =
        classifier::load(folder.path(), FloatDType::F32, &Device::flex(), None, 0, &mut |_, _, _| {}).unwrap();
    assert_eq!(fresh, ["classifier.weight", "classifier.bias"]);
    let case = Case::open("forward_tiny-bert");
    let states = model.hidden_states(&texts(&case));
    let (shape, expected) = case.values("hidden.2");
    close(&expected, states[2].clone().slice(burn::tensor::s![0..shape[0]]), 1e-4);
}

fn message(config: &str, num_labels: Option<usize>) -> String {
    ClassifierConfig::from_json(config, Path::new("m/config.json"), num_labels).unwrap_err().to_string()
}

#[test]
fn wrong_configurations_are_named() {
    let sizes = r#""hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1"#;
    let text = message(r#"{"model_type": "gpt2"}"#, None);
    assert!(text.contains("unknown architecture") && text.contains("ViTForImageClassification"), "{text}");
    let text = message(&format!(r#"{{"model_type": "vit", {sizes}, "num_attention_heads": 3}}"#), None);
    assert!(text.contains("`hidden_size`: expected a multiple of num_attention_heads (3), got 8"), "{text}");
    let heads = r#""num_attention_heads": 2"#;
    let text = message(&format!(r#"{{"model_type": "vit", {sizes}, {heads}, "image_size": 20}}"#), None);
    assert!(text.contains("`patch_size`: expected a divisor of image_size ([20, 20]), got [16, 16]"), "{text}");
    let text = message(
        &format!(r#"{{"model_type": "bert", {sizes}, {heads}, "vocab_size": 4, "id2label": {{"1": "a"}}}}"#),
        None,
    );
    assert!(text.contains("`id2label`: expected the numbers from 0 on, each once, got 1"), "{text}");
    let text = message(&format!(r#"{{"model_type": "bert", {sizes}, {heads}}}"#), None);
    assert!(text.contains("key `vocab_size` is missing"), "{text}");
    let text = message(
        &format!(r#"{{"model_type": "bert", {sizes}, {heads}, "vocab_size": 4, "hidden_dropout_prob": 1.5}}"#),
        None,
    );
    assert!(text.contains("`hidden_dropout_prob`: expected a probability in [0, 1), got 1.5"), "{text}");
}

#[test]
fn a_resnet_computes_what_transformers_computes() {
    let (case, (mut model, fresh)) = (Case::open("forward_tiny-resnet"), load("tiny-resnet", None));
    assert!(fresh.is_empty());
    let batch = images(&case);
    close(&case.values("logits").1, model.logits(&batch), 1e-4);
    let loss = mean_loss(&model, &batch);
    assert!((loss - RESNET_LOSS).abs() < 1e-5, "expected {RESNET_LOSS}, got {loss}");
    let mut convolutions = vec![];
    model.for_each_convolution(&mut |name, _| convolutions.push(name.to_owned()));
    assert_eq!(convolutions.len(), 8);
    assert_eq!(convolutions[0], "resnet.embedder.embedder.convolution");
    assert_eq!(convolutions[7], "resnet.encoder.stages.1.layers.0.shortcut.convolution");
    // The statistics of the norms are written, and are no parameters.
    let mut parameters = vec![];
    parameters::visit(&model, "", |entry| parameters.push(entry.name.to_owned()));
    assert!(!parameters.iter().any(|name| name.contains("running")));
    let (origin, folder) = (goldens().join("models/tiny-resnet"), tempfile::tempdir().unwrap());
    classifier::save(&model, &origin, folder.path(), Dtype::F32, u64::MAX).unwrap();
    let (written, given) = (Checkpoint::open(folder.path()).unwrap(), Checkpoint::open(&origin).unwrap());
    let kept: Vec<&str> = given.names().filter(|name| !name.ends_with("num_batches_tracked")).collect();
    assert_eq!(written.names().collect::<Vec<_>>(), kept);
    for name in kept {
        assert_eq!(written.get(name).unwrap().bytes, given.get(name).unwrap().bytes, "{name}");
    }
}
