//! Adapters on the convolutions of a ResNet: which layers get one, files, merging, what is refused.
#![allow(clippy::unwrap_used)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, FloatDType, Tensor};
use lowrank_core::conv::{ConvDelta, LoraConvSettings, TuckerConvSettings};
use lowrank_core::random::Stream;
use lowrank_core::{Layer, Sizes};
use lowrank_models::adapters::{self, AdapterError, Attached, Fresh};
use lowrank_models::classifier::{self, Classifier, ClassifierBatch, Input, Labels};
use lowrank_models::hf::peft::{CordaMethod, MethodConfig, ModulePattern, Modules};
use lowrank_models::hf::{AdapterConfig, Checkpoint, Dtype};
use lowrank_models::network::Network;
use lowrank_models::parameters;
use lowrank_models::save::host_values;

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testkit/goldens/models/tiny-resnet")
}

fn resnet() -> Classifier {
    classifier::load(&folder(), FloatDType::F32, &Device::flex(), None, 7, &mut |_, _, _| {}).unwrap().0
}

fn images() -> ClassifierBatch {
    let stream = Stream::new(3, "pixels");
    let pixels = (0..2 * 3 * 18 * 14).map(|i| stream.normal(i) as f32).collect();
    let input = Input::Image { rows: 2, channels: 3, height: 18, width: 14, pixels };
    ClassifierBatch { input, labels: Labels::Classes(vec![0, 1]), records: vec![] }
}

fn named(names: &[&str]) -> Modules {
    Modules::Names(names.iter().map(|name| (*name).to_owned()).collect())
}

fn lora(targets: Modules) -> AdapterConfig {
    AdapterConfig { task_type: None, ..AdapterConfig::new(3, 6.0, targets) }
}

fn tucker(targets: Modules) -> AdapterConfig {
    let method = MethodConfig::Tucker { r_in: 3, r_out: 2, r_rows: 2, r_columns: 1, scale: 2.0 };
    AdapterConfig { method, ..lora(targets) }
}

fn attach(model: &mut Classifier, config: &AdapterConfig) -> Result<Attached, AdapterError> {
    let fresh = Fresh {
        seed: 5,
        statistics: &BTreeMap::new(),
        original: &mut |module| unreachable!("{module} is not quantised"),
        progress: &mut |_, _, _| {},
    };
    adapters::attach(model, config, fresh)
}

/// Moves every trained parameter off its start.
fn move_adapters(model: &mut Classifier) {
    let trained: BTreeMap<String, Vec<usize>> = parameters::trained(model).into_iter().collect();
    model.map_parameters(&mut |name, value| {
        if !trained.contains_key(name) {
            return value;
        }
        let [rows, cols] = value.dims();
        value + Stream::new(9, name).normal_tensor(rows, cols, 0.2, &Device::flex())
    });
}

fn logits(model: &Classifier) -> Vec<f32> {
    host_values(model.logits(&images()))
}

