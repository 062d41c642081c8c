//! What the trainer knows of a model: a row of segments that it runs one at a time.
//!
//! | segment | what it is | in a [`Decoder`](crate::Decoder) |
//! | --- | --- | --- |
//! | stem | from the batch to the first hidden state | token embedding |
//! | block | from one hidden state `[t, hidden]` to the next; holds the linear layers | attention and feed-forward layer |
//! | head | from chosen rows of the last hidden state to their losses | last norm and vocabulary projection |
//!
//! Hidden states are matrices: all rows of all sequences of the batch below each other. Each segment is lifted onto the tape
//! alone, so a segment holds its parameters and nothing of another segment, but for a head that shares the stem's weight.

use std::fmt::Debug;

use burn::module::Module;
use burn::tensor::{Device, Gradients, Int, Tensor, TensorData};
use lowrank_core::conv::ConvProjection;
use lowrank_core::{Layer, Projection};

use crate::decoder::Embedding;
use crate::parameters::Named;

/// Replaces a parameter, given its name and value as a matrix.
pub type Replace<'a> = &'a mut dyn FnMut(&str, Tensor<2>) -> Tensor<2>;

/// A part of a model.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Segment {
    /// The first.
    Stem,
    /// A block by its number.
    Block(usize),
    /// The last.
    Head,
}

/// A micro batch on the host.
pub trait NetworkBatch: Clone + Debug {
    /// Losses that are counted: what the summed loss is divided by.
    fn target_count(&self) -> usize;

    /// Inputs that are not padding: the unit of throughput (tokens, patches).
    fn token_count(&self) -> usize;

    /// Indices of the data records inside, for messages.
    fn records(&self) -> &[u64];
}

/// A model as segments that the trainer runs one at a time: stem, blocks, head.
pub trait Network: Module {
    /// The first segment.
    type Stem: Module;
    /// A middle segment.
    type Block: Module;
    /// The last segment, with handles to the model's parameters.
    type Head: Module;
    /// A micro batch on the host.
    type Batch: NetworkBatch;
    /// The batch on the device, never on the tape.
    type Inputs;

    /// The device of the parameters.
    fn device(&self) -> Device;

    /// Width of the hidden states.
    fn hidden_size(&self) -> usize;

    /// Moves a batch to the device.
    fn inputs(&self, batch: &Self::Batch) -> Self::Inputs;

    /// The stem.
    fn stem(&self) -> &Self::Stem;

    /// Runs the model's stem, or a lifted one, to the first hidden state `[t, hidden]`.
    fn run_stem(&self, stem: &Self::Stem, inputs: &Self::Inputs, training: bool) -> Tensor<2>;

    /// The blocks in order.
    fn blocks(&self) -> &[Self::Block];

    /// Runs block `index`, or a lifted copy of it, from `x [t, hidden]` to the same shape.
    fn run_block(
        &self,
        index: usize,
        block: &Self::Block,
        x: Tensor<2>,
        inputs: &Self::Inputs,
        training: bool,
    ) -> Tensor<2>;

    /// The head with handles to its parameters.
    fn head(&self) -> Self::Head;

    /// Rows of the last hidden state that have a loss, in order.
    fn counted(&self, batch: &Self::Batch) -> Vec<i32>;

    /// The loss of each of these rows, `[rows]`, from their hidden states `x [rows, hidden]`. The sum over all counted rows
    /// divided by [`NetworkBatch::target_count`] is the mean loss.
    fn losses(&self, head: &Self::Head, x: Tensor<2>, rows: &[i32], batch: &Self::Batch, training: bool) -> Tensor<1>;

    /// Rows whose losses are taken at the same time where the configuration leaves it open.
    fn default_head_chunk(&self) -> usize;

    /// What the names of the stem's parameters begin with.
    fn stem_name(&self) -> String;

    /// What the names of a block's parameters begin with.
    fn block_name(&self, index: usize) -> String;

