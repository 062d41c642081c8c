//! How much memory a run takes: that of its device where the device has its own, else that of the process.
//!
//! A graphics card's memory is what the pools of Burn's allocator hold. They keep what was freed for the next step, so what
//! they reserve is what other programs cannot have, and is at least what tensors use. Memory of the driver itself (CUDA's
//! context, compiled kernels: some hundred MB) is in neither.

use burn::tensor::Device;

use crate::metrics::process_memory;

/// Memory of a device that has its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceMemory {
    /// What tensors use now.
    pub in_use_bytes: u64,
    /// What the pools hold now: the same and what is kept for later.
    pub reserved_bytes: u64,
}

/// What the tensors of a device take; `None` on the CPU. Queued work is handed to the device first, so this is not free.
pub fn device_memory(device: &Device) -> Option<DeviceMemory> {
    let usage = device.memory_pool_usage()?;
    Some(DeviceMemory { in_use_bytes: usage.bytes_in_use, reserved_bytes: usage.bytes_reserved })
}

/// Readings of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Reading {
    /// Taken now.
    pub current_bytes: u64,
    /// Most taken so far: of the process in all its life, of a device in all readings.
    pub peak_bytes: u64,
}

/// Watches the memory of a run. The pools of a device only grow while a run trains, so that readings between steps see the
/// peak within them.
#[derive(Debug)]
pub struct MemoryWatch {
    device: Device,
    peak_bytes: u64,
}

impl MemoryWatch {
    /// Watches the memory that a run on this device takes.
    pub fn new(device: &Device) -> Self {
        Self { device: device.clone(), peak_bytes: 0 }
    }

    /// Whether the device has memory of its own.
    pub fn is_on_device(&self) -> bool {
        device_memory(&self.device).is_some()
    }

    /// Reads it.
    pub fn read(&mut self) -> Reading {
        let Some(memory) = device_memory(&self.device) else {
            let process = process_memory();
            return Reading { current_bytes: process.current_bytes, peak_bytes: process.peak_bytes };
        };
        self.peak_bytes = self.peak_bytes.max(memory.reserved_bytes);
        Reading { current_bytes: memory.reserved_bytes, peak_bytes: self.peak_bytes }
    }
}

#[cfg(all(test, feature = "flex"))]
mod tests {
    use super::*;

    /// Where a Vulkan driver is installed; asking the library itself would panic where none is.
    #[cfg(feature = "wgpu")]
    fn graphics_device() -> Option<Device> {
        let named = ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"].iter().any(|name| std::env::var_os(name).is_some());
        let has_driver = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"]
            .iter()
            .any(|folder| std::fs::read_dir(folder).is_ok_and(|mut files| files.next().is_some()));
        (named || has_driver).then(|| Device::wgpu(Default::default()))
    }

    #[cfg(feature = "wgpu")]
    #[test]
    fn a_graphics_device_has_what_its_tensors_take() {
        let Some(device) = graphics_device() else { return };
        let mut watch = MemoryWatch::new(&device);
        assert!(watch.is_on_device());
        let before = device_memory(&device).map_or(0, |memory| memory.in_use_bytes);
        let values = vec![1.0f32; 1 << 20];
        let data = burn::tensor::TensorData::new(values, [1 << 20]);
        let tensor = burn::tensor::Tensor::<1>::from_data(data, &device);
        let during = device_memory(&device).map_or(0, |memory| memory.in_use_bytes);
        assert!((4 << 20..6 << 20).contains(&(during - before)), "{before} then {during}");
        let reading = watch.read();
        assert!(reading.current_bytes >= during && reading.peak_bytes == reading.current_bytes, "{reading:?}");
        drop(tensor);
        device.sync().unwrap_or_else(|error| unreachable!("{error:?}"));
        device.memory_cleanup();
        let after = device_memory(&device).map_or(0, |memory| memory.in_use_bytes);
        assert!(after < during, "{during} then {after}");
        assert_eq!(watch.read().peak_bytes, reading.peak_bytes);
    }

    #[test]
    fn the_cpu_has_the_memory_of_the_process() {
        let mut watch = MemoryWatch::new(&Device::flex());
        assert_eq!(device_memory(&Device::flex()), None);
        assert!(!watch.is_on_device());
        let (reading, process) = (watch.read(), process_memory());
        assert!(reading.peak_bytes > 1 << 20 && reading.peak_bytes <= process.peak_bytes, "{reading:?} {process:?}");
    }
}