fn largest_difference(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Names of the layers that have an adapter.
fn adapted(model: &Classifier) -> Vec<String> {
    let mut found = vec![];
    model.clone().for_each_layer(&mut |name, layer| {
        let has_delta = match layer {
            Layer::Linear(projection) => projection.delta.is_some(),
            Layer::Conv(conv) => conv.delta.is_some(),
        };
        if has_delta {
            found.push(name.to_owned());
        }
    });
    found
}

#[test]
fn names_and_patterns_select_convolutions_and_all_linear_does_not() {
    let first = "resnet.embedder.embedder.convolution";
    let pattern = |text: &str| Modules::Pattern(ModulePattern::whole(text).unwrap());
    for (targets, count) in [
        (named(&["convolution"]), 8),
        (named(&[first]), 1),
        (named(&["shortcut.convolution", "classifier.1"]), 2),
        (pattern(r"resnet\.encoder\..*\.layer\.0\.convolution"), 3),
        (pattern(".*"), 9),
        (Modules::AllLinear, 1), // the head, whose last name is no word for heads
    ] {
        let (mut model, config) = (resnet(), lora(targets));
        let attached = attach(&mut model, &config).unwrap();
        assert_eq!((attached.modules.len(), &attached.modules), (count, &adapted(&model)), "{config:?}");
    }
    let mut model = resnet();
    let config =
        AdapterConfig { exclude_modules: Some(named(&["embedder.convolution"])), ..lora(named(&["convolution"])) };
    let config = AdapterConfig { layers_to_transform: vec![1], ..config };
    // The first number of a name is that of the stage.
    attach(&mut model, &config).unwrap();
    assert_eq!(adapted(&model).len(), 3);
    assert!(adapted(&model).iter().all(|name| name.starts_with("resnet.encoder.stages.1.")), "{:?}", adapted(&model));
}

#[test]
fn each_kind_of_layer_gets_its_own_form_and_starts_as_the_base() {
    let plain = logits(&resnet());
    for config in [lora(named(&["convolution", "1"])), tucker(named(&["convolution", "1"]))] {
        let mut model = resnet();
        attach(&mut model, &config).unwrap();
        assert_eq!(logits(&model), plain);
        let mut expected = 0;
        for (_, sizes) in adapters::layers(&model) {
            expected += match (sizes, &config.method) {
                (Sizes::Linear([d_in, d_out]), MethodConfig::Lora) => 3 * (d_in + d_out),
                (Sizes::Linear([d_in, d_out]), _) => 3 * d_in + 3 * 2 + 2 * d_out,
                (Sizes::Conv(dims), MethodConfig::Lora) => {
                    LoraConvSettings { r: 3, scale: 2.0, dropout: 0.0, init: Default::default() }.parameters(dims)
                }
                (Sizes::Conv(dims), _) => {
                    TuckerConvSettings { ranks: [3, 2, 2, 1], scale: 2.0, dropout: 0.0 }.parameters(dims)
                }
            };
        }
        let trained = parameters::trained(&model);
        assert_eq!(trained.iter().map(|(_, dims)| dims.iter().product::<usize>()).sum::<usize>(), expected);
        model.for_each_convolution(&mut |name, conv| match (&conv.delta, &config.method) {
            (Some(ConvDelta::Lora(delta)), MethodConfig::Lora) => assert_eq!(delta.scale, 2.0, "{name}"),
            (Some(ConvDelta::Tucker(delta)), MethodConfig::Tucker { .. }) => assert_eq!(delta.scale, 2.0, "{name}"),
            other => unreachable!("{name}: {other:?}"),
        });
    }
}

#[test]
fn merging_keeps_the_logits() {
    let plain = logits(&resnet());
    for config in [lora(named(&["convolution", "1"])), tucker(named(&["convolution", "1"]))] {
        let mut model = resnet();
        attach(&mut model, &config).unwrap();
        move_adapters(&mut model);
        let before = logits(&model);
        assert!(largest_difference(&before, &plain) > 0.1);
        adapters::merge(&mut model);
        assert!(adapted(&model).is_empty());
        let size = before.iter().fold(1.0f32, |size, value| size.max(value.abs()));
        let difference = largest_difference(&logits(&model), &before);
        assert!(difference < 1e-5 * size, "{difference} of {size}");
        let written = tempfile::tempdir().unwrap();
        classifier::save(&model, &folder(), written.path(), Dtype::F32, u64::MAX).unwrap();
        let (again, fresh) =
            classifier::load(written.path(), FloatDType::F32, &Device::flex(), None, 0, &mut |_, _, _| {}).unwrap();
        assert!(fresh.is_empty());
        // The head's matrix lies the other way round after reading, and is summed in another order.
        assert!(largest_difference(&logits(&again), &before) < 1e-5 * size);
    }
}

/// Shapes of a folder's tensors by key.
fn shapes(folder: &Path) -> BTreeMap<String, Vec<usize>> {
    let file = Checkpoint::open_file(&folder.join("adapter_model.safetensors")).unwrap();
    let of = |name: &str| (name.to_owned(), file.get(name).unwrap().shape.to_vec());
    file.names().map(of).collect()
}

/// LoRA by the names and shapes of PEFT, a Tucker core by our own; and back, to the bit.
#[test]
fn folders_read_back_the_same() {
    let stage = "resnet.encoder.stages.1.layers.0";
    let peft = format!("base_model.model.{stage}");
    let lora_shapes = [
        (format!("{peft}.layer.0.convolution.lora_A.weight"), vec![3, 8, 3, 3]),
        (format!("{peft}.layer.0.convolution.lora_B.weight"), vec![12, 3, 1, 1]),
        (format!("{peft}.shortcut.convolution.lora_A.weight"), vec![2, 8, 1, 1]),
        ("base_model.model.classifier.1.lora_A.weight".to_owned(), vec![3, 12]),
        ("base_model.model.resnet.embedder.embedder.normalization.weight".to_owned(), vec![8]),
    ];
    let tucker_shapes = [
        (format!("{stage}.layer.0.convolution.lora_A"), vec![3, 8]),
        (format!("{stage}.layer.0.convolution.lora_B"), vec![12, 2]),
        (format!("{stage}.layer.0.convolution.lora_R"), vec![2, 3, 2, 1]),
        (format!("{stage}.layer.0.convolution.lora_rows"), vec![3, 2]),
        (format!("{stage}.layer.0.convolution.lora_columns"), vec![3, 1]),
        (format!("{stage}.shortcut.convolution.lora_R"), vec![2, 3, 1, 1]),
        ("classifier.1.lora_R".to_owned(), vec![2, 3]),
    ];
    let whole = |config: AdapterConfig, module: &str| AdapterConfig {
        modules_to_save: vec![ModulePattern::part(module).unwrap()],
        ..config
    };
    let ranked = AdapterConfig {
        rank_pattern: vec![(ModulePattern::ending("shortcut.convolution").unwrap(), 2)],
        ..whole(lora(named(&["convolution", "1"])), "embedder.normalization")
    };
    // A kernel that is trained whole lies beside the adapters of the others.
    let saved = whole(tucker(named(&["convolution", "1"])), "embedder.convolution");
    let kernel = [("resnet.embedder.embedder.convolution.weight".to_owned(), vec![8, 3, 7, 7])];
    let tucker_shapes = tucker_shapes.into_iter().chain(kernel);
    for (config, expected) in [(ranked, lora_shapes.to_vec()), (saved, tucker_shapes.collect())] {
        let mut model = resnet();
        let attached = attach(&mut model, &config).unwrap();
        move_adapters(&mut model);
        let written = tempfile::tempdir().unwrap();
        adapters::save_adapter(&model, &config, &attached, "base", written.path()).unwrap();
        let found = shapes(written.path());
        for (key, shape) in expected {
            assert_eq!(found.get(&key), Some(&shape), "{key} in {found:?}");
        }
        let mut again = resnet();
        let (read, loaded) = adapters::load_adapter(&mut again, written.path()).unwrap();
        assert_eq!(
            (&read.method, &loaded.modules, &loaded.saved),
            (&config.method, &attached.modules, &attached.saved)
        );
        assert_eq!(logits(&again), logits(&model));
    }
}

#[test]
fn tensors_of_another_shape_are_named() {
    let (mut model, config) = (resnet(), lora(named(&["shortcut.convolution"])));
    let attached = attach(&mut model, &config).unwrap();
    let written = tempfile::tempdir().unwrap();
    adapters::save_adapter(&model, &config, &attached, "base", written.path()).unwrap();
    let path = written.path().join("adapter_config.json");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("\"r\": 3", "\"r\": 4")).unwrap();
    let error = adapters::load_adapter(&mut resnet(), written.path()).unwrap_err().to_string();
    assert!(error.contains("convolution.lora_A.weight: expected shape [4, 8, 1, 1], got [3, 8, 1, 1]"), "{error}");
    assert!(error.contains("convolution.lora_B.weight: expected shape [12, 4, 1, 1], got [12, 3, 1, 1]"), "{error}");
}

