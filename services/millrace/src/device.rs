//! Which device an engine runs on, from what the configuration asks for.

use millrace_config::DeviceChoice;
use millrace_executor::DeviceKind;

/// The device; `auto` takes the first CUDA device that works, and says in the log why it is none.
pub fn device_kind(choice: DeviceChoice) -> DeviceKind {
    match choice {
        DeviceChoice::Cpu => DeviceKind::Cpu,
        DeviceChoice::Cuda(ordinal) => DeviceKind::Cuda(ordinal),
        DeviceChoice::Auto => {
            let (device, reason) = DeviceKind::best();
            if let Some(reason) = reason {
                tracing::info!(reason, "running on the CPU");
            }
            device
        }
    }
}
