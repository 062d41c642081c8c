//! A [`Classifier`] as the trainer sees it.

use burn::tensor::{Device, FloatDType, Gradients, Tensor};
use lowrank_core::conv::ConvProjection;
use lowrank_core::lowrank::cast;
use lowrank_core::{Layer, Projection};
use lowrank_kernels as kernels;

use super::batch::{ClassifierBatch, ClassifierInputs, InputData, Labels};
use super::{Block, Classifier, Head, Stem, Trunk, load};
use crate::bert::TextConfig;
use crate::decoder::Embedding;
use crate::network::{self, Network, NetworkBatch, Replace, Segment};
use crate::parameters::{self, Named};
use crate::series::Series;
use crate::vit::PatchConfig;

impl NetworkBatch for ClassifierBatch {
    fn target_count(&self) -> usize {
        ClassifierBatch::target_count(self)
    }

    fn token_count(&self) -> usize {
        ClassifierBatch::token_count(self)
    }

    fn records(&self) -> &[u64] {
        &self.records
    }
}

impl Network for Classifier {
    type Stem = Stem;
    type Block = Block;
    type Head = Head;
    type Batch = ClassifierBatch;
    type Inputs = ClassifierInputs;

    fn device(&self) -> Device {
        Classifier::device(self)
    }

    fn hidden_size(&self) -> usize {
        self.head.linear[0].dims()[0]
    }

    fn inputs(&self, batch: &ClassifierBatch) -> ClassifierInputs {
        ClassifierInputs::new(batch, &self.config, self.compute, &Classifier::device(self))
    }

    fn stem(&self) -> &Stem {
        &self.stem[0]
    }

    fn run_stem(&self, stem: &Stem, inputs: &ClassifierInputs, training: bool) -> Tensor<2> {
        match (stem, &self.config.trunk) {
            (Stem::Text(stem), Trunk::Text(config)) => {
                stem.forward(&inputs.data, &config.encoder, self.compute, training)
            }
            (Stem::Patches(stem), Trunk::Patches(config)) => stem.forward(&inputs.data, config, self.compute, training),
            (Stem::Conv(stem), Trunk::Conv(_)) => stem.forward(&inputs.data, training),
            _ => unreachable!("stem and configuration are of one family"),
        }
    }

    fn blocks(&self) -> &[Block] {
        self.blocks.items()
    }

    fn run_block(
        &self,
        index: usize,
        block: &Block,
        x: Tensor<2>,
        inputs: &ClassifierInputs,
        training: bool,
    ) -> Tensor<2> {
        match (block, &self.config.trunk, &inputs.data) {
            (Block::Residual(block), Trunk::Conv(config), InputData::Image(pixels)) => {
                let [_, _, height, width] = pixels.dims();
                block.forward(x, config.shapes(height, width)[index], config, training)
            }
            (Block::Encoder(block), Trunk::Text(TextConfig { encoder, .. }), _)
            | (Block::Encoder(block), Trunk::Patches(PatchConfig { encoder, .. }), _) => {
                block.forward(x, &inputs.grid, encoder, training)
            }
            _ => unreachable!("block and configuration are of one family"),
        }
    }

    fn head(&self) -> Head {
        self.head.clone()
    }

    /// The first row of every sequence that has a label: the class token's.
    fn counted(&self, batch: &ClassifierBatch) -> Vec<i32> {
        let cols = columns(self, batch);
        batch.labels.counted().into_iter().map(|row| (row * cols) as i32).collect()
    }

    /// Cross-entropy of classes, squared errors of values.
    fn losses(&self, head: &Head, x: Tensor<2>, rows: &[i32], batch: &ClassifierBatch, training: bool) -> Tensor<1> {
        let cols = columns(self, batch);
        let logits = head.forward(x, &self.config, training);
        let device = Classifier::device(self);
        let sequences = rows.iter().map(|&row| row as usize / cols);
        match &batch.labels {
            Labels::Classes(classes) => {
                let targets: Vec<i32> = sequences.map(|sequence| classes[sequence]).collect();
                kernels::cross_entropy(logits, network::integers(&targets, &device), 0.0)
            }
            Labels::Values(values) => {
                let targets: Vec<f32> = sequences.map(|sequence| values[sequence]).collect();
                let targets = Tensor::<1>::from_floats(targets.as_slice(), &logits.device());
                let error = cast(logits, FloatDType::F32).reshape([rows.len()]) - targets;
                error.clone() * error
            }
        }
    }

    fn default_head_chunk(&self) -> usize {
        network::head_chunk(self.num_labels().max(self.hidden_size()))
    }

    fn stem_name(&self) -> String {
        self.stem.name(0).to_owned()
    }

