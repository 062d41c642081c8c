//! ViT (arXiv 2010.11929) for the classification of images: patches as tokens behind a class token.
//!
//! The patch embedding is a linear map of the unfolded pixels of a patch; on disk it is the weight of a convolution whose step
//! is its size. The head is the last norm and a linear map of the class token's row.

use burn::module::Param;
use burn::tensor::{FloatDType, Tensor};
use lowrank_core::Projection;
use lowrank_core::lowrank::cast;

use crate::bert::block_parts;
use crate::classifier::batch::InputData;
use crate::classifier::config::Trunk;
use crate::classifier::layout::{Kind, Layout, Part, Segment};
use crate::config::{ConfigError, Keys, MAX_SIZE};
use crate::encoder::{BlockNames, EncoderConfig, dropped};
use crate::series::{Series, transparent};

/// Files have the names of the first release; transformers 5 has others in memory, and adapters use those.
pub(crate) const RENAMES: &[(&str, &str)] = &[
    ("vit.layers.", "vit.encoder.layer."),
    (".attention.q_proj.", ".attention.attention.query."),
    (".attention.k_proj.", ".attention.attention.key."),
    (".attention.v_proj.", ".attention.attention.value."),
    (".attention.o_proj.", ".attention.output.dense."),
    (".mlp.fc1.", ".intermediate.dense."),
    (".mlp.fc2.", ".output.dense."),
];

const BLOCK: BlockNames = BlockNames {
    linear: ["attention.q_proj", "attention.k_proj", "attention.v_proj", "attention.o_proj", "mlp.fc1", "mlp.fc2"],
    norms: ["layernorm_before", "layernorm_after"],
};

/// Sizes and switches of a ViT.
#[derive(Debug, Clone, PartialEq)]
pub struct PatchConfig {
    /// The blocks.
    pub encoder: EncoderConfig,
    /// Height and width of an image.
    pub image_size: [usize; 2],
    /// Height and width of a patch; divide those of the image.
    pub patch_size: [usize; 2],
    /// Colour channels.
    pub channels: usize,
}

pub(crate) fn read(keys: &Keys<'_>) -> Result<Trunk, ConfigError> {
    let (image_size, patch_size) = (sides(keys, "image_size", 224)?, sides(keys, "patch_size", 16)?);
    if !(0..2).all(|axis| image_size[axis].is_multiple_of(patch_size[axis])) {
        let expected = format!("a divisor of image_size ({image_size:?})");
        return Err(keys.invalid("patch_size", expected, format!("{patch_size:?}")));
    }
    Ok(Trunk::Patches(PatchConfig {
        encoder: EncoderConfig::read(keys, true)?,
        image_size,
        patch_size,
        channels: keys.size("num_channels", MAX_SIZE)?.unwrap_or(3),
    }))
}

/// Longest side of an image.
const MAX_SIDE: usize = 1 << 16;

/// Height and width: two numbers, or one for both.
fn sides(keys: &Keys<'_>, key: &str, default: usize) -> Result<[usize; 2], ConfigError> {
    match keys.sizes(key, MAX_SIDE)?.as_deref() {
        None => Ok([default; 2]),
        Some([side]) => Ok([*side; 2]),
        Some([height, width]) => Ok([*height, *width]),
        Some(other) => Err(keys.invalid(key, "one number, or height and width", format!("{other:?}"))),
    }
}

impl PatchConfig {
    /// Patches of an image.
    pub fn num_patches(&self) -> usize {
        let [rows, cols] = self.patch_grid();
        rows * cols
    }

    fn patch_grid(&self) -> [usize; 2] {
        [self.image_size[0] / self.patch_size[0], self.image_size[1] / self.patch_size[1]]
    }

    /// The modules of the model.
    pub fn layout(&self, labels: usize) -> Layout {
        let width = self.encoder.hidden_size;
        let [height, breadth] = self.patch_size;
        let block =
            |index: usize| Segment { name: format!("vit.layers.{index}"), parts: block_parts(&BLOCK, &self.encoder) };
        let tokens = |name: &str, rows: usize| Part::new(name, Kind::Tokens { rows, width });
        Layout {
            stem: Segment {
                name: "vit.embeddings".to_owned(),
                parts: vec![
                    tokens("cls_token", 1),
                    tokens("position_embeddings", self.num_patches() + 1),
                    Part::new(
                        "patch_embeddings.projection",
                        Kind::Patches { patch: [self.channels, height, breadth], d_out: width },
                    ),
                ],
            },
            blocks: (0..self.encoder.num_layers).map(block).collect(),
            head: Segment {
                name: String::new(),
                parts: vec![
                    Part::new("vit.layernorm", Kind::Norm { width }),
                    Part::new("classifier", Kind::Linear { d_in: width, d_out: labels, bias: true }),
                ],
            },
        }
    }
}

/// Patches, the class token and positions.
#[derive(Clone, Debug, Default)]
pub struct PatchStem {
    /// Class token `[1, 1, hidden]`, positions `[1, patches + 1, hidden]`.
    pub tokens: Series<Param<Tensor<3>>>,
    /// Pixels of a patch to its token, `[channels * height * width, hidden]`.
    pub linear: Series<Projection>,
}

transparent!(PatchStem { tokens, linear });

impl PatchStem {
    /// The first hidden state, `[rows * (patches + 1), hidden]`.
    pub fn forward(&self, data: &InputData, config: &PatchConfig, dtype: FloatDType, training: bool) -> Tensor<2> {
        let InputData::Image(pixels) = data else { unreachable!("an image model is given images") };
        let (hidden, patches) = (config.encoder.hidden_size, config.num_patches());
        let rows = pixels.dims()[0];
        let x = self.linear[0].forward(unfold(pixels.clone(), config), training).reshape([rows, patches, hidden]);
        let class = cast(self.tokens[0].val(), dtype).expand([rows, 1, hidden]);
        let x = Tensor::cat(vec![class, x], 1) + cast(self.tokens[1].val(), dtype);
        dropped(x.reshape([rows * (patches + 1), hidden]), config.encoder.dropout, training)
    }
}

/// `[rows, channels, height, width]` to the pixels of each patch, `[rows * patches, channels * patch height * patch width]`.
fn unfold(pixels: Tensor<4>, config: &PatchConfig) -> Tensor<2> {
    let [rows, channels, _, _] = pixels.dims();
    let ([down, across], [height, width]) = (config.patch_grid(), config.patch_size);
    pixels
        .reshape([rows, channels, down, height, across, width])
        .permute([0, 2, 4, 1, 3, 5])
        .reshape([rows * down * across, channels * height * width])
}
