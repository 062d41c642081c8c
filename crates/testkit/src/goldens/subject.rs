//! The models of cases: how each kind is loaded, fed and read.

use std::ops::Range;
use std::path::Path;

use burn::tensor::{Int, Tensor, TensorData};
use lowrank_core::quant::Quantisation;
use lowrank_models::classifier::{self, Classifier, ClassifierBatch, Input, Labels};
use lowrank_models::hf::{Checkpoint, Dtype, OutTensor};
use lowrank_models::save::{self, host_values};
use lowrank_models::{Batch, Decoder, Inputs, Network, load, parameters};
use lowrank_train::{calibrate, classification};

use super::bitsandbytes;
use super::case::Case;
use super::tensors::{self, Tensors, Values};
use super::{Options, Stop, failed};

/// Rows of a batch's hidden states, and which of them are the tokens of each sample.
pub type Sequences<B> = dyn Fn(&B) -> (usize, Vec<Range<usize>>);

/// A kind of model that cases are about.
pub trait Subject: Network {
    /// Loads the model of a case.
    ///
    /// # Errors
    /// Its files do not fit.
    fn load(case: &Case, folder: &Path, options: &Options) -> Result<Self, Stop>;

    /// The micro batch that begins at sequence `first` and has `height` of them, from tensors whose axes but those of one
    /// sequence were joined.
    ///
    /// # Errors
    /// A tensor is missing.
    fn batch(tensors: &Tensors, first: usize, height: usize) -> Result<Self::Batch, Stop>;

    /// Logits on the host, in the order of the reference: of a language model at the first `positions` of sequence 0, of a
    /// classifier for every sequence.
    fn reference_logits(&self, batch: &Self::Batch, positions: usize) -> Vec<f32>;

    /// Every parameter under its name in memory, in the shape it has on disk.
    fn stored_tensors(&self) -> Vec<OutTensor<'static>>;

    /// The same of the checkpoint, at full precision.
    ///
    /// # Errors
    /// Its files cannot be read.
    fn stored_base(case: &Case, folder: &Path, options: &Options) -> Result<Tensors, Stop>;

    /// Tells of a batch the rows of its hidden states, and which of them are the tokens of each sample.
    fn sequences(&self) -> Box<Sequences<Self::Batch>>;
}

impl Subject for Decoder {
    fn load(case: &Case, folder: &Path, options: &Options) -> Result<Self, Stop> {
        let nf4 =
            case.nf4()?.map(|nf4| Quantisation { block: nf4.blocksize, double: nf4.double_quant, ..Quantisation::NF4 });
        let quantise = |module: &str| nf4.filter(|_| case.targets(module));
        let (dtype, device) = (case.compute_dtype()?, &options.device.device);
        let mut decoder = load::load_quantised(folder, dtype, &quantise, device, &mut |_, _, _| {}).map_err(failed)?;
        if nf4.is_some() {
            bitsandbytes::hold_as_its_cpu_reads(&mut decoder, &Checkpoint::open(folder).map_err(failed)?)?;
        }
        Ok(decoder)
    }

    fn batch(tensors: &Tensors, first: usize, height: usize) -> Result<Batch, Stop> {
        let at = first..first + height;
        let ids = tensors::get(tensors, "input_ids")?;
        let labels = rows(tensors.get("labels").unwrap_or(ids));
        let mask = tensors.get("attention_mask").map(rows);
        Ok(Batch::from_rows(&rows(ids)[at.clone()], &labels[at.clone()], mask.as_ref().map(|mask| &mask[at])))
    }

    fn reference_logits(&self, batch: &Batch, positions: usize) -> Vec<f32> {
        let inputs = Inputs::new(batch, &self.config, 0, &self.device());
        logits(self, &self.hidden(&inputs, None), &(0..positions).collect::<Vec<_>>())
    }

    fn stored_tensors(&self) -> Vec<OutTensor<'static>> {
        save::tensors(self, Dtype::F32)
    }

    fn stored_base(_case: &Case, folder: &Path, _options: &Options) -> Result<Tensors, Stop> {
        let checkpoint = Checkpoint::open(folder).map_err(failed)?;
        let mut stored = Tensors::new();
        for name in checkpoint.names() {
            let view = checkpoint.get(name).map_err(failed)?;
            stored.insert(name.to_owned(), Values { shape: view.shape.to_vec(), data: view.to_f32() });
        }
        Ok(stored)
    }

    fn sequences(&self) -> Box<Sequences<Batch>> {
        Box::new(calibrate::decoder_sequences)
    }
}

