//! Generates the code of every kernel for NVIDIA cards (C++ and PTX, sm_90), as SPIR-V and as WGSL, without a device.
//!
//! `cargo test --package lowrank-kernels --features codegen --lib codegen`; the feature needs what `cuda` needs to
//! build (README). A new kernel is a row of [`rows::ROWS`], and a test says which is missing. What is shown is that
//! CubeCL accepts the kernel and that the result has its entry point; attention in fragments, which no software device has, is
//! run besides (`emulated.rs`). The compilers that come after this are not run;
//! for them, `CODEGEN_OUT` names a folder where every text is left: `ptxas -arch=sm_90a -v` and `spirv-as` take these.
//!
//! PTX of a kernel with exp, log or tanh needs `libdevice.10.bc` of a CUDA toolkit: `CUDA_PATH` names a folder with
//! `nvvm/libdevice`. Where there is none, the test says which kernels got no PTX.

#![allow(clippy::panic, clippy::print_stderr, clippy::unwrap_used)]

mod emulated;
mod rows;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;

use cubecl::ir::features::{Features, MmaConfig, Plane, TypeUsage};
use cubecl::ir::nvidia::SmArch;
use cubecl::ir::{
    AddressType, DeviceIdentity, DeviceProperties, ElemType, HardwareProperties, IntKind, MemoryDeviceProperties,
    TargetProperties, UIntKind, VectorSize,
};
use cubecl::prelude::*;
use cubecl::{Compiler, WgpuCompilationOptions};
use cubecl_cuda::compiler::CudaBackend;
use cubecl_cuda::{CudaCompilationOptions, CudaCompiler, CudaRepresentation};
use cubecl_wgpu::AutoCompiler;

use self::rows::{BF16, F16, F32, ROWS, Row};

/// What a cube may ask for on a Hopper card.
const SHARED_MEMORY: usize = 227 * 1024;

/// A device that is not there: what a kernel may ask of a Hopper card.
struct Offline {
    device: Arc<DeviceProperties>,
    target: Arc<TargetProperties>,
    launches: BTreeMap<String, Launch>,
}

/// How a kernel is launched, from its attribute.
#[derive(Clone, Copy)]
struct Launch {
    mode: ExecutionMode,
    /// Whether addresses have 64 bits where tensors are so large.
    is_wide: bool,
}

impl Offline {
    fn new() -> Self {
        let hardware = HardwareProperties {
            load_width: 128,
            vector_register_count: None,
            plane_size_min: 32,
            plane_size_max: 32,
            max_bindings: 1024,
            max_shared_memory_size: SHARED_MEMORY,
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
        let features = &mut device.features;
        features.plane.insert(Plane::Ops);
        features.plane.insert(Plane::Sync);
        features.plane.insert(Plane::NonUniformControlFlow);
        features.alignment = true;
        features.memory_reinterpret = true;
        for a_type in [BF16, F16] {
            features.matmul.cmma.insert(MmaConfig { a_type, b_type: a_type, cd_type: F32, m: 16, n: 16, k: 16 });
        }
        let [i32, i64, u32] = [ElemType::Int(IntKind::I32), ElemType::Int(IntKind::I64), ElemType::UInt(UIntKind::U32)];
        for element in [BF16, F16, F32, i32, i64, u32] {
            device.register_type_usage(element, TypeUsage::Buffer | TypeUsage::Conversion | TypeUsage::Arithmetic);
        }
        let mut launches = BTreeMap::new();
        launches_in(&Path::new(env!("CARGO_MANIFEST_DIR")).join("src/gpu"), &mut launches);
        Self { device: Arc::new(device), target: Arc::new(TargetProperties::default()), launches }
    }

    /// The kernel as it is launched, with addresses of 32 bits or more.
    fn definition(&self, row: &Row, address: AddressType) -> KernelDefinition {
        (row.make)(self, self.launches[row.function].mode, address).define()
    }

    /// The text for CUDA, which begins with a remark on its shared memory.
    fn cuda(&self, row: &Row, address: AddressType, backend: CudaBackend) -> Result<String, String> {
        let mut options =
            CudaCompilationOptions { arch: Some(SmArch::new(90, true)), ptx_version: None, ..Default::default() };
        let features = &mut options.cpp.supports_features;
        (features.grid_constants, features.clusters, features.elect_sync) = (true, true, true);
        (features.fast_math, features.fast_tanh, features.dp4a) = (true, true, true);
        let compiled = CudaCompiler::new(backend).compile(self.definition(row, address), &options);
        let compiled = compiled.map_err(|error| format!("{error:?}"))?;
        let bytes = compiled.shared_memory_size();
        assert!(bytes <= SHARED_MEMORY, "{}: {bytes} bytes of shared memory", row.name());
        let text = match compiled {
            CudaRepresentation::Cpp(kernel) => kernel.to_string(),
            CudaRepresentation::Llvm(module) => {
                let bytes: Vec<u8> = module.ptx.iter().map(|&c| c as u8).take_while(|&c| c != 0).collect();
                String::from_utf8_lossy(&bytes).into_owned()
            }
        };
        Ok(format!("// {bytes} bytes of shared memory\n{text}"))
    }

    /// SPIR-V in words, or WGSL.
    fn wgpu(&self, row: &Row, mut compiler: AutoCompiler) -> Result<String, String> {
        let mut options = WgpuCompilationOptions { supports_vulkan_compiler: true, ..Default::default() };
        options.supports_u64 = true;
        let vulkan = &mut options.vulkan;
        (vulkan.max_spirv_version, vulkan.max_vector_size, vulkan.push_constant_size) = ((1, 6), 4, 256);
        // All drivers of NVIDIA have these. Without the first one, CubeCL declares shared memory as a pointer to a pointer,
        // which validators refuse.
        (vulkan.supports_explicit_smem, vulkan.supports_uniform_standard_layout) = (true, true);
        (vulkan.supports_fp_fast_math, vulkan.supports_dp4a) = (true, true);
        let compiled = compiler.compile(self.definition(row, AddressType::U32), &options);
        Ok(compiled.map_err(|error| format!("{error:?}"))?.to_string())
    }
}

/// The kernels in the sources of a folder. Their attribute is a line of its own before the line with their name.
fn launches_in(folder: &Path, found: &mut BTreeMap<String, Launch>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            launches_in(&path, found);
            continue;
        }
        let source = std::fs::read_to_string(&path).unwrap();
        let mut attribute = None;
        for line in source.lines() {
            if line.starts_with("#[cube(launch") {
                attribute = Some(line);
            }
            let Some((_, name)) = line.split_once("fn ") else { continue };
            let Some(attribute) = attribute.take() else { continue };
            let is_unchecked = attribute.contains("launch_unchecked");
            let mode = if is_unchecked { ExecutionMode::Unchecked } else { ExecutionMode::Checked };
            let is_wide = attribute.contains("address_type = \"dynamic\"");
            let name = name.split(['<', '(']).next().unwrap_or_default().to_string();
            assert!(found.insert(name.clone(), Launch { mode, is_wide }).is_none(), "two kernels are called {name}");
        }
    }
}

