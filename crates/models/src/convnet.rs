//! ResNet (arXiv 1512.03385) for the classification of images, in the layout of transformers' `ResNetForImageClassification`.
//!
//! Batch norms act as in inference, always: `y = (x - mean) / sqrt(var + eps) * weight + bias` with the mean and variance of the
//! checkpoint, which training never changes. So a batch's images do not see each other, and what is trained is what is
//! evaluated. Gain and shift can be trained.
//!
//! Hidden states are matrices, one image a row: `[images, channels * height * width]`. The head takes the mean over positions.

use burn::module::{Module, Param};
use burn::tensor::activation::relu;
use burn::tensor::module::max_pool2d;
use burn::tensor::ops::MaxPoolOptions;
use burn::tensor::{FloatDType, Tensor};
use lowrank_core::conv::ConvProjection;
use lowrank_core::lowrank::cast;

use crate::classifier::batch::InputData;
use crate::classifier::config::Trunk;
use crate::classifier::layout::{Kind, Layout, Part, Segment};
use crate::config::{ConfigError, Keys, MAX_SIZE};
use crate::series::{Series, transparent};

/// Added to the variance.
const EPS: f64 = 1e-5;

/// A bottleneck is narrower than its block by this factor.
const REDUCTION: usize = 4;

/// Sizes and switches of a ResNet.
#[derive(Debug, Clone, PartialEq)]
pub struct ConvConfig {
    /// Colour channels.
    pub channels: usize,
    /// Channels behind the stem.
    pub embedding_size: usize,
    /// Channels of each stage.
    pub hidden_sizes: Vec<usize>,
    /// Blocks of each stage.
    pub depths: Vec<usize>,
    /// Blocks of three convolutions, the middle one narrow; otherwise of two.
    pub bottleneck: bool,
    /// The first stage halves height and width too.
    pub downsample_in_first_stage: bool,
    /// A bottleneck halves them in its first convolution, not in its second.
    pub downsample_in_bottleneck: bool,
}

pub(crate) fn read(keys: &Keys<'_>) -> Result<Trunk, ConfigError> {
    if !matches!(keys.text("hidden_act")?, None | Some("relu")) {
        return Err(keys.unsupported("hidden_act", "\"relu\"", "use a ResNet with the usual activation"));
    }
    let bottleneck = match keys.text("layer_type")? {
        None | Some("bottleneck") => true,
        Some("basic") => false,
        Some(other) => return Err(keys.invalid("layer_type", "basic or bottleneck", format!("{other:?}"))),
    };
    let list = |key: &str, default: [usize; 4]| Ok(keys.sizes(key, MAX_SIZE)?.unwrap_or(default.to_vec()));
    let (hidden_sizes, depths) = (list("hidden_sizes", [256, 512, 1024, 2048])?, list("depths", [3, 4, 6, 3])?);
    if depths.len() != hidden_sizes.len() || depths.iter().sum::<usize>() > MAX_BLOCKS {
        let expected = format!("one number for each of the {} hidden_sizes, {MAX_BLOCKS} in all", hidden_sizes.len());
        return Err(keys.invalid("depths", expected, format!("{depths:?}")));
    }
    if bottleneck && !hidden_sizes.iter().all(|size| size.is_multiple_of(REDUCTION)) {
        return Err(keys.invalid("hidden_sizes", "multiples of 4 for bottlenecks", format!("{hidden_sizes:?}")));
    }
    Ok(Trunk::Conv(ConvConfig {
        channels: keys.size("num_channels", MAX_SIZE)?.unwrap_or(3),
        embedding_size: keys.size("embedding_size", MAX_SIZE)?.unwrap_or(64),
        hidden_sizes,
        depths,
        bottleneck,
        downsample_in_first_stage: keys.flag("downsample_in_first_stage")?.unwrap_or(false),
        downsample_in_bottleneck: keys.flag("downsample_in_bottleneck")?.unwrap_or(false),
    }))
}

