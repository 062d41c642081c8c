//! Parameters by name: walking a module, reading gradients, replacing values.
//!
//! A name is the path of fields, which is the name in a checkpoint (`model.layers.0.mlp.up_proj.weight`); the factors of a delta
//! end in `.delta.down`, `.delta.up`. Optimisers see every parameter as a matrix: a vector `[n]` becomes `[1, n]`.

use std::collections::BTreeMap;

use burn::module::{Module, ModuleMapper, ModuleVisitor, Param};
use burn::tensor::{Gradients, Shape, Tensor};

/// Matrices by parameter name.
pub type Named = BTreeMap<String, Tensor<2>>;

/// A vector as `[1, n]`, a matrix as it is.
pub fn as_matrix<const D: usize>(tensor: Tensor<D>) -> Tensor<2> {
    if D == 2 {
        return Tensor::from_dispatch(tensor.into_dispatch()); // the same tensor: a transposed view stays one
    }
    let n = tensor.shape().num_elements();
    tensor.reshape([1, n])
}

/// The inverse of [`as_matrix`].
fn from_matrix<const D: usize>(matrix: Tensor<2>, shape: Shape) -> Tensor<D> {
    if D == 2 { Tensor::from_dispatch(matrix.into_dispatch()) } else { matrix.reshape(shape) }
}

struct Path(Vec<String>);

impl Path {
    fn starting(prefix: &str) -> Self {
        Self(if prefix.is_empty() { vec![] } else { vec![prefix.to_owned()] })
    }
    fn name(&self) -> String {
        self.0.join(".")
    }
    /// The kinds of a delta or of a base are no parts of a name.
    fn enter(&mut self, name: &str, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.push(name.to_owned());
        }
    }
    fn exit(&mut self, container: &str) {
        if !container.starts_with("Enum:") {
            self.0.pop();
        }
    }
}

struct Visitor<F> {
    path: Path,
    visit: F,
}

/// What a walk tells of a parameter.
pub struct Entry<'a> {
    /// Its name.
    pub name: &'a str,
    /// Its value as a matrix.
    pub value: &'a dyn Fn() -> Tensor<2>,
    /// Its shape.
    pub dims: &'a [usize],
    /// Whether it is trained.
    pub trained: bool,
}

impl<F: FnMut(Entry<'_>)> ModuleVisitor for Visitor<F> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }
    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let trained = param.clone().train().is_require_grad();
        let value = || as_matrix(param.val());
        (self.visit)(Entry { name: &self.path.name(), value: &value, dims: &param.dims(), trained });
    }
}

/// Calls `visit` for every parameter of a module, in the order of its fields.
pub fn visit<M: Module>(module: &M, prefix: &str, visit: impl FnMut(Entry<'_>)) {
    module.visit(&mut Visitor { path: Path::starting(prefix), visit });
}

/// Names, shapes and values of all trained parameters.
pub fn trained<M: Module>(module: &M) -> Vec<(String, Vec<usize>)> {
    let mut found = vec![];
    visit(module, "", |entry| {
        if entry.trained {
            found.push((entry.name.to_owned(), entry.dims.to_vec()));
        }
    });
    found
}

struct GradientReader<'a> {
    path: Path,
    gradients: &'a mut Gradients,
    into: &'a mut Named,
}

impl ModuleVisitor for GradientReader<'_> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }
    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }
    fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<D>>) {
        let value = param.val();
        if !value.is_require_grad() {
            return;
        }
        if let Some(gradient) = value.grad_remove(self.gradients) {
            add(self.into, self.path.name(), as_matrix(gradient));
        }
    }
}

/// Adds a gradient to what is there under the name.
pub fn add(into: &mut Named, name: String, gradient: Tensor<2>) {
    let sum = match into.remove(&name) {
        Some(sum) => sum + gradient,
        None => gradient,
    };
    into.insert(name, sum);
}

/// Moves the gradients of a lifted module's trained parameters into `into`, adding to what is there.
pub fn take_gradients<M: Module>(lifted: &M, prefix: &str, gradients: &mut Gradients, into: &mut Named) {
    lifted.visit(&mut GradientReader { path: Path::starting(prefix), gradients, into });
}

struct Mapper<F> {
    path: Path,
    replace: F,
}

impl<F: FnMut(&str, Tensor<2>) -> Tensor<2>> ModuleMapper for Mapper<F> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }
    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let name = self.path.name();
        let shape = param.shape();
        // Consumed, not cloned: an optimiser may change a value that nothing else holds in place.
        let (id, value, mapper) = param.consume();
        let value = from_matrix((self.replace)(&name, as_matrix(value)), shape);
        Param::from_mapped_value(id, value, mapper)
    }
}

/// Replaces every parameter by what `replace` makes of it.
pub fn map<M: Module>(module: M, prefix: &str, replace: impl FnMut(&str, Tensor<2>) -> Tensor<2>) -> M {
    module.map(&mut Mapper { path: Path::starting(prefix), replace })
}

struct Switch<F> {
    path: Path,
    trained: F,
}

impl<F: FnMut(&str) -> Option<bool>> ModuleMapper for Switch<F> {
    fn enter_module(&mut self, name: &str, container_type: &str) {
        self.path.enter(name, container_type);
    }
    fn exit_module(&mut self, _name: &str, container_type: &str) {
        self.path.exit(container_type);
    }
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<D>>) -> Param<Tensor<D>> {
        let Some(trained) = (self.trained)(&self.path.name()) else { return param };
        let param = param.set_require_grad(trained);
        if trained {
            param.map(|value| lowrank_core::lowrank::cast(value, burn::tensor::FloatDType::F32))
        } else {
            param
        }
    }
}

/// Decides for every parameter whether it is trained (`None`: as it was); newly trained ones are widened to f32.
pub fn set_trained<M: Module>(module: M, trained: impl FnMut(&str) -> Option<bool>) -> M {
    module.map(&mut Switch { path: Path::starting(""), trained })
}
