//! From a checkpoint folder, or from nothing but its `config.json`, to a [`Classifier`] on a device.
//!
//! Linear layers of blocks can be packed as they are read, as those of a decoder are ([`crate::load`]). What is not in a block is
//! never packed: embeddings, the map of patches, norms, and the head, which is trained whole.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use burn::module::Param;
use burn::tensor::{Device, FloatDType, Tensor, TensorData};
use lowrank_core::Projection;
use lowrank_core::base::{Base, PackedBase};
use lowrank_core::conv::ConvProjection;
use lowrank_core::quant::Quantisation;
use lowrank_core::random::Stream;

use super::config::{ClassifierConfig, ClassifierFamily, Trunk};
use super::layout::{Kind, Layout, Part, Segment, Start, TensorSpec, join};
use super::{Block, Classifier, Head, Stem};
use crate::bert::TextStem;
use crate::convnet::{BatchNorm, ConvStem, ResidualBlock};
use crate::decoder::Embedding;
use crate::encoder::{EncoderBlock, LayerNorm};
use crate::hf::{Checkpoint, HfError};
use crate::load::{LoadError, Progress, Quantise, tensor, tensor_data};
use crate::series::Series;
use crate::vit::PatchStem;

/// Loads the classifier in `folder`: frozen weights and activations in `dtype`. `num_labels` overrides the number of classes
/// that the file names. A head that is missing or of another size starts afresh from `seed`, normal with the configuration's
/// `initializer_range`; the names of its tensors are returned.
///
/// # Errors
/// An unknown architecture, a missing or extra tensor below the head, a wrong shape or type: one message names all of them.
pub fn load(
    folder: &Path,
    dtype: FloatDType,
    device: &Device,
    num_labels: Option<usize>,
    seed: u64,
    progress: Progress<'_>,
) -> Result<(Classifier, Vec<String>), LoadError> {
    load_quantised(folder, dtype, &|_| None, device, num_labels, seed, progress)
}

/// As [`load`], with the weights of some linear layers packed.
///
/// # Errors
/// As [`load`]; a weight that is not finite, a format that does not exist.
pub fn load_quantised(
    folder: &Path,
    dtype: FloatDType,
    quantise: Quantise<'_>,
    device: &Device,
    num_labels: Option<usize>,
    seed: u64,
    progress: Progress<'_>,
) -> Result<(Classifier, Vec<String>), LoadError> {
    let config = ClassifierConfig::read(folder, num_labels)?;
    let checkpoint = Checkpoint::open(folder)?;
    let found = Found::look_up(&config, &checkpoint)?;
    let range = config.initializer_range;
    let classifier = build(config, dtype, quantise, device, progress, |spec, dtype| {
        Ok(match found.names.get(&spec.name) {
            Some(name) => tensor_data(&checkpoint, name, dtype)?,
            None => fresh(spec, seed, range, dtype),
        })
    })?;
    Ok((classifier, found.fresh))
}

/// A classifier that is random as a whole: normal with `initializer_range`, norms at their identity, biases zero.
///
/// # Errors
/// An unusable `config.json`.
pub fn random(
    folder: &Path,
    dtype: FloatDType,
    seed: u64,
    num_labels: Option<usize>,
    device: &Device,
) -> Result<Classifier, LoadError> {
    random_quantised(folder, dtype, &|_| None, seed, num_labels, device)
}

/// As [`random`], with the weights of some linear layers packed.
///
/// # Errors
/// As [`random`]; a format that does not exist.
pub fn random_quantised(
    folder: &Path,
    dtype: FloatDType,
    quantise: Quantise<'_>,
    seed: u64,
    num_labels: Option<usize>,
    device: &Device,
) -> Result<Classifier, LoadError> {
    let config = ClassifierConfig::read(folder, num_labels)?;
    let range = config.initializer_range;
    let values = |spec: &TensorSpec, dtype| Ok(fresh(spec, seed, range, dtype));
    build(config, dtype, quantise, device, &mut |_, _, _| {}, values)
}

fn fresh(spec: &TensorSpec, seed: u64, range: f64, dtype: FloatDType) -> TensorData {
    let count = spec.shape.iter().product::<usize>();
    let stream = Stream::new(seed, &spec.name);
    let normal = |deviation: f64| (0..count as u64).map(|i| (stream.normal(i) * deviation) as f32).collect();
    let values: Vec<f32> = match spec.start {
        Start::Normal => normal(range),
        Start::Deviation(deviation) => normal(deviation),
        Start::One => vec![1.0; count],
        Start::Zero => vec![0.0; count],
    };
    TensorData::new(values, spec.shape.clone()).convert_dtype(dtype.into())
}

/// Where the tensors of a model are in a checkpoint.
struct Found {
    /// Name in memory to name in the file.
    names: BTreeMap<String, String>,
    /// Tensors of the head that are not taken from the file.
    fresh: Vec<String>,
}

