//! The operations that `lowrank` adds to a Burn backend.
//!
//! Every method has a default body in plain tensor operations: the reference. `Flex` (the CPU) overrides what our own loops do
//! faster, `CubeBackend` (GPUs) what `gpu/` has a kernel for; the other operations run as references there, which Burn fuses.
//! `Autodiff` adds the hand-written backward of each, once for all backends.

use burn::backend::{Backend, ExtensionType, backend_extension, tensor::FloatTensor, tensor::IntTensor};

use burn::tensor::FloatDType;

use crate::attention::AttentionHints;
use crate::gated::Activation;
use crate::groups::Rounding;
use crate::packed::{Layout, Operand, PackedParts};
use crate::{
    adam8, adamw, attention, block_rotation, column_scale, cross_entropy, directed_linear, gated, gemm, groups, linear,
    lowrank_linear, packed, projected_linear, reduce, rms_norm, rotary, scaled_basis, stochastic_round, top_columns,
};

/// An optional float tensor in the signature of an operation.
#[derive(ExtensionType)]
#[extension_type(fusion: cfg(feature = "gpu"))]
pub enum Maybe<B: Backend> {
    /// The tensor is there.
    Given(FloatTensor<B>),
    /// It is not.
    Absent,
}

impl<B: Backend> Maybe<B> {
    /// From an ordinary option.
    pub fn from_option(tensor: Option<FloatTensor<B>>) -> Self {
        tensor.map_or(Self::Absent, Self::Given)
    }

    /// The tensor as an ordinary option.
    pub fn option(self) -> Option<FloatTensor<B>> {
        match self {
            Self::Given(tensor) => Some(tensor),
            Self::Absent => None,
        }
    }
}

/// What Burn's fusion must know of a result before it exists.
#[cfg(feature = "gpu")]
mod spec {
    use burn::backend::fusion::custom::TensorSpec;
    use burn::tensor::{DType, FloatDType, Shape};

    use crate::packed::Layout;

    pub fn losses_and_gradient(logits: &TensorSpec) -> (TensorSpec, TensorSpec) {
        (TensorSpec::new(Shape::new([logits.shape[0]]), DType::F32), logits.clone())
    }

    pub fn of_type(x: &TensorSpec, dtype: FloatDType) -> TensorSpec {
        TensorSpec::new(x.shape.clone(), dtype.into())
    }

    pub fn numbers(count: usize) -> TensorSpec {
        TensorSpec::new(Shape::new([count]), DType::F32)
    }

    /// Rows and type of `x`, and so many columns.
    pub fn matrix(x: &TensorSpec, columns: usize) -> TensorSpec {
        TensorSpec::new(Shape::new([x.shape[0], columns]), x.dtype)
    }

    pub fn panel(layout: Layout, rows: usize, dtype: FloatDType) -> TensorSpec {
        TensorSpec::new(Shape::new([rows, layout.stored()[1]]), dtype.into())
    }

    /// Words of codes, scales, words of zero points.
    pub fn groups(layout: Layout) -> (TensorSpec, TensorSpec, TensorSpec) {
        let vector = |len: usize, dtype| TensorSpec::new(Shape::new([len]), dtype);
        let (words, blocks) = (layout.words(), layout.blocks());
        (vector(words, DType::I32), vector(blocks, DType::F32), vector(blocks.div_ceil(4), DType::I32))
    }

    pub fn indices(count: usize) -> TensorSpec {
        TensorSpec::new(Shape::new([count]), DType::I32)
    }

    /// One f32 number for each row of `x`.
    pub fn rows(x: &TensorSpec) -> TensorSpec {
        TensorSpec::new(x.shape[..x.shape.num_dims() - 1].to_vec().into(), DType::F32)
    }
}

/// The backend trait behind the functions of this crate. Shapes and equations are documented there.
#[backend_extension(Flex: cfg(feature = "flex"), Cube: cfg(feature = "gpu"), Fusion: cfg(feature = "gpu"), Autodiff)]
pub trait LowRankOps: Backend {
    /// `alpha a b + c`: the product everything else is built from. Shapes `[m, k]`, `[k, n]`, `[m, n]`.
    #[fusion(default)]
    fn gemm(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        #[extension_type] c: Maybe<Self>,
        alpha: f32,
    ) -> FloatTensor<Self> {
        gemm::routed::<Self>(a, b, c.option(), alpha)
    }

