//! Generates the code of every kernel for NVIDIA cards (C++ and PTX, sm_90), as SPIR-V and as WGSL, without a device.
//!
//! `cargo test --release --workspace --features lowrank-kernels/codegen --lib codegen`; the feature needs what `cuda` needs to
//! build (README). A new kernel is a row of [`ROWS`]. NVIDIA's own compilers, which come after this, are not run: what is
//! shown is that CubeCL accepts the kernel and that the result has its entry point.
//!
//! PTX of a kernel with exp, log or tanh needs `libdevice.10.bc` of a CUDA toolkit: `CUDA_PATH` names a folder with
//! `nvvm/libdevice`. Where there is none, the test says which kernels got no PTX.

#![allow(clippy::panic, clippy::print_stderr)]

use std::sync::Arc;

use cubecl::CubeKernel;
use cubecl::ir::features::{Features, Plane, TypeUsage};
use cubecl::ir::nvidia::SmArch;
use cubecl::ir::{
    AddressType, DeviceIdentity, DeviceProperties, ElemType, FloatKind, HardwareProperties, IntKind,
    MemoryDeviceProperties, TargetProperties, UIntKind, VectorSize,
};
use cubecl::prelude::*;
use cubecl::{Compiler, WgpuCompilationOptions};
use cubecl_cuda::compiler::CudaBackend;
use cubecl_cuda::{CudaCompilationOptions, CudaCompiler, CudaRepresentation};
use cubecl_wgpu::AutoCompiler;

use super::{gated, rms_norm};
use crate::gated::Activation;

const BF16: ElemType = ElemType::Float(FloatKind::BF16);
const F16: ElemType = ElemType::Float(FloatKind::F16);
const F32: ElemType = ElemType::Float(FloatKind::F32);

/// A kernel, with what a launcher decides: size of a cube, vector sizes, element types, comptime values.
struct Row {
    /// Shown in messages; starts with the name of the kernel function.
    name: &'static str,
    /// Makes it.
    kernel: fn(&Offline) -> Box<dyn CubeKernel>,
}

/// One row: `row!(kernel function, Type, cube, (buffers and scalars), comptime values in order of the parameters)`.
macro_rules! row {
    ($($module:ident)::+, $kernel:ident, $label:literal, $cube:expr, ($($argument:expr),*), $($comptime:expr),+) => {
        Row {
            name: $label,
            kernel: |offline| {
                let settings = KernelSettings::new($cube.into(), ExecutionMode::Checked, AddressType::U32);
                let (device, target) = (offline.device.clone(), offline.target.clone());
                Box::new($($module)::+::$kernel::new(settings, device, target, $($argument,)* $($comptime),+))
            },
        }
    };
}

/// An argument that is a buffer; a number is `()`.
fn buffer() -> BufferCompilationArg {
    BufferCompilationArg { inplace: None }
}

#[rustfmt::skip]
const ROWS: &[Row] = &[
    row!(gated::gated_kernel, GatedKernel, "gated_kernel bf16 silu",
        CubeDim::new_1d(256), (buffer(), buffer(), buffer()), 8, Activation::Silu, BF16),
    row!(gated::gated_kernel, GatedKernel, "gated_kernel f32 gelu",
        CubeDim::new_1d(256), (buffer(), buffer(), buffer()), 4, Activation::Gelu, F32),
    row!(gated::gated_kernel, GatedKernel, "gated_kernel f16 gelu_tanh",
        CubeDim::new_1d(256), (buffer(), buffer(), buffer()), 1, Activation::GeluTanh, F16),
    row!(gated::gated_backward_kernel, GatedBackwardKernel, "gated_backward_kernel bf16 silu",
        CubeDim::new_1d(256), (buffer(), buffer(), buffer(), buffer(), buffer()), 8, Activation::Silu, BF16),
    row!(gated::gated_backward_kernel, GatedBackwardKernel, "gated_backward_kernel f32 gelu_tanh",
        CubeDim::new_1d(256), (buffer(), buffer(), buffer(), buffer(), buffer()), 4, Activation::GeluTanh, F32),
    row!(rms_norm::rms_norm_kernel, RmsNormKernel, "rms_norm_kernel bf16",
        CubeDim::new_1d(256), (buffer(), buffer(), buffer(), (), (), ()), 8, BF16, F32),
    row!(rms_norm::rms_norm_kernel, RmsNormKernel, "rms_norm_kernel f32",
        CubeDim::new_1d(256), (buffer(), buffer(), buffer(), (), (), ()), 1, F32, F32),
    row!(rms_norm::rms_norm_backward_kernel, RmsNormBackwardKernel, "rms_norm_backward_kernel bf16",
        CubeDim::new_1d(256), (buffer(), buffer(), buffer(), buffer(), buffer(), (), (), (), ()), 8, BF16, BF16),
];