/// Leaves a text in the folder that `CODEGEN_OUT` names.
fn keep(row: &Row, text: &str, ending: &str) {
    if let Some(folder) = std::env::var_os("CODEGEN_OUT") {
        std::fs::create_dir_all(&folder).unwrap();
        std::fs::write(Path::new(&folder).join(format!("{}.{ending}", row.name().replace(' ', "-"))), text).unwrap();
    }
}

/// Kernels that know no other type than f32.
const ONLY_F32: [&str; 2] = ["pack_groups_kernel", "top_columns_kernel"];

/// With a form for every kernel that WebGPU takes too.
#[test]
fn codegen_list_names_every_kernel() {
    let launches = Offline::new().launches;
    let listed = |is_wanted: fn(&Row) -> bool| {
        let rows = ROWS.iter().filter(|row| is_wanted(row));
        rows.map(|row| row.function).collect::<BTreeSet<_>>()
    };
    assert_eq!(launches.keys().map(String::as_str).collect::<Vec<_>>(), Vec::from_iter(listed(|_| true)));
    assert_eq!(listed(|_| true), listed(Row::is_for_webgpu));
    let covers_bf16 = |row: &Row| row.label.contains("bf16") || ONLY_F32.contains(&row.function);
    assert_eq!(listed(|_| true), listed(covers_bf16));
    let names: BTreeSet<_> = ROWS.iter().map(Row::name).collect();
    assert_eq!(names.len(), ROWS.len(), "two rows have one name");
}

#[test]
fn codegen_of_every_kernel_for_cuda() {
    let offline = Offline::new();
    let (mut with_ptx, mut without_ptx) = (0, BTreeSet::new());
    for row in ROWS {
        let widths: &[AddressType] = match offline.launches[row.function].is_wide {
            true => &[AddressType::U32, AddressType::U64],
            false => &[AddressType::U32],
        };
        for &address in widths {
            let name = format!("{} {address:?}", row.name());
            let ending = |language: &str| format!("{}.{language}", format!("{address:?}").to_lowercase());
            let source = offline.cuda(row, address, CudaBackend::Cpp);
            let source = source.unwrap_or_else(|error| panic!("{name}: C++: {error}"));
            assert!(source.contains("__global__") && source.contains(row.function), "{name}: {source}");
            keep(row, &source, &ending("cu"));
            match offline.cuda(row, address, CudaBackend::Llvm) {
                Ok(ptx) => {
                    assert!(ptx.contains(".target sm_90"), "{name}: {ptx}");
                    assert!(ptx.contains(".entry") && ptx.contains(row.function), "{name}: {ptx}");
                    keep(row, &ptx, &ending("ptx"));
                    with_ptx += 1;
                }
                Err(error) if error.contains("libdevice.10.bc was not found") => {
                    without_ptx.insert(row.function);
                }
                Err(error) => panic!("{name}: PTX: {error}"),
            }
        }
    }
    assert!(with_ptx > 0, "no kernel got PTX");
    eprintln!("{} rows, {with_ptx} PTX modules", ROWS.len());
    if !without_ptx.is_empty() {
        eprintln!("no PTX, for want of libdevice.10.bc (CUDA_PATH), for {without_ptx:?}");
    }
}

#[test]
fn codegen_of_every_kernel_for_vulkan() {
    let offline = Offline::new();
    for row in ROWS {
        let spirv = AutoCompiler::SpirV(Default::default());
        let text = offline.wgpu(row, spirv).unwrap_or_else(|error| panic!("{}: SPIR-V: {error}", row.name()));
        assert!(text.contains("OpEntryPoint") && text.contains(row.function), "{}: {text}", row.name());
        keep(row, &text, "spvasm");
    }
}

#[test]
fn codegen_of_every_kernel_for_webgpu() {
    let offline = Offline::new();
    for row in ROWS.iter().filter(|row| row.is_for_webgpu()) {
        let wgsl = AutoCompiler::Wgsl(Default::default());
        let text = offline.wgpu(row, wgsl).unwrap_or_else(|error| panic!("{}: WGSL: {error}", row.name()));
        assert!(text.contains("@compute") && text.contains(row.function), "{}: {text}", row.name());
        keep(row, &text, "wgsl");
    }
}