    /// [`Network::map_parameters`] for the stem alone.
    fn map_stem(&mut self, replace: Replace<'_>);

    /// [`Network::map_parameters`] for one block alone.
    fn map_block(&mut self, index: usize, replace: Replace<'_>);

    /// [`Network::map_parameters`] for the head alone, without what it shares with the stem.
    fn map_head(&mut self, replace: Replace<'_>);

    /// The linear layers of a block with their names within the block.
    fn projections(block: &Self::Block) -> Vec<(String, &Projection)>;

    /// [`Network::projections`], to change them.
    fn projections_mut(block: &mut Self::Block) -> Vec<(String, &mut Projection)>;

    /// The linear layers of a head with their full names.
    fn head_projections(head: &Self::Head) -> Vec<(String, &Projection)>;

    /// [`Network::head_projections`], to change them.
    fn head_projections_mut(head: &mut Self::Head) -> Vec<(String, &mut Projection)>;

    /// Moves the gradients of a lifted head's trained parameters into `into` under their names, adding to what is there.
    fn take_head_gradients(head: &Self::Head, gradients: &mut Gradients, into: &mut Named);

    /// Calls `change` for every layer that can have an adapter with its full name, in model order.
    fn for_each_layer(&mut self, change: &mut dyn FnMut(&str, Layer<'_>));

    /// [`Network::for_each_layer`] for the linear layers.
    fn for_each_projection(&mut self, change: &mut dyn FnMut(&str, &mut Projection)) {
        self.for_each_layer(&mut |name, layer| {
            if let Layer::Linear(projection) = layer {
                change(name, projection);
            }
        });
    }

    /// [`Network::for_each_layer`] for the convolutions.
    fn for_each_convolution(&mut self, change: &mut dyn FnMut(&str, &mut ConvProjection)) {
        self.for_each_layer(&mut |name, layer| {
            if let Layer::Conv(conv) = layer {
                change(name, conv);
            }
        });
    }

    /// The same without changing any.
    fn visit_projections(&self, visit: &mut dyn FnMut(&str, &Projection)) {
        for (index, block) in self.blocks().iter().enumerate() {
            for (name, projection) in Self::projections(block) {
                visit(&format!("{}.{name}", self.block_name(index)), projection);
            }
        }
        for (name, projection) in Self::head_projections(&self.head()) {
            visit(&name, projection);
        }
    }

    /// Tells of a tensor every name that it may have in a checkpoint, the likeliest first.
    fn names_on_disk(&self) -> Box<dyn Fn(&str) -> Vec<String>> {
        Box::new(|name| vec![name.to_owned()])
    }

    /// Module name of the token embedding that an adapter may change.
    fn embedding_name(&self) -> Option<&'static str>;

    /// Gives a tied head its own handle to the embedding's weight, so that the two can differ. Nothing where there is no such
    /// head.
    fn untie_head(&mut self) {}

    /// The token embedding that an adapter may change, with its module name.
    fn embedding(&mut self) -> Option<(&'static str, &mut Embedding)>;

    /// Whether a segment draws random numbers in training: dropout of its adapters, or the model's own.
    fn has_dropout(&self, segment: Segment) -> bool {
        let any = |projections: Vec<(String, &Projection)>| projections.iter().any(|(_, p)| p.dropout() > 0.0);
        match segment {
            Segment::Stem => false,
            Segment::Block(index) => any(Self::projections(&self.blocks()[index])),
            Segment::Head => any(Self::head_projections(&self.head())),
        }
    }

    /// Replaces every parameter by what `replace` makes of it and its name. Values are handed over, not copied, so an
    /// optimiser can change them in place.
    fn map_parameters(&mut self, replace: Replace<'_>) {
        self.map_stem(replace);
        for index in 0..self.blocks().len() {
            self.map_block(index, replace);
        }
        self.map_head(replace);
    }

    /// The last hidden state `[t, hidden]`, without a tape and without dropout.
    fn last_hidden(&self, inputs: &Self::Inputs) -> Tensor<2> {
        let x = self.run_stem(self.stem(), inputs, false);
        let blocks = self.blocks().iter().enumerate();
        blocks.fold(x, |x, (index, block)| self.run_block(index, block, x, inputs, false))
    }
}

/// Rows of a head's chunk: logits of at most 64 MiB in f32, between 64 and 4096 rows.
pub fn head_chunk(classes: usize) -> usize {
    ((64 << 20) / (4 * classes.max(1))).clamp(64, 4096)
}

/// Whole numbers on a device.
pub fn integers(values: &[i32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(values.to_vec(), [values.len()]), device)
}
