//! Classification of texts and images: a trunk (BERT, RoBERTa, ViT, ResNet), a head, and a loss for each row of a batch.
//!
//! One [`Classifier`] runs all families. What a family consists of is its [`layout`]; parameters have the names that modules
//! have in transformers 5, which are also those that adapters use. Names on disk are in the family's row of
//! [`config::registry`].

pub mod batch;
pub mod config;
pub mod layout;
mod load;
mod network;
mod save;

use std::sync::Arc;

use burn::tensor::{Device, FloatDType, Tensor};
use lowrank_core::Projection;

pub use batch::{ClassifierBatch, ClassifierInputs, Input, Labels};
pub use config::{ClassifierConfig, Trunk};
pub use load::{load, load_quantised, random, random_quantised};
pub use save::{save, tensors};

use crate::bert::TextStem;
use crate::convnet::{self, BatchNorm, ConvStem, ResidualBlock};
use crate::encoder::{EncoderBlock, LayerNorm, dropped};
use crate::network::Network;
use crate::series::{Series, transparent};
use crate::vit::PatchStem;

/// From the input to the first hidden state.
#[allow(clippy::large_enum_variant)] // one a model
#[derive(burn::module::Module, Debug)]
pub enum Stem {
    /// Of texts.
    Text(TextStem),
    /// Of images as patches.
    Patches(PatchStem),
    /// Of images as a whole.
    Conv(ConvStem),
}

/// From one hidden state to the next.
#[derive(burn::module::Module, Debug)]
pub enum Block {
    /// Attention and a feed-forward layer.
    Encoder(EncoderBlock),
    /// Convolutions.
    Residual(ResidualBlock),
}

/// From rows of the last hidden state to logits: perhaps a norm, perhaps a linear map with tanh, and the map to the classes.
#[derive(Clone, Debug, Default)]
pub struct Head {
    /// The last norm of ViT.
    pub norms: Series<LayerNorm>,
    /// Linear maps, that to the classes last.
    pub linear: Series<Projection>,
}

transparent!(Head { norms, linear });

/// A classifier with its configuration.
#[derive(Clone, Debug)]
pub struct Classifier {
    /// One stem.
    pub stem: Series<Stem>,
    /// Blocks in order.
    pub blocks: Series<Block>,
    /// The head.
    pub head: Head,
    /// Sizes and switches.
    pub config: Arc<ClassifierConfig>,
    /// Type of the activations.
    pub compute: FloatDType,
}

transparent!(Classifier { stem, blocks, head });

impl Head {
    /// Logits `[n, classes]` of rows `x [n, hidden]`.
    pub fn forward(&self, x: Tensor<2>, config: &ClassifierConfig, training: bool) -> Tensor<2> {
        let x = match &config.trunk {
            Trunk::Conv(_) => convnet::pooled(x, self.linear[0].dims()[0]),
            _ => x,
        };
        let eps = config.encoder().map_or(0.0, |encoder| encoder.norm_eps);
        let mut x = self.norms.items().iter().fold(x, |x, norm| norm.forward(x, eps));
        if let Trunk::Text(text) = &config.trunk {
            if text.two_layer_head {
                x = dropped(x, config.head_dropout, training);
            }
            x = self.linear[0].forward(x, training).tanh();
        }
        let x = dropped(x, config.head_dropout, training);
        self.linear[self.linear.len() - 1].forward(x, training)
    }
}

impl Classifier {
    /// The device of the parameters.
    pub fn device(&self) -> Device {
        self.head.linear[0].device()
    }

    /// Number of classes; 1 for regression.
    pub fn num_labels(&self) -> usize {
        self.config.labels.len()
    }

    /// Gives the classes other names, of the same number.
    ///
    /// # Panics
    /// For another number of names.
    pub fn set_labels(&mut self, labels: Vec<String>) {
        assert_eq!(labels.len(), self.num_labels(), "one name for each class");
        Arc::make_mut(&mut self.config).labels = labels;
    }

    /// Values of the checkpoint that are no parameters, with their names: the statistics of batch norms.
    pub fn buffers(&self) -> Vec<(String, Tensor<1>)> {
        let mut buffers = vec![];
        let mut add = |segment: &str, norms: &Series<BatchNorm>| {
            for (name, norm) in norms.iter() {
                buffers.push((format!("{segment}.{name}.running_mean"), norm.running_mean.clone()));
                buffers.push((format!("{segment}.{name}.running_var"), norm.running_var.clone()));
            }
        };
        for (segment, stem) in self.stem.iter() {
            if let Stem::Conv(stem) = stem {
                add(segment, &stem.norms);
            }
        }
        for (segment, block) in self.blocks.iter() {
            if let Block::Residual(block) = block {
                add(segment, &block.norms);
            }
        }
        buffers
    }

    /// Logits of every row of a batch, `[rows, classes]` in f32, without a tape.
    pub fn logits(&self, batch: &ClassifierBatch) -> Tensor<2> {
        let inputs = self.inputs(batch);
        let hidden = self.last_hidden(&inputs);
        let rows: Vec<i32> = (0..inputs.grid.rows).map(|row| (row * inputs.grid.cols) as i32).collect();
        let x = hidden.select(0, crate::network::integers(&rows, &self.device()));
        self.head.forward(x, &self.config, false).cast(FloatDType::F32)
    }

    /// The first hidden state and those after each block, `[rows * columns, hidden]`, without a tape.
    pub fn hidden_states(&self, batch: &ClassifierBatch) -> Vec<Tensor<2>> {
        let inputs = self.inputs(batch);
        let mut states = vec![self.run_stem(self.stem(), &inputs, false)];
        for (index, block) in self.blocks.items().iter().enumerate() {
            states.push(self.run_block(index, block, states[index].clone(), &inputs, false));
        }
        states
    }
}