impl Subject for Classifier {
    fn load(case: &Case, folder: &Path, options: &Options) -> Result<Self, Stop> {
        let device = &options.device.device;
        let (model, fresh) =
            classifier::load(folder, case.compute_dtype()?, device, None, 0, &mut |_, _, _| {}).map_err(failed)?;
        match fresh.is_empty() {
            true => Ok(model),
            false => Err(failed(format!("the checkpoint has no {}", fresh.join(", ")))),
        }
    }

    fn batch(tensors: &Tensors, first: usize, height: usize) -> Result<ClassifierBatch, Stop> {
        let at = first..first + height;
        let labels = tensors::get(tensors, "labels")?.integers()[at.clone()].to_vec();
        let input = match tensors.get("pixel_values") {
            Some(pixels) => image(pixels, first, height)?,
            None => {
                let ids = rows(tensors::get(tensors, "input_ids")?)[at.clone()].to_vec();
                let mask = tensors.get("attention_mask").map(|mask| rows(mask)[at].concat());
                let (cols, ids) = (ids[0].len(), ids.concat());
                let types = vec![0; ids.len()];
                Input::Text { rows: height, cols, mask: mask.unwrap_or(vec![1; ids.len()]), ids, types }
            }
        };
        Ok(ClassifierBatch { input, labels: Labels::Classes(labels), records: (0..height as u64).collect() })
    }

    fn reference_logits(&self, batch: &ClassifierBatch, _positions: usize) -> Vec<f32> {
        host_values(self.logits(batch))
    }

    fn stored_tensors(&self) -> Vec<OutTensor<'static>> {
        let specs = self.config.layout().tensors();
        let mut out = vec![];
        parameters::visit(self, "", |entry| {
            let Some(spec) = specs.iter().find(|spec| spec.name == entry.name) else { return };
            let (value, flipped) = ((entry.value)(), spec.flipped);
            out.push(OutTensor::new(entry.name, Dtype::F32, &spec.shape, move || {
                let value = if flipped { value.transpose() } else { value };
                lowrank_models::hf::dtype::from_f32(&host_values(value), Dtype::F32)
            }));
        });
        out
    }

    fn stored_base(case: &Case, folder: &Path, options: &Options) -> Result<Tensors, Stop> {
        Ok(values(Self::load(case, folder, options)?.stored_tensors()))
    }

    fn sequences(&self) -> Box<Sequences<ClassifierBatch>> {
        Box::new(classification::sequences(self.config.columns()))
    }
}

/// Tensors as they would lie in a file of f32 values.
pub fn values(tensors: Vec<OutTensor<'static>>) -> Tensors {
    let value = |tensor: OutTensor<'static>| {
        let (name, shape) = (tensor.name.clone(), tensor.shape.clone());
        (name, Values { shape, data: lowrank_models::hf::dtype::to_f32(&(tensor.data)(), Dtype::F32) })
    };
    tensors.into_iter().map(value).collect()
}

/// Images `[.., channels, height, width]` from number `first` on.
fn image(pixels: &Values, first: usize, count: usize) -> Result<Input, Stop> {
    let &[.., channels, height, width] = pixels.shape.as_slice() else {
        return Err(failed(format!("pixel_values {:?}: expected [.., channels, height, width]", pixels.shape)));
    };
    let size = channels * height * width;
    let pixels = pixels.data[first * size..(first + count) * size].to_vec();
    Ok(Input::Image { rows: count, channels, height, width, pixels })
}

/// A matrix as rows of whole numbers.
pub fn rows(values: &Values) -> Vec<Vec<i32>> {
    let width = values.shape.last().copied().unwrap_or(1).max(1);
    values.integers().chunks(width).map(<[i32]>::to_vec).collect()
}

/// Logits at these rows of the residual stream, on the host.
pub fn logits(decoder: &Decoder, hidden: &Tensor<2>, rows: &[usize]) -> Vec<f32> {
    let rows: Vec<i32> = rows.iter().map(|&row| row as i32).collect();
    let count = rows.len();
    let rows = Tensor::<1, Int>::from_data(TensorData::new(rows, [count]), &decoder.device());
    host_values(decoder.logits(hidden.clone().select(0, rows)))
}
