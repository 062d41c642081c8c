//! Which device a run uses: `auto`, or a name with an index.

use burn::tensor::{Device, FloatDType};

use crate::config::Dtype;
use crate::error::Problem;

/// A device that can be used, and what it is called in logs.
#[derive(Clone, Debug)]
pub struct ChosenDevice {
    /// The device, without autodiff.
    pub device: Device,
    /// For people: kind, index, name.
    pub description: String,
}

/// Device names of this build, best first, for messages and `doctor`.
pub fn names() -> Vec<&'static str> {
    let mut names = vec![];
    if cfg!(feature = "cuda") {
        names.push("cuda");
    }
    if cfg!(feature = "vulkan") {
        names.push("vulkan");
    }
    if cfg!(feature = "metal") {
        names.push("metal");
    }
    if cfg!(feature = "wgpu") {
        names.push("wgpu");
    }
    if cfg!(feature = "flex") {
        names.push("cpu");
    }
    names
}

/// The devices behind one name, in the order of their index.
pub fn list(name: &str) -> Vec<Device> {
    use burn::tensor::DeviceType;
    match name {
        #[cfg(feature = "cuda")]
        "cuda" => Device::enumerate(DeviceType::Cuda).into_iter().collect(),
        #[cfg(feature = "vulkan")]
        "vulkan" => Device::enumerate(DeviceType::Vulkan).into_iter().collect(),
        #[cfg(feature = "metal")]
        "metal" => Device::enumerate(DeviceType::Metal).into_iter().collect(),
        #[cfg(feature = "wgpu")]
        "wgpu" => Device::enumerate(DeviceType::Wgpu).into_iter().collect(),
        #[cfg(feature = "flex")]
        "cpu" => Device::enumerate(DeviceType::Flex).into_iter().collect(),
        _ => vec![],
    }
}

/// Whether a device is a graphics card and not a program that imitates one.
fn is_hardware(device: &Device) -> bool {
    let text = format!("{device:?}");
    text.contains("DiscreteGpu")
        || text.contains("IntegratedGpu")
        || text.contains("VirtualGpu")
        || text.contains("Cuda")
}

/// What a device is called, with the name its driver gives it.
pub fn describe(name: &str, index: usize, device: &Device) -> String {
    #[cfg(any(feature = "wgpu", feature = "vulkan", feature = "metal", feature = "cuda"))]
    if name != "cpu"
        && let Some(identity) = device.identity()
    {
        return format!("{name}:{index} ({})", identity.name);
    }
    let _ = device;
    match name {
        "cpu" => format!("cpu ({} threads)", rayon::current_num_threads()),
        _ => format!("{name}:{index}"),
    }
}

/// Finds the device a configuration names.
///
/// # Errors
/// The name is not in this build, or there is no such device on this machine.
pub fn choose(name: &str) -> Result<ChosenDevice, Problem> {
    if name == "auto" {
        return auto();
    }
    let (kind, index) = match name.split_once(':') {
        Some((kind, index)) => (kind, index.parse::<usize>().ok()),
        None => (name, Some(0)),
    };
    let known = names();
    if !known.contains(&kind) {
        let problem =
            Problem::config(format!("device \"{name}\" is not in this build, which has {}", known.join(", ")));
        return Err(problem.hint(match ["cuda", "vulkan", "metal", "wgpu", "cpu"].contains(&kind) {
            true => format!("build with --features {}, or use device = \"auto\"", kind.replace("cpu", "flex")),
            false => "use auto, cpu, cuda, vulkan, metal or wgpu, with an index as in cuda:1".to_owned(),
        }));
    }
    let devices = list(kind);
    let found = index.and_then(|index| devices.get(index).map(|device| (index, device)));
    let Some((index, device)) = found else {
        let problem = Problem::config(format!(
            "device \"{name}\" not found: this machine has {} of the kind \"{kind}\"",
            devices.len()
        ));
        return Err(problem.hint("lowrank-train doctor lists the devices; device = \"auto\" takes the best one"));
    };
    Ok(ChosenDevice { device: device.clone(), description: describe(kind, index, device) })
}

/// CUDA, then a real GPU through wgpu, then the CPU.
fn auto() -> Result<ChosenDevice, Problem> {
    for kind in names() {
        if let Some((index, device)) =
            list(kind).into_iter().enumerate().find(|(_, device)| kind == "cpu" || is_hardware(device))
        {
            return Ok(ChosenDevice { description: describe(kind, index, &device), device });
        }
    }
    Err(Problem::config("no usable device: this build has no CPU backend and no graphics card was found"))
}

/// The number format of a run as Burn's type.
///
/// # Errors
/// The device cannot compute in it.
pub fn compute_type(dtype: Dtype, chosen: &ChosenDevice) -> Result<FloatDType, Problem> {
    let wanted = match dtype {
        Dtype::F32 => FloatDType::F32,
        Dtype::Bf16 => FloatDType::BF16,
        Dtype::F16 => FloatDType::F16,
    };
    if chosen.device.supports_dtype(wanted) {
        return Ok(wanted);
    }
    let name = format!("{dtype:?}").to_lowercase();
    let others = [("bf16", FloatDType::BF16), ("f16", FloatDType::F16), ("f32", FloatDType::F32)];
    let can = others.into_iter().filter(|(_, dtype)| chosen.device.supports_dtype(*dtype));
    let can: Vec<String> = can.map(|(name, _)| format!("\"{name}\"")).collect();
    Err(Problem::config(format!("device {} does not compute in {name}", chosen.description))
        .hint(format!("use another device, or one of the types it has: dtype = {}", can.join(", "))))
}

/// Which implementation of the kernels a device runs, for the log.
pub fn kernels(description: &str) -> &'static str {
    match description.starts_with("cpu") {
        true => "the CPU's own loops",
        false => {
            "our own for thin and packed products, attention, norms, rotary embedding, gated activations, cross-entropy and \
             optimisers; matrix products by Burn, the rest as plain tensor operations that it fuses"
        }
    }
}

/// Settings of the process. To be called first, before any other thread exists.
///
/// Graphics drivers print an error for a missing XDG_RUNTIME_DIR although nothing is shown on a screen: it is pointed at the
/// folder for temporary files.
pub fn prepare_process() {
    if std::env::var_os("XDG_RUNTIME_DIR").is_none() {
        // SAFETY: no other thread exists yet.
        unsafe { std::env::set_var("XDG_RUNTIME_DIR", std::env::temp_dir()) };
    }
    keep_memory();
}

/// Lets glibc keep freed activations instead of returning them to the system: a training step allocates the same sizes again
/// and again, and fresh pages cost a fault each.
fn keep_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    // SAFETY: mallopt only sets tuning parameters of the allocator.
    unsafe {
        libc::mallopt(libc::M_MMAP_THRESHOLD, 1 << 30);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 1 << 30);
    }
}