/// Bounds what an absurd file can make us allocate before the first tensor is looked at.
const MAX_BLOCKS: usize = 10_000;

/// Where a block stands and what it does to the sizes.
struct Step {
    stage: usize,
    layer: usize,
    d_in: usize,
    d_out: usize,
    stride: usize,
}

impl ConvConfig {
    fn steps(&self) -> Vec<Step> {
        let mut steps = vec![];
        let mut d_in = self.embedding_size;
        for (stage, (&d_out, &depth)) in self.hidden_sizes.iter().zip(&self.depths).enumerate() {
            for layer in 0..depth {
                let halves = layer == 0 && (stage > 0 || self.downsample_in_first_stage);
                steps.push(Step { stage, layer, d_in, d_out, stride: if halves { 2 } else { 1 } });
                d_in = d_out;
            }
        }
        steps
    }

    /// Channels, height and width of the input of every block, and of the last one's output, for images of this size.
    pub fn shapes(&self, height: usize, width: usize) -> Vec<[usize; 3]> {
        let halved = |side: usize| (side - 1) / 2 + 1;
        // The stem's convolution and its pooling.
        let mut shape = [self.embedding_size, halved(halved(height)), halved(halved(width))];
        let mut shapes = vec![shape];
        for step in self.steps() {
            let [_, height, width] = shape;
            let side = |side: usize| if step.stride == 2 { halved(side) } else { side };
            shape = [step.d_out, side(height), side(width)];
            shapes.push(shape);
        }
        shapes
    }

    /// The modules of the model.
    pub fn layout(&self, labels: usize) -> Layout {
        let last = self.hidden_sizes[self.hidden_sizes.len() - 1];
        let stem = conv_and_norm("embedder", self.channels, self.embedding_size, 7, 2);
        let block = |step: Step| Segment {
            name: format!("resnet.encoder.stages.{}.layers.{}", step.stage, step.layer),
            parts: self.block_parts(&step),
        };
        Layout {
            stem: Segment { name: "resnet.embedder".to_owned(), parts: stem.into() },
            blocks: self.steps().into_iter().map(block).collect(),
            head: Segment {
                name: String::new(),
                parts: vec![Part::new("classifier.1", Kind::Linear { d_in: last, d_out: labels, bias: true })],
            },
        }
    }

    /// The convolutions of a block in order, then that of its shortcut.
    fn block_parts(&self, &Step { d_in, d_out, stride, .. }: &Step) -> Vec<Part> {
        let narrow = d_out / REDUCTION;
        let (first, second) = if self.downsample_in_bottleneck { (stride, 1) } else { (1, stride) };
        let convolutions = match self.bottleneck {
            true => vec![(d_in, narrow, 1, first), (narrow, narrow, 3, second), (narrow, d_out, 1, 1)],
            false => vec![(d_in, d_out, 3, stride), (d_out, d_out, 3, 1)],
        };
        let mut parts = vec![];
        for (index, (d_in, d_out, kernel, stride)) in convolutions.into_iter().enumerate() {
            parts.extend(conv_and_norm(&format!("layer.{index}"), d_in, d_out, kernel, stride));
        }
        if d_in != d_out || stride != 1 {
            parts.extend(conv_and_norm("shortcut", d_in, d_out, 1, stride));
        }
        parts
    }

    /// Convolutions of a block beside its shortcut.
    fn depth(&self) -> usize {
        if self.bottleneck { 3 } else { 2 }
    }
}

fn conv_and_norm(name: &str, d_in: usize, d_out: usize, kernel: usize, stride: usize) -> [Part; 2] {
    [
        Part::new(format!("{name}.convolution"), Kind::Conv { d_in, d_out, kernel, stride }),
        Part::new(format!("{name}.normalization"), Kind::BatchNorm { width: d_out }),
    ]
}