#[test]
fn what_has_no_form_for_convolutions_is_refused() {
    let corda = MethodConfig::Corda { corda_method: CordaMethod::Ipm };
    let vera = MethodConfig::Vera { d_initial: 0.1, projection_prng_key: 0 };
    for method in [MethodConfig::Dora, corda, vera, MethodConfig::LoraXs, MethodConfig::Hra { apply_gs: false }] {
        let name = method.name();
        let config = AdapterConfig { method, ..lora(named(&["1", "convolution"])) };
        let error = attach(&mut resnet(), &config).unwrap_err().to_string();
        assert_eq!(
            error,
            format!(
                "{name} cannot adapt resnet.embedder.embedder.convolution: it is a convolution, and {name} has a form for \
                 linear layers only\nhint: use lora or tucker, or keep convolutions out of target_modules \
                 (exclude_modules = [\"convolution\"])"
            )
        );
        let config = AdapterConfig { exclude_modules: Some(named(&["convolution"])), ..config };
        assert!(adapters::targets(&resnet(), &config).is_ok_and(|targets| targets.len() == 1));
    }
    let error = attach(&mut resnet(), &AdapterConfig { r: 9, ..lora(named(&["convolution"])) }).unwrap_err();
    assert_eq!(
        error.to_string(),
        "r = 9 is larger than resnet.embedder.embedder.convolution allows: its kernel of 7 x 7 takes 3 channels to 8, so r can \
         be at most 8\nhint: lower r, or set rank_pattern for this module"
    );
    let method = MethodConfig::Tucker { r_in: 4, r_out: 4, r_rows: 2, r_columns: 2, scale: 1.0 };
    let error = attach(&mut resnet(), &AdapterConfig { method, ..lora(named(&["convolution"])) }).unwrap_err();
    assert!(
        error.to_string().contains("r_in = 4 is larger than resnet.embedder.embedder.convolution allows"),
        "{error}"
    );
    assert!(error.to_string().ends_with("hint: lower r_in, or leave this module out by exclude_modules"), "{error}");
    let error = attach(&mut resnet(), &lora(named(&["q_proj"]))).unwrap_err().to_string();
    assert!(
        error.contains("the modules convolution, 1\nhint: use \"all-linear\" (which leaves out convolutions)"),
        "{error}"
    );
}