/// A device that is not there: what a kernel may ask of a Hopper card.
struct Offline {
    device: Arc<DeviceProperties>,
    target: Arc<TargetProperties>,
}

impl Offline {
    fn new() -> Self {
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: 227 * 1024,
            max_cube_count: (i32::MAX as u32, 65535, 65535),
            max_units_per_cube: 1024,
            max_cube_dim: (1024, 1024, 64),
            num_streaming_multiprocessors: Some(132),
            num_tensor_cores: Some(4),
            min_tensor_cores_dim: Some(8),
            num_cpu_cores: None,
            last_level_cache_size: None,
            max_vector_size: VectorSize::MAX,
            cube_mma_reserved_shared_memory: 0,
        };
        let identity = DeviceIdentity { name: "offline".into(), fingerprint: "offline".into(), physical: None };
        let memory = MemoryDeviceProperties::new(u64::MAX, 256);
        let timing = cubecl::profile::TimingMethod::Device;
        let mut device = DeviceProperties::new(Features::default(), memory, hardware, timing, identity);
        device.features.plane.insert(Plane::Ops);
        for element in [BF16, F16, F32, ElemType::Int(IntKind::I32), ElemType::UInt(UIntKind::U32)] {
            device.register_type_usage(element, TypeUsage::Buffer | TypeUsage::Conversion | TypeUsage::Arithmetic);
        }
        Self { device: Arc::new(device), target: Arc::new(TargetProperties::default()) }
    }

    /// The text for CUDA.
    fn cuda(&self, row: &Row, backend: CudaBackend) -> Result<String, String> {
        let options =
            CudaCompilationOptions { arch: Some(SmArch::new(90, true)), ptx_version: None, ..Default::default() };
        let compiled = CudaCompiler::new(backend).compile((row.kernel)(self).define(), &options);
        match compiled.map_err(|error| format!("{error:?}"))? {
            CudaRepresentation::Cpp(kernel) => Ok(kernel.to_string()),
            CudaRepresentation::Llvm(module) => {
                let bytes: Vec<u8> = module.ptx.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
                Ok(String::from_utf8_lossy(&bytes).into_owned())
            }
        }
    }

    /// SPIR-V in words, or WGSL.
    fn wgpu(&self, row: &Row, mut compiler: AutoCompiler) -> Result<String, String> {
        let mut options = WgpuCompilationOptions { supports_vulkan_compiler: true, ..Default::default() };
        options.vulkan.max_spirv_version = (1, 6);
        options.vulkan.max_vector_size = 4;
        let compiled = compiler.compile((row.kernel)(self).define(), &options);
        Ok(compiled.map_err(|error| format!("{error:?}"))?.to_string())
    }
}

/// The name of the kernel function.
fn function(row: &Row) -> &str {
    row.name.split(' ').next().unwrap_or_default()
}

#[test]
fn codegen_of_every_kernel_for_cuda() {
    let offline = Offline::new();
    let mut without_ptx = vec![];
    for row in ROWS {
        let source = offline.cuda(row, CudaBackend::Cpp).unwrap_or_else(|error| panic!("{}: C++: {error}", row.name));
        assert!(source.contains("__global__") && source.contains(function(row)), "{}: {source}", row.name);
        match offline.cuda(row, CudaBackend::Llvm) {
            Ok(ptx) => {
                assert!(ptx.contains(".target sm_90"), "{}: {ptx}", row.name);
                assert!(ptx.contains(".entry") && ptx.contains(function(row)), "{}: {ptx}", row.name);
            }
            Err(error) if error.contains("libdevice.10.bc was not found") => without_ptx.push(row.name),
            Err(error) => panic!("{}: PTX: {error}", row.name),
        }
    }
    assert!(without_ptx.len() < ROWS.len(), "no kernel got PTX");
    if !without_ptx.is_empty() {
        eprintln!("no PTX, for want of libdevice.10.bc (CUDA_PATH), for {}", without_ptx.join(", "));
    }
}

#[test]
fn codegen_of_every_kernel_for_vulkan() {
    let offline = Offline::new();
    for row in ROWS {
        let spirv = AutoCompiler::SpirV(Default::default());
        let text = offline.wgpu(row, spirv).unwrap_or_else(|error| panic!("{}: SPIR-V: {error}", row.name));
        assert!(text.contains("OpEntryPoint") && text.contains(function(row)), "{}: {text}", row.name);
    }
}

/// WGSL has no bf16.
#[test]
fn codegen_of_every_kernel_for_webgpu() {
    let offline = Offline::new();
    for row in ROWS.iter().filter(|row| !row.name.contains("bf16")) {
        let wgsl = AutoCompiler::Wgsl(Default::default());
        let text = offline.wgpu(row, wgsl).unwrap_or_else(|error| panic!("{}: WGSL: {error}", row.name));
        assert!(text.contains("@compute") && text.contains(function(row)), "{}: {text}", row.name);
    }
}