impl Found {
    fn look_up(config: &ClassifierConfig, checkpoint: &Checkpoint) -> Result<Self, HfError> {
        let (family, layout) = (config.family, config.layout());
        let in_file =
            |spec: &TensorSpec| names_on_disk(family, &spec.name).into_iter().find(|name| checkpoint.contains(name));
        let fits = |spec: &TensorSpec| {
            in_file(spec).is_some_and(|name| checkpoint.shape(&name) == Some(spec.shape.as_slice()))
        };
        let linear = layout.head.parts.iter().filter(|part| matches!(part.kind, Kind::Linear { .. }));
        let heads = linear.map(|part| part.tensors(&layout.head.name)).collect::<Vec<_>>();
        let fresh: Vec<TensorSpec> = heads.into_iter().filter(|tensors| !tensors.iter().all(fits)).flatten().collect();
        let mut names = BTreeMap::new();
        let mut expected = vec![];
        for spec in layout.tensors().into_iter().filter(|spec| !fresh.contains(spec)) {
            let name = in_file(&spec).unwrap_or_else(|| name_on_disk(family, &spec.name));
            expected.push((name.clone(), spec.shape));
            names.insert(spec.name, name);
        }
        let unused: BTreeSet<String> = fresh.iter().filter_map(in_file).collect();
        let is_ignorable =
            |name: &str| unused.contains(name) || family.ignorable.iter().any(|part| name.contains(part));
        checkpoint.check(&expected, is_ignorable)?;
        Ok(Self { names, fresh: fresh.into_iter().map(|spec| spec.name).collect() })
    }
}

/// The name that transformers writes a tensor under.
pub(super) fn name_on_disk(family: &ClassifierFamily, name: &str) -> String {
    family.renames.iter().fold(name.to_owned(), |name, (memory, disk)| name.replacen(memory, disk, 1))
}

/// Every name that a tensor may have in a file, the likeliest first.
pub(super) fn names_on_disk(family: &ClassifierFamily, name: &str) -> Vec<String> {
    let mut names = vec![name_on_disk(family, name), name.to_owned()];
    for index in 0..names.len() {
        let old = family.old_names.iter().fold(names[index].clone(), |name, (now, then)| name.replace(now, then));
        names.push(old);
    }
    // The trunk alone.
    let bare: Vec<String> =
        names.iter().filter_map(|name| name.strip_prefix(family.trunk)).map(str::to_owned).collect();
    names.extend(bare);
    names
}

/// Makes modules from the tensors that `next` gives.
struct Maker<'a, F> {
    next: F,
    dtype: FloatDType,
    quantise: Quantise<'a>,
    device: &'a Device,
    done: usize,
    total: usize,
    progress: Progress<'a>,
}