/// The gaussian start of PEFT, and no other than these.
#[test]
fn starts_are_those_of_linear_layers() {
    use lowrank_models::hf::peft::InitLoraWeights;
    let with = |name: &str| AdapterConfig {
        init_lora_weights: InitLoraWeights::Named(name.to_owned()),
        ..lora(named(&["convolution"]))
    };
    let first = |config: &AdapterConfig| {
        let (mut model, mut found) = (resnet(), None);
        attach(&mut model, config).unwrap();
        model.for_each_convolution(&mut |_, conv| {
            if let (Some(ConvDelta::Lora(delta)), None) = (&conv.delta, &found) {
                found = Some(delta.down.val());
            }
        });
        found.unwrap()
    };
    let deviation = |down: Tensor<4>| (down.clone() * down).mean().into_scalar::<f32>().sqrt();
    // 441 values: a relative standard error of 0.034, four of them.
    assert!((deviation(first(&with("gaussian"))) * 3.0 - 1.0).abs() < 0.14);
    assert!((deviation(first(&lora(named(&["convolution"])))) * (3.0f32 * 147.0).sqrt() - 1.0).abs() < 0.14);
    let error = attach(&mut resnet(), &with("eva")).unwrap_err().to_string();
    assert!(error.starts_with("init_lora_weights = \"eva\" is not supported"), "{error}");
    // A folder brings its values, however they started.
    let (mut model, config) = (resnet(), lora(named(&["convolution"])));
    let attached = attach(&mut model, &config).unwrap();
    let written = tempfile::tempdir().unwrap();
    adapters::save_adapter(&model, &with("eva"), &attached, "base", written.path()).unwrap();
    let (read, _) = adapters::load_adapter(&mut resnet(), written.path()).unwrap();
    assert_eq!(read.init_lora_weights, with("eva").init_lora_weights);
}
