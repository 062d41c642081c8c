//! A [`Classifier`] as a Hugging Face folder, adapters merged: config with the names of the classes, tensors, tokenizer, image
//! settings.

use std::collections::BTreeMap;
use std::path::Path;

use serde_json::{Map, Value, json};

use super::Classifier;
use super::layout::TensorSpec;
use super::load::name_on_disk;
use crate::hf::{Dtype, HfError, OutTensor};
use crate::network::Network as _;
use crate::parameters;
use crate::save::{Place, host_values, packed, write_folder};

/// Writes the model to `folder` in `dtype`, with the configuration and companion files of `origin` carried along.
///
/// Deltas must be merged before. Shards hold at most `max_shard_bytes`.
///
/// # Errors
/// Anything the disk refuses; files that were there before are then unchanged.
pub fn save(
    classifier: &Classifier,
    origin: &Path,
    folder: &Path,
    dtype: Dtype,
    max_shard_bytes: u64,
) -> Result<(), HfError> {
    let place = Place { origin, folder, dtype, max_shard_bytes };
    write_folder(&place, tensors(classifier, dtype), |config| describe(classifier, config))
}

/// Every parameter and buffer under its name and shape on disk; bytes are produced when the writer asks.
pub fn tensors(classifier: &Classifier, dtype: Dtype) -> Vec<OutTensor<'static>> {
    let family = classifier.config.family;
    let specs: BTreeMap<String, TensorSpec> =
        classifier.config.layout().tensors().into_iter().map(|spec| (spec.name.clone(), spec)).collect();
    let mut out = vec![];
    parameters::visit(classifier, "", |entry| {
        let Some(spec) = specs.get(entry.name) else { return };
        let (value, flipped) = ((entry.value)(), spec.flipped);
        out.push(OutTensor::new(name_on_disk(family, &spec.name), dtype, &spec.shape, move || {
            let value = if flipped { value.transpose() } else { value };
            crate::hf::dtype::from_f32(&host_values(value), dtype)
        }));
    });
    classifier.visit_projections(&mut |module, projection| {
        out.extend(packed(&name_on_disk(family, &format!("{module}.weight")), projection, dtype));
    });
    for (name, value) in classifier.buffers() {
        let shape = value.dims();
        out.push(OutTensor::new(name_on_disk(family, &name), dtype, &shape, move || {
            crate::hf::dtype::from_f32(&host_values(value.unsqueeze()), dtype)
        }));
    }
    out
}

/// What a `config.json` says of a classifier: its class and the names of its classes.
fn describe(classifier: &Classifier, config: &mut Map<String, Value>) {
    let labels = &classifier.config.labels;
    config.insert("architectures".to_owned(), json!([classifier.config.family.architectures[0]]));
    let by_id = labels.iter().enumerate().map(|(id, name)| (id.to_string(), Value::from(name.as_str())));
    config.insert("id2label".to_owned(), Value::Object(by_id.collect::<Map<_, _>>()));
    let by_name = labels.iter().enumerate().map(|(id, name)| (name.clone(), Value::from(id)));
    config.insert("label2id".to_owned(), Value::Object(by_name.collect::<Map<_, _>>()));
    config.shift_remove("num_labels"); // follows from id2label
    let problem = if labels.len() == 1 { "regression" } else { "single_label_classification" };
    config.insert("problem_type".to_owned(), problem.into());
}
