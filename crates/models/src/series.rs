//! Modules under the names they have in transformers.
//!
//! A parameter's path is its name for optimisers, adapters and files. Where such a name cannot be a Rust field
//! (`attention.self.query`) or differs between families that share code, the modules lie in a [`Series`], which carries the names.
//! Structs made of series are `transparent`: their own field names are no part of a path.

use std::ops::{Index, IndexMut};
use std::sync::Arc;

use burn::module::{Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor};
use burn::tensor::Device;

/// Modules of one kind in a fixed order, each with its name; a name may hold dots.
#[derive(Clone, Debug)]
pub struct Series<M> {
    names: Arc<[String]>,
    items: Vec<M>,
}

impl<M> Default for Series<M> {
    fn default() -> Self {
        Self { names: Arc::new([]), items: Vec::new() }
    }
}

impl<M> Series<M> {
    /// Modules with their names.
    pub fn new(parts: Vec<(String, M)>) -> Self {
        let (names, items): (Vec<String>, Vec<M>) = parts.into_iter().unzip();
        Self { names: names.into(), items }
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.items.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty()
    }

    /// The name of one of them.
    pub fn name(&self, index: usize) -> &str {
        &self.names[index]
    }

    /// Without their names.
    pub fn items(&self) -> &[M] {
        &self.items
    }

    /// With their names.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &M)> {
        self.names.iter().map(String::as_str).zip(&self.items)
    }

    /// [`Series::iter`], to change them.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&str, &mut M)> {
        self.names.iter().map(String::as_str).zip(&mut self.items)
    }

    /// Replaces one of them; the old value is handed over, not copied.
    pub fn replace(&mut self, index: usize, change: impl FnOnce(&str, M) -> M) {
        let item = self.items.remove(index);
        self.items.insert(index, change(&self.names[index], item));
    }

    fn each(self, change: impl FnMut(M) -> M) -> Self {
        Self { names: self.names, items: self.items.into_iter().map(change).collect() }
    }
}

impl<M> Index<usize> for Series<M> {
    type Output = M;
    fn index(&self, index: usize) -> &M {
        &self.items[index]
    }
}

impl<M> IndexMut<usize> for Series<M> {
    fn index_mut(&mut self, index: usize) -> &mut M {
        &mut self.items[index]
    }
}

/// What visitors are told that a series is.
const CONTAINER: &str = "Series";

impl<M: Module> Module for Series<M> {
    fn collect_devices(&self, devices: Devices) -> Devices {
        self.items.iter().fold(devices, |devices, item| item.collect_devices(devices))
    }
    fn fork(self, device: &Device) -> Self {
        self.each(|item| item.fork(device))
    }
    fn to_device(self, device: &Device) -> Self {
        self.each(|item| item.to_device(device))
    }
    fn train(self) -> Self {
        self.each(Module::train)
    }
    fn valid(&self) -> Self {
        Self { names: self.names.clone(), items: self.items.iter().map(Module::valid).collect() }
    }
    fn materialize(self) -> Self {
        self.each(Module::materialize)
    }
    fn visit<V: ModuleVisitor>(&self, visitor: &mut V) {
        for (name, item) in self.iter() {
            visitor.enter_module(name, CONTAINER);
            item.visit(visitor);
            visitor.exit_module(name, CONTAINER);
        }
    }
    fn map<V: ModuleMapper>(self, mapper: &mut V) -> Self {
        let mapped = self.names.iter().zip(self.items).map(|(name, item)| {
            mapper.enter_module(name, CONTAINER);
            let item = item.map(mapper);
            mapper.exit_module(name, CONTAINER);
            item
        });
        let items = mapped.collect();
        Self { names: self.names, items }
    }
}

impl<M: Module> ModuleDisplayDefault for Series<M> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&self.names.join(", ")).optional()
    }
}

impl<M: Module> ModuleDisplay for Series<M> {}

/// Implements [`Module`] for a struct whose listed fields are modules and whose field names are no part of a path.
macro_rules! transparent {
    ($type:ident { $($field:ident),+ }) => {
        impl burn::module::Module for $type {
            fn collect_devices(&self, devices: burn::module::Devices) -> burn::module::Devices {
                $(let devices = self.$field.collect_devices(devices);)+
                devices
            }
            fn fork(mut self, device: &burn::tensor::Device) -> Self {
                $(self.$field = self.$field.fork(device);)+
                self
            }
            fn to_device(mut self, device: &burn::tensor::Device) -> Self {
                $(self.$field = self.$field.to_device(device);)+
                self
            }
            fn train(mut self) -> Self {
                $(self.$field = self.$field.train();)+
                self
            }
            fn valid(&self) -> Self {
                let mut valid = self.clone();
                $(valid.$field = self.$field.valid();)+
                valid
            }
            fn materialize(mut self) -> Self {
                $(self.$field = self.$field.materialize();)+
                self
            }
            fn visit<V: burn::module::ModuleVisitor>(&self, visitor: &mut V) {
                $(self.$field.visit(visitor);)+
            }
            fn map<V: burn::module::ModuleMapper>(mut self, mapper: &mut V) -> Self {
                $(self.$field = self.$field.map(mapper);)+
                self
            }
        }

        impl burn::module::ModuleDisplayDefault for $type {
            fn content(&self, content: burn::module::Content) -> Option<burn::module::Content> {
                content$(.add(stringify!($field), &self.$field))+.optional()
            }
        }

        impl burn::module::ModuleDisplay for $type {}
    };
}

pub(crate) use transparent;
