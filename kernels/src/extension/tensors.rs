//! Lists of tensors in the signature of an operation, of which Burn's macros know only fields.

use burn::backend::{
    Backend, BackendTensor, Dispatch, DispatchAutodiffContext, DispatchTensor, DispatchTensorKind, ExtensionType,
    tensor::FloatTensor,
};

/// Several float tensors of one device: what is done to each of them takes few launches on a GPU.
pub struct Tensors<B: Backend>(
    /// In the order of the operation's other lists.
    pub Vec<FloatTensor<B>>,
);

impl<B: Backend> Tensors<B> {
    /// Of another backend, one by one.
    pub fn map<C: Backend>(self, map: impl Fn(FloatTensor<B>) -> FloatTensor<C>) -> Tensors<C> {
        Tensors(self.0.into_iter().map(map).collect())
    }
}

impl<B: Backend> ExtensionType<B> for Tensors<B> {
    type Target = Tensors<Dispatch>;

    fn map_to_dispatch<F>(self, map_kind: F, autodiff: DispatchAutodiffContext) -> Self::Target
    where
        F: Fn(BackendTensor<B>) -> DispatchTensorKind,
    {
        self.map(|tensor| DispatchTensor { kind: map_kind(BackendTensor::Float(tensor)), autodiff })
    }

    fn map_from_dispatch<F>(target: Self::Target, unwrap_kind: F) -> Self
    where
        F: Fn(DispatchTensor) -> BackendTensor<B>,
    {
        target.map(|tensor| unwrap_kind(tensor).float())
    }

    fn routing_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn routing_float_tensor(target: &Self::Target) -> Option<&DispatchTensor> {
        target.0.first()
    }

    fn autodiff_context(target: &Self::Target) -> DispatchAutodiffContext {
        target.0.iter().fold(DispatchAutodiffContext::Disabled, |context, tensor| context.merge(tensor.autodiff))
    }
}

/// To Burn's fusion a list is its tensors one after another.
#[cfg(feature = "gpu")]
mod fusion {
    use burn::backend::Backend;
    use burn::backend::fusion::custom::{
        ExtensionMetadata, Float, FusionValueAdapter, HandleContainer, OutputTensor, TensorId, TensorIr, TensorSpec,
    };
    use burn::backend::fusion::{ExecutionError, Fusion, FusionBackend, FusionRuntime, FusionTensor};

    use super::Tensors;

    type Handles<B> = HandleContainer<<<B as FusionBackend>::FusionRuntime as FusionRuntime>::FusionHandle>;

    impl<B: Backend> ExtensionMetadata for Tensors<B> {
        type Metadata = Vec<TensorSpec>;
        type Input = Vec<TensorIr>;
        type Output = Vec<OutputTensor>;
    }

    impl<B: FusionBackend> FusionValueAdapter<B> for Tensors<B> {
        type Metadata = Vec<TensorSpec>;
        type Input = Vec<TensorIr>;
        type Output = Vec<OutputTensor>;
        type Inner = Self;
        type Fused = Tensors<Fusion<B>>;

        fn to_metadata(value: &Self::Fused) -> Vec<TensorSpec> {
            value.0.iter().map(<Float as FusionValueAdapter<B>>::to_metadata).collect()
        }

        fn visit_fused_tensors(value: &Self::Fused, visit: &mut impl FnMut(&FusionTensor<B::FusionRuntime>)) {
            value.0.iter().for_each(visit);
        }

        fn tensor_count(meta: &Vec<TensorSpec>) -> usize {
            meta.len()
        }

        fn append_input_ir(value: Self::Fused, inputs: &mut Vec<TensorIr>) -> Vec<TensorIr> {
            let append = |tensor| <Float as FusionValueAdapter<B>>::append_input_ir(tensor, inputs);
            value.0.into_iter().map(append).collect()
        }

        fn resolve_inputs(input: &Vec<TensorIr>, handles: &mut Handles<B>) -> Self {
            Self(input.iter().map(|input| <Float as FusionValueAdapter<B>>::resolve_inputs(input, handles)).collect())
        }

        fn append_output_ir(
            meta: &Vec<TensorSpec>,
            out: &mut Vec<TensorIr>,
            create: &mut impl FnMut() -> TensorId,
        ) -> Vec<OutputTensor> {
            let append = |spec| <Float as FusionValueAdapter<B>>::append_output_ir(spec, out, create);
            meta.iter().map(append).collect()
        }

        fn validate_outputs(
            value: &Self,
            output: &Vec<OutputTensor>,
            device: Option<&B::Device>,
        ) -> Result<(), ExecutionError> {
            let mut pairs = value.0.iter().zip(output);
            pairs.try_for_each(|(value, output)| {
                <Float as FusionValueAdapter<B>>::validate_outputs(value, output, device)
            })
        }

        fn register_output_handles(value: Self, output: &Vec<OutputTensor>, handles: &mut Handles<B>) {
            for (value, output) in value.0.into_iter().zip(output) {
                <Float as FusionValueAdapter<B>>::register_output_handles(value, output, handles);
            }
        }

        fn build_fused_output(
            meta: &Vec<TensorSpec>,
            tensors: &mut std::vec::IntoIter<FusionTensor<B::FusionRuntime>>,
        ) -> Self::Fused {
            let build = |spec| <Float as FusionValueAdapter<B>>::build_fused_output(spec, tensors);
            Tensors(meta.iter().map(build).collect())
        }
    }
}