    /// `alpha a b` where the result has few rows or few columns; see [`crate::gemm`].
    #[fusion(meta = |a, b, _alpha| spec::matrix(a, b.shape[1]))]
    fn thin_product(a: FloatTensor<Self>, b: FloatTensor<Self>, alpha: f32) -> FloatTensor<Self> {
        gemm::reference::<Self>(a, b, None, alpha)
    }

    /// See [`crate::linear`].
    #[fusion(default)]
    fn dense_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] bias: Maybe<Self>,
    ) -> FloatTensor<Self> {
        linear::forward::<Self>(x, w, bias.option())
    }

    /// See [`crate::lowrank_linear`].
    #[fusion(default)]
    fn lowrank_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] bias: Maybe<Self>,
        #[extension_type] mask: Maybe<Self>,
        down: FloatTensor<Self>,
        up: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        lowrank_linear::reference::<Self>(x, w, bias.option(), mask.option(), down, up, scale)
    }

    /// See [`crate::linear`].
    #[fusion(default)]
    fn packed_linear(
        x: FloatTensor<Self>,
        #[extension_type] w: PackedParts<Self>,
        #[extension_type] bias: Maybe<Self>,
    ) -> FloatTensor<Self> {
        packed::reference::linear_routed::<Self>(x, w, bias.option())
    }

    /// Gradient of x.
    #[fusion(default)]
    fn packed_linear_backward(dy: FloatTensor<Self>, #[extension_type] w: PackedParts<Self>) -> FloatTensor<Self> {
        packed::reference::input_gradient_routed::<Self>(dy, w)
    }

    /// `x W` for few rows of x, without a panel of W.
    #[fusion(meta = |x, w| spec::matrix(x, w.layout().dims[1]))]
    fn packed_few(x: FloatTensor<Self>, #[extension_type] w: PackedParts<Self>) -> FloatTensor<Self> {
        packed::reference::linear::<Self>(x, w, None, packed::reference::PANEL)
    }

    /// `dy W^T` for few rows of dy, without a panel of W.
    #[fusion(meta = |dy, w| spec::matrix(dy, w.layout().dims[0]))]
    fn packed_few_backward(dy: FloatTensor<Self>, #[extension_type] w: PackedParts<Self>) -> FloatTensor<Self> {
        packed::reference::input_gradient::<Self>(dy, w, packed::reference::PANEL)
    }

    /// See [`crate::lowrank_linear`].
    #[fusion(default)]
    fn packed_lowrank_linear(
        x: FloatTensor<Self>,
        #[extension_type] w: PackedParts<Self>,
        #[extension_type] bias: Maybe<Self>,
        #[extension_type] mask: Maybe<Self>,
        down: FloatTensor<Self>,
        up: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        let w = Operand::Packed(Box::new(w));
        lowrank_linear::forward::<Self>(x, w, bias.option(), mask.option(), down, up, scale).0
    }

    /// See [`crate::lowrank_shift`].
    #[fusion(default)]
    fn lowrank_shift(
        x: FloatTensor<Self>,
        down: FloatTensor<Self>,
        up: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        lowrank_linear::forward::<Self>(x, Operand::Identity, None, None, down, up, scale).0
    }

    /// See [`crate::column_scale`]; also returns what the backward needs.
    #[fusion(default)]
    fn column_scale(
        z: FloatTensor<Self>,
        c: FloatTensor<Self>,
        #[extension_type] bias: Maybe<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        column_scale::reference::<Self>(z, c, bias.option())
    }

    /// Gradients `(dz, dc)` of [`crate::column_scale`], from what it kept.
    #[fusion(default)]
    fn column_scale_backward(
        kept: FloatTensor<Self>,
        c: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        _has_bias: bool,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        column_scale::backward_reference::<Self>(kept, c, dy)
    }

    /// See [`crate::directed_linear()`].
    #[fusion(default)]
    fn directed_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        down: FloatTensor<Self>,
        up: FloatTensor<Self>,
        magnitude: FloatTensor<Self>,
        scale: f32,
    ) -> FloatTensor<Self> {
        directed_linear::forward::<Self>(x, w, down, up, magnitude, scale)
    }

    /// The weight of [`crate::directed_linear()`], the lengths of the columns before they are scaled, and what they are scaled by.
    #[fusion(default)]
    fn directed_weight(
        w: FloatTensor<Self>,
        down: FloatTensor<Self>,
        up: FloatTensor<Self>,
        magnitude: FloatTensor<Self>,
        scale: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        directed_linear::reference::<Self>(w, down, up, magnitude, scale)
    }

    /// The dot product of every column of `a` with that of `b`: `[t, n]` each to `[n]`.
    #[fusion(default)]
    fn column_dots(a: FloatTensor<Self>, b: FloatTensor<Self>) -> FloatTensor<Self> {
        directed_linear::dots_reference::<Self>(a, b)
    }

    /// See [`crate::block_rotation`].
    #[fusion(default)]
    fn block_rotation(x: FloatTensor<Self>, turn: FloatTensor<Self>) -> FloatTensor<Self> {
        block_rotation::reference::<Self>(x, turn)
    }

    /// Gradient of the blocks of [`crate::block_rotation`], `[n, block, block]`.
    #[fusion(default)]
    fn block_rotation_gradient(x: FloatTensor<Self>, dy: FloatTensor<Self>, block: usize) -> FloatTensor<Self> {
        block_rotation::gradient_reference::<Self>(x, dy, block)
    }

    /// See [`crate::scaled_basis`].
    #[fusion(default)]
    fn scaled_basis(a: FloatTensor<Self>, lambda: FloatTensor<Self>, gamma: FloatTensor<Self>) -> FloatTensor<Self> {
        scaled_basis::reference::<Self>(a, lambda, gamma)
    }

    /// Gradients `(dlambda, dgamma)` of [`crate::scaled_basis`].
    #[fusion(default)]
    fn scaled_basis_backward(
        a: FloatTensor<Self>,
        lambda: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        dy: FloatTensor<Self>,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        scaled_basis::backward_reference::<Self>(a, lambda, gamma, dy)
    }

    /// The values of rows `first..first + rows` of the flattened matrix of a packed weight.
    #[fusion(meta = |w, _first, rows, dtype| spec::panel(w.layout(), *rows, *dtype))]
    fn dequantise(
        #[extension_type] w: PackedParts<Self>,
        first: usize,
        rows: usize,
        dtype: FloatDType,
    ) -> FloatTensor<Self> {
        packed::reference::dequantise::<Self>(&w, first, rows, dtype)
    }

    /// See [`crate::projected_linear`].
    #[fusion(default)]
    fn projected_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] bias: Maybe<Self>,
        #[extension_type] left: Maybe<Self>,
        #[extension_type] _right: Maybe<Self>,
        #[extension_type] up: Maybe<Self>,
        keep: f32,
    ) -> FloatTensor<Self> {
        let offset = projected_linear::Offset::from_options(left.option(), up.option(), keep);
        projected_linear::forward::<Self>(x, Operand::Dense(w), bias.option(), offset.as_ref())
    }

    /// See [`crate::packed_projected_linear`].
    #[fusion(default)]
    fn packed_projected_linear(
        x: FloatTensor<Self>,
        #[extension_type] w: PackedParts<Self>,
        #[extension_type] bias: Maybe<Self>,
        #[extension_type] left: Maybe<Self>,
        #[extension_type] _right: Maybe<Self>,
        #[extension_type] up: Maybe<Self>,
        keep: f32,
        _slot: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let offset = projected_linear::Offset::from_options(left.option(), up.option(), keep);
        projected_linear::forward::<Self>(x, Operand::Packed(Box::new(w)), bias.option(), offset.as_ref())
    }

    /// See [`crate::factored_linear`].
    #[fusion(default)]
    fn factored_linear(
        x: FloatTensor<Self>,
        w: FloatTensor<Self>,
        #[extension_type] bias: Maybe<Self>,
        #[extension_type] down: Maybe<Self>,
        #[extension_type] up: Maybe<Self>,
        keep: f32,
        _x_slot: FloatTensor<Self>,
        _dy_slot: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let offset = projected_linear::Offset::from_options(down.option(), up.option(), keep);
        projected_linear::forward::<Self>(x, Operand::Dense(w), bias.option(), offset.as_ref())
    }

    /// See [`crate::factored_linear`].
    #[fusion(default)]
    fn packed_factored_linear(
        x: FloatTensor<Self>,
        #[extension_type] w: PackedParts<Self>,
        #[extension_type] bias: Maybe<Self>,
        #[extension_type] down: Maybe<Self>,
        #[extension_type] up: Maybe<Self>,
        keep: f32,
        _x_slot: FloatTensor<Self>,
        _dy_slot: FloatTensor<Self>,
    ) -> FloatTensor<Self> {
        let offset = projected_linear::Offset::from_options(down.option(), up.option(), keep);
        projected_linear::forward::<Self>(x, Operand::Packed(Box::new(w)), bias.option(), offset.as_ref())
    }

    /// See [`crate::rms_norm`].
    #[fusion(dtype = x, shape = x)]
    fn rms_norm(x: FloatTensor<Self>, gamma: FloatTensor<Self>, eps: f32, offset: f32) -> FloatTensor<Self> {
        rms_norm::reference::<Self>(x, gamma, eps, offset)
    }

    /// Gradients `(dx, dgamma)` of [`crate::rms_norm`].
    #[fusion(meta = |x, gamma, _dy, _eps, _offset| (x.clone(), gamma.clone()))]
    fn rms_norm_backward(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f32,
        offset: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        rms_norm::backward_reference::<Self>(x, gamma, dy, eps, offset)
    }

    /// Gradient of x alone, for a frozen gamma.
    #[fusion(dtype = x, shape = x)]
    fn rms_norm_input_gradient(
        x: FloatTensor<Self>,
        gamma: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        eps: f32,
        offset: f32,
    ) -> FloatTensor<Self> {
        Self::rms_norm_backward(x, gamma, dy, eps, offset).0
    }

    /// See [`crate::rotary`]; `sign` is 1 for the rotation and -1 for its inverse (the backward).
    #[fusion(dtype = x, shape = x)]
    fn rotary(x: FloatTensor<Self>, cos: FloatTensor<Self>, sin: FloatTensor<Self>, sign: f32) -> FloatTensor<Self> {
        rotary::reference::<Self>(x, cos, sin, sign)
    }

    /// See [`crate::attention`]; also returns the log-sum-exp of each row, `[B, Sq, H]` f32.
    #[fusion(meta = |q, _k, _v, _ranges, _scale, _softcap, _hints| (q.clone(), spec::rows(q)))]
    fn range_attention(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        scale: f32,
        softcap: f32,
        _hints: AttentionHints,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        attention::reference::<Self>(q, k, v, ranges, scale, softcap)
    }

    /// Gradients `(dq, dk, dv)` of [`crate::attention`] from its output and log-sum-exp.
    #[fusion(meta = |q, k, v, _out, _lse, _d_out, _ranges, _scale, _softcap, _hints| (q.clone(), k.clone(), v.clone()))]
    fn range_attention_backward(
        q: FloatTensor<Self>,
        k: FloatTensor<Self>,
        v: FloatTensor<Self>,
        out: FloatTensor<Self>,
        lse: FloatTensor<Self>,
        d_out: FloatTensor<Self>,
        ranges: IntTensor<Self>,
        scale: f32,
        softcap: f32,
        _hints: AttentionHints,
    ) -> (FloatTensor<Self>, FloatTensor<Self>, FloatTensor<Self>) {
        attention::backward_reference::<Self>(q, k, v, out, lse, d_out, ranges, scale, softcap)
    }

    /// See [`crate::gated`].
    #[fusion(dtype = gate, shape = gate)]
    fn gated(gate: FloatTensor<Self>, up: FloatTensor<Self>, activation: Activation) -> FloatTensor<Self> {
        gated::reference::<Self>(gate, up, activation)
    }

    /// Gradients `(dgate, dup)` of [`crate::gated`].
    #[fusion(meta = |gate, up, _dy, _activation| (gate.clone(), up.clone()))]
    fn gated_backward(
        gate: FloatTensor<Self>,
        up: FloatTensor<Self>,
        dy: FloatTensor<Self>,
        activation: Activation,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        gated::backward_reference::<Self>(gate, up, dy, activation)
    }

    /// See [`crate::cross_entropy`]; also returns the gradient of the summed loss by the logits.
    #[fusion(meta = |logits, _targets, _softcap| spec::losses_and_gradient(logits))]
    fn cross_entropy(
        logits: FloatTensor<Self>,
        targets: IntTensor<Self>,
        softcap: f32,
    ) -> (FloatTensor<Self>, FloatTensor<Self>) {
        cross_entropy::reference::<Self>(logits, targets, softcap)
    }

    /// A `[1]` zero whose backward hands `gradient` to `out`: starts a backward pass from a given output gradient.
    #[fusion(default)]
    fn seed_gradient(out: FloatTensor<Self>, gradient: FloatTensor<Self>) -> FloatTensor<Self> {
        linear::zero_like::<Self>(&out, gradient)
    }

    /// See [`crate::adamw_all`]; returns parameters and moments.
    #[fusion(meta = |parameters, first, second, _gradients, _factor, _rule| {
        (parameters.clone(), first.clone(), second.clone())
    })]
    fn adamw(
        #[extension_type] parameters: Tensors<Self>,
        #[extension_type] first: Tensors<Self>,
        #[extension_type] second: Tensors<Self>,
        #[extension_type] gradients: Tensors<Self>,
        #[extension_type] factor: Maybe<Self>,
        rule: adamw::AdamW,
    ) -> (Tensors<Self>, Tensors<Self>, Tensors<Self>) {
        adamw::reference::<Self>([parameters, first, second, gradients], factor.option(), rule)
    }

    /// See [`crate::adam8()`]; returns parameter, codes and scales.
    #[fusion(meta = |parameter, _gradient, codes, absmax, _maps, _block, _rule| {
        (parameter.clone(), codes.clone(), absmax.clone())
    })]
    fn adam8(
        parameter: FloatTensor<Self>,
        gradient: FloatTensor<Self>,
        codes: IntTensor<Self>,
        absmax: FloatTensor<Self>,
        maps: FloatTensor<Self>,
        block: usize,
        rule: adam8::Adam8,
    ) -> (FloatTensor<Self>, IntTensor<Self>, FloatTensor<Self>) {
        adam8::reference::<Self>(parameter, gradient, codes, absmax, maps, block, rule)
    }

    /// See [`crate::stochastic_round`].
    #[fusion(meta = |x, dtype, _seed| spec::of_type(x, *dtype))]
    fn stochastic_round(x: FloatTensor<Self>, dtype: FloatDType, seed: u64) -> FloatTensor<Self> {
        stochastic_round::reference::<Self>(x, dtype, seed)
    }

    /// See [`crate::pack_groups`]; the values are in the order in which they are flattened.
    #[fusion(meta = |_values, layout, _rounding| spec::groups(*layout))]
    fn pack_groups(
        values: FloatTensor<Self>,
        layout: Layout,
        rounding: Rounding,
    ) -> (IntTensor<Self>, FloatTensor<Self>, IntTensor<Self>) {
        groups::reference::<Self>(values, layout, rounding)
    }

    /// See [`crate::top_columns`].
    #[fusion(meta = |_scores, count| spec::indices(*count))]
    fn top_columns(scores: FloatTensor<Self>, count: usize) -> IntTensor<Self> {
        top_columns::reference::<Self>(scores, count)
    }

    /// See [`crate::sum_squares_all`]; without `squared`, of the values themselves.
    #[fusion(meta = |x, _squared| spec::numbers(x.len()))]
    fn sums(#[extension_type] x: Tensors<Self>, squared: bool) -> FloatTensor<Self> {
        reduce::reference::<Self>(x, squared)
    }
}

#[cfg(feature = "flex")]
mod flex;

mod autodiff;

mod tensors;

pub use tensors::Tensors;