/// A batch norm that acts as in inference.
#[derive(Module, Debug)]
pub struct BatchNorm {
    /// Gain, `[channels]`.
    pub weight: Param<Tensor<1>>,
    /// Shift, `[channels]`.
    pub bias: Param<Tensor<1>>,
    /// Mean of each channel; no parameter.
    pub running_mean: Tensor<1>,
    /// Variance of each channel; no parameter.
    pub running_var: Tensor<1>,
}

impl BatchNorm {
    /// A frozen norm: gain, shift, mean, variance.
    pub fn frozen([weight, bias, running_mean, running_var]: [Tensor<1>; 4]) -> Self {
        let frozen = |values| Param::from_tensor(values).set_require_grad(false);
        Self { weight: frozen(weight), bias: frozen(bias), running_mean, running_var }
    }

    /// `x [n, channels, height, width]` to the same shape and type.
    pub fn forward(&self, x: Tensor<4>) -> Tensor<4> {
        let dtype: FloatDType = x.dtype().into();
        let [mean, var] = [&self.running_mean, &self.running_var].map(|values| cast(values.clone(), FloatDType::F32));
        let [weight, bias] = [&self.weight, &self.bias].map(|values| cast(values.val(), FloatDType::F32));
        let scale = weight * (var + EPS).sqrt().recip();
        let shift = bias - mean * scale.clone();
        let channels = x.dims()[1];
        let [scale, shift] = [scale, shift].map(|values| cast(values.reshape([1, channels, 1, 1]), dtype));
        x * scale + shift
    }
}

/// The first convolution with its norm; the pooling behind it has no parameters.
#[derive(Clone, Debug, Default)]
pub struct ConvStem {
    /// One convolution.
    pub convolutions: Series<ConvProjection>,
    /// Its norm.
    pub norms: Series<BatchNorm>,
}

transparent!(ConvStem { convolutions, norms });

impl ConvStem {
    /// The first hidden state.
    pub fn forward(&self, data: &InputData, training: bool) -> Tensor<2> {
        let InputData::Image(pixels) = data else { unreachable!("an image model is given images") };
        let x = relu(self.norms[0].forward(self.convolutions[0].forward(pixels.clone(), training)));
        let options = MaxPoolOptions::new([3, 3]).with_stride([2, 2]).with_padding([1, 1]);
        flat(max_pool2d(x, options))
    }
}

/// A residual block: convolutions with their norms, and a shortcut that fits the sizes where they change.
#[derive(Clone, Debug, Default)]
pub struct ResidualBlock {
    /// In order, then that of the shortcut.
    pub convolutions: Series<ConvProjection>,
    /// The norm of each.
    pub norms: Series<BatchNorm>,
}

transparent!(ResidualBlock { convolutions, norms });

impl ResidualBlock {
    /// `x [n, channels * height * width]` of this shape through the block.
    pub fn forward(
        &self,
        x: Tensor<2>,
        [channels, height, width]: [usize; 3],
        config: &ConvConfig,
        training: bool,
    ) -> Tensor<2> {
        let rows = x.dims()[0];
        let x = x.reshape([rows, channels, height, width]);
        let step =
            |index: usize, x: Tensor<4>| self.norms[index].forward(self.convolutions[index].forward(x, training));
        let depth = config.depth();
        let straight = (0..depth).fold(x.clone(), |x, index| {
            let x = step(index, x);
            if index + 1 < depth { relu(x) } else { x }
        });
        let shortcut = if self.convolutions.len() > depth { step(depth, x) } else { x };
        flat(relu(straight + shortcut))
    }
}

fn flat(x: Tensor<4>) -> Tensor<2> {
    let [rows, channels, height, width] = x.dims();
    x.reshape([rows, channels * height * width])
}

/// The mean over the positions of each channel, `[n, channels]`.
pub(crate) fn pooled(x: Tensor<2>, channels: usize) -> Tensor<2> {
    let [rows, values] = x.dims();
    x.reshape([rows, channels, values / channels]).mean_dim(2).reshape([rows, channels])
}