impl<F: FnMut(&TensorSpec, FloatDType) -> Result<TensorData, LoadError>> Maker<'_, F> {
    /// A tensor as it lies on disk.
    fn one(&mut self, spec: &TensorSpec, dtype: FloatDType) -> Result<TensorData, LoadError> {
        self.done += 1;
        (self.progress)(&spec.name, self.done, self.total);
        (self.next)(spec, dtype)
    }

    /// The tensors of a module, as they lie on disk.
    fn data(&mut self, segment: &Segment, part: &Part) -> Result<Vec<TensorData>, LoadError> {
        let dtype = self.dtype;
        part.tensors(&segment.name).iter().map(|spec| self.one(spec, dtype)).collect()
    }

    /// The modules of a segment that `make` makes something of.
    fn series<M>(
        &mut self,
        segment: &Segment,
        wanted: fn(&Kind) -> bool,
        make: impl Fn(&Kind, Vec<TensorData>, &Device) -> M,
    ) -> Result<Series<M>, LoadError> {
        let mut made = vec![];
        for part in segment.parts.iter().filter(|part| wanted(&part.kind)) {
            let data = self.data(segment, part)?;
            made.push((part.name.clone(), make(&part.kind, data, self.device)));
        }
        Ok(Series::new(made))
    }

    fn linear(&mut self, segment: &Segment) -> Result<Series<Projection>, LoadError> {
        let wanted = |kind: &Kind| matches!(kind, Kind::Linear { .. } | Kind::Patches { .. });
        self.series(segment, wanted, |kind, data, device| {
            let weight = matrix(kind, data[0].clone(), device).transpose();
            Projection::frozen(weight, data.get(1).map(|bias| tensor(bias.clone(), device)))
        })
    }

    /// The linear layers of a block, packed where that is wanted.
    fn packable(&mut self, segment: &Segment) -> Result<Series<Projection>, LoadError> {
        let mut made = vec![];
        for part in &segment.parts {
            let Kind::Linear { d_in, d_out, .. } = part.kind else { continue };
            let tensors = part.tensors(&segment.name);
            let weight = match (self.quantise)(&join(&segment.name, &part.name)) {
                Some(form) => Base::Packed(self.packed(&tensors[0], [d_in, d_out], form)?),
                None => Base::dense(tensor::<2>(self.one(&tensors[0], self.dtype)?, self.device).transpose()),
            };
            let bias = tensors.get(1).map(|spec| self.one(spec, self.dtype)).transpose()?;
            made.push((part.name.clone(), Projection::on(weight, bias.map(|bias| tensor(bias, self.device)))));
        }
        Ok(Series::new(made))
    }

    fn packed(&mut self, spec: &TensorSpec, dims: [usize; 2], form: Quantisation) -> Result<PackedBase, LoadError> {
        let data = self.one(spec, FloatDType::F32)?;
        let values = data.try_into_vec::<f32>().unwrap_or_else(|_| unreachable!("f32 was asked for"));
        let packed = form.pack(&values, dims, self.device);
        let weight = packed.map_err(|source| LoadError::Quantise { name: spec.name.clone(), source })?;
        Ok(PackedBase::frozen(weight, form, self.dtype))
    }

    fn norms(&mut self, segment: &Segment) -> Result<Series<LayerNorm>, LoadError> {
        self.series(
            segment,
            |kind| matches!(kind, Kind::Norm { .. }),
            |_, data, device| {
                let [weight, bias] = [0, 1].map(|index| tensor(data[index].clone(), device));
                LayerNorm::frozen(weight, bias)
            },
        )
    }

    fn tables(&mut self, segment: &Segment) -> Result<Series<Embedding>, LoadError> {
        self.series(
            segment,
            |kind| matches!(kind, Kind::Table { .. }),
            |_, data, device| Embedding {
                weight: Param::from_tensor(tensor(data[0].clone(), device)).set_require_grad(false),
                delta: None,
            },
        )
    }

    fn tokens(&mut self, segment: &Segment) -> Result<Series<Param<Tensor<3>>>, LoadError> {
        self.series(
            segment,
            |kind| matches!(kind, Kind::Tokens { .. }),
            |_, data, device| Param::from_tensor(tensor(data[0].clone(), device)).set_require_grad(false),
        )
    }

    fn convolutions(&mut self, segment: &Segment) -> Result<Series<ConvProjection>, LoadError> {
        self.series(
            segment,
            |kind| matches!(kind, Kind::Conv { .. }),
            |kind, data, device| {
                let conv = ConvProjection::frozen(tensor(data[0].clone(), device), None);
                match *kind {
                    Kind::Conv { kernel, stride, .. } => {
                        ConvProjection { stride: [stride; 2], padding: [kernel / 2; 2], ..conv }
                    }
                    _ => conv,
                }
            },
        )
    }

    fn batch_norms(&mut self, segment: &Segment) -> Result<Series<BatchNorm>, LoadError> {
        self.series(
            segment,
            |kind| matches!(kind, Kind::BatchNorm { .. }),
            |_, data, device| BatchNorm::frozen([0, 1, 2, 3].map(|index| tensor(data[index].clone(), device))),
        )
    }

    fn stem(&mut self, trunk: &Trunk, segment: &Segment) -> Result<Stem, LoadError> {
        Ok(match trunk {
            Trunk::Text(_) => Stem::Text(TextStem { tables: self.tables(segment)?, norms: self.norms(segment)? }),
            Trunk::Patches(_) => {
                Stem::Patches(PatchStem { tokens: self.tokens(segment)?, linear: self.linear(segment)? })
            }
            Trunk::Conv(_) => {
                let norms = self.batch_norms(segment)?;
                Stem::Conv(ConvStem { convolutions: self.convolutions(segment)?, norms })
            }
        })
    }

    fn block(&mut self, trunk: &Trunk, segment: &Segment) -> Result<Block, LoadError> {
        Ok(match trunk {
            Trunk::Conv(_) => {
                let norms = self.batch_norms(segment)?;
                Block::Residual(ResidualBlock { convolutions: self.convolutions(segment)?, norms })
            }
            Trunk::Text(_) | Trunk::Patches(_) => {
                Block::Encoder(EncoderBlock { linear: self.packable(segment)?, norms: self.norms(segment)? })
            }
        })
    }
}

/// A linear weight as it lies on disk, `[d_out, d_in]`; the kernel of patches as the matrix it is.
fn matrix(kind: &Kind, data: TensorData, device: &Device) -> Tensor<2> {
    match kind {
        Kind::Patches { patch, d_out } => tensor::<4>(data, device).reshape([*d_out, patch.iter().product::<usize>()]),
        _ => tensor(data, device),
    }
}

/// Builds the modules, asking `next` for every tensor.
fn build(
    config: ClassifierConfig,
    dtype: FloatDType,
    quantise: Quantise<'_>,
    device: &Device,
    progress: Progress<'_>,
    next: impl FnMut(&TensorSpec, FloatDType) -> Result<TensorData, LoadError>,
) -> Result<Classifier, LoadError> {
    let layout: Layout = config.layout();
    let total = layout.tensors().len();
    let mut maker = Maker { next, dtype, quantise, device, done: 0, total, progress };
    let stem = maker.stem(&config.trunk, &layout.stem)?;
    let mut blocks = vec![];
    for segment in &layout.blocks {
        blocks.push((segment.name.clone(), maker.block(&config.trunk, segment)?));
    }
    let head = Head { norms: maker.norms(&layout.head)?, linear: maker.linear(&layout.head)? };
    Ok(Classifier {
        stem: Series::new(vec![(layout.stem.name.clone(), stem)]),
        blocks: Series::new(blocks),
        head,
        config: Arc::new(config),
        compute: dtype,
    })
}