    fn block_name(&self, index: usize) -> String {
        self.blocks.name(index).to_owned()
    }

    fn map_stem(&mut self, replace: Replace<'_>) {
        self.stem.replace(0, |name, stem| parameters::map(stem, name, replace));
    }

    fn map_block(&mut self, index: usize, replace: Replace<'_>) {
        self.blocks.replace(index, |name, block| parameters::map(block, name, replace));
    }

    fn map_head(&mut self, replace: Replace<'_>) {
        self.head = parameters::map(std::mem::take(&mut self.head), "", replace);
    }

    fn projections(block: &Block) -> Vec<(String, &Projection)> {
        match block {
            Block::Encoder(block) => owned(block.linear.iter()),
            Block::Residual(_) => vec![],
        }
    }

    fn projections_mut(block: &mut Block) -> Vec<(String, &mut Projection)> {
        match block {
            Block::Encoder(block) => owned(block.linear.iter_mut()),
            Block::Residual(_) => vec![],
        }
    }

    fn head_projections(head: &Head) -> Vec<(String, &Projection)> {
        owned(head.linear.iter())
    }

    fn head_projections_mut(head: &mut Head) -> Vec<(String, &mut Projection)> {
        owned(head.linear.iter_mut())
    }

    fn take_head_gradients(head: &Head, gradients: &mut Gradients, into: &mut Named) {
        parameters::take_gradients(head, "", gradients, into);
    }

    fn for_each_layer(&mut self, change: &mut dyn FnMut(&str, Layer<'_>)) {
        for (segment, stem) in self.stem.iter_mut() {
            if let Stem::Conv(stem) = stem {
                let layers = stem.convolutions.iter_mut();
                layers.for_each(|(name, conv)| change(&format!("{segment}.{name}"), Layer::Conv(conv)));
            }
        }
        for (segment, block) in self.blocks.iter_mut() {
            match block {
                Block::Encoder(block) => {
                    let layers = block.linear.iter_mut();
                    layers.for_each(|(name, linear)| change(&format!("{segment}.{name}"), Layer::Linear(linear)));
                }
                Block::Residual(block) => {
                    let layers = block.convolutions.iter_mut();
                    layers.for_each(|(name, conv)| change(&format!("{segment}.{name}"), Layer::Conv(conv)));
                }
            }
        }
        self.head.linear.iter_mut().for_each(|(name, linear)| change(name, Layer::Linear(linear)));
    }

    fn names_on_disk(&self) -> Box<dyn Fn(&str) -> Vec<String>> {
        let family = self.config.family;
        Box::new(move |name| load::names_on_disk(family, name))
    }

    fn embedding_name(&self) -> Option<&'static str> {
        match &self.config.trunk {
            Trunk::Text(config) => Some(config.embedding()),
            _ => None,
        }
    }

    fn embedding(&mut self) -> Option<(&'static str, &mut Embedding)> {
        match (&mut self.stem[0], &self.config.trunk) {
            (Stem::Text(stem), Trunk::Text(config)) => Some((config.embedding(), &mut stem.tables[0])),
            _ => None,
        }
    }

    fn has_dropout(&self, segment: Segment) -> bool {
        let own = self.config.encoder().map_or(0.0, |encoder| encoder.dropout);
        let adapters = |projections: Vec<(String, &Projection)>| projections.iter().any(|(_, p)| p.dropout() > 0.0);
        match segment {
            Segment::Stem => own > 0.0 || matches!(&self.stem[0], Stem::Conv(stem) if conv_dropout(&stem.convolutions)),
            Segment::Block(index) => match &self.blocks[index] {
                Block::Encoder(_) => own > 0.0 || adapters(Self::projections(&self.blocks[index])),
                Block::Residual(block) => conv_dropout(&block.convolutions),
            },
            Segment::Head => self.config.head_dropout > 0.0 || adapters(Self::head_projections(&self.head)),
        }
    }
}

/// Whether an adapter of these convolutions draws random numbers in training.
fn conv_dropout(convolutions: &Series<ConvProjection>) -> bool {
    convolutions.items().iter().any(|conv| conv.delta.as_ref().is_some_and(|delta| delta.dropout() > 0.0))
}

fn owned<'a, P>(parts: impl Iterator<Item = (&'a str, P)>) -> Vec<(String, P)> {
    parts.map(|(name, part)| (name.to_owned(), part)).collect()
}

/// Hidden states of a sequence or image.
fn columns(classifier: &Classifier, batch: &ClassifierBatch) -> usize {
    match &batch.input {
        super::Input::Text { cols, .. } => *cols,
        super::Input::Image { .. } => classifier.config.columns(),
    }
}
