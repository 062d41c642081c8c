//! `lowrank-bench logits`: the logits of one sequence or of images as safetensors, for the interoperability check.

use std::path::{Path, PathBuf};

use anyhow::Context;
use burn::tensor::Tensor;
use lowrank_models::classifier::{self, ClassifierBatch, Input, Labels};
use lowrank_models::hf::{Checkpoint, Dtype, OutTensor, write_safetensors};
use lowrank_models::{Batch, Inputs, save};
use lowrank_train::classification::stored_classes;
use lowrank_train::config::{Dtype as RunDtype, ProgressStyle};
use lowrank_train::session::Session;
use lowrank_train::{attach, device};

#[derive(clap::Args)]
pub struct Arguments {
    #[arg(long)]
    model: String,
    #[arg(long)]
    adapter: Option<PathBuf>,
    #[arg(long, value_delimiter = ',', required_unless_present = "pixels")]
    ids: Vec<i32>,
    /// A safetensors file with `pixel_values`, `[images, channels, height, width]`, for a classifier of images.
    #[arg(long, conflicts_with = "ids")]
    pixels: Option<PathBuf>,
    #[arg(long)]
    out: PathBuf,
}

pub fn run(arguments: Arguments) -> anyhow::Result<()> {
    let Arguments { model, adapter, ids, pixels, out } = arguments;
    let logits = match pixels {
        Some(pixels) => class_logits(&model, adapter.as_deref(), &pixels)?,
        None => token_logits(&model, adapter, ids)?,
    };
    let dims = logits.dims();
    let tensor = OutTensor::from_f32("logits", Dtype::F32, &dims, save::host_values(logits));
    Ok(write_safetensors(&out, vec![tensor], &[])?)
}

fn token_logits(model: &str, adapter: Option<PathBuf>, ids: Vec<i32>) -> anyhow::Result<Tensor<2>> {
    let mut session = Session::open(model, "cpu", RunDtype::F32, ProgressStyle::None)?;
    if let Some(folder) = adapter {
        session.load_adapter(&folder)?;
    }
    let row = Batch::from_rows(&[ids], &[], None);
    let inputs = Inputs::new(&row, &session.decoder.config, 0, &session.device.device);
    Ok(session.decoder.logits(session.decoder.hidden(&inputs, None)))
}

fn class_logits(model: &str, adapter: Option<&Path>, pixels: &Path) -> anyhow::Result<Tensor<2>> {
    let device = device::choose("cpu")?;
    let compute = device::compute_type(RunDtype::F32, &device)?;
    let classes = adapter.map(stored_classes).transpose()?.flatten().map(|names| names.len());
    let folder = Path::new(model);
    let (mut classifier, _) = classifier::load(folder, compute, &device.device, classes, 0, &mut |_, _, _| {})?;
    if let Some(adapter) = adapter {
        attach::stored(&mut classifier, adapter, folder)?;
    }
    let file = Checkpoint::open_file(pixels)?;
    let view = file.get("pixel_values")?;
    let [rows, channels, height, width] =
        <[usize; 4]>::try_from(view.shape).with_context(|| format!("pixel_values has shape {:?}", view.shape))?;
    let input = Input::Image { rows, channels, height, width, pixels: view.to_f32() };
    let batch = ClassifierBatch { input, labels: Labels::Classes(vec![0; rows]), records: vec![] };
    Ok(classifier.logits(&batch))
}
