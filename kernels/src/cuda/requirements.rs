//! What a device and its driver must be for this build: decisions alone, so that every refusal is tested without a device.

use crate::error::KernelError;

/// Newest compute capability that the generic code must run on is open; the oldest is that of its machine code.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);
/// Driver that knows CUDA 13.
const OLDEST_DRIVER: i32 = 13_000;

/// Refuses a driver that is too old; `version` is 1000 times CUDA's major version plus 10 times its minor one.
pub(super) fn driver(version: i32) -> Result<(), KernelError> {
    if version >= OLDEST_DRIVER {
        return Ok(());
    }
    let (major, minor) = (version / 1000, version % 1000 / 10);
    Err(KernelError::NoDevice(format!("the driver knows CUDA {major}.{minor}, 13.0 is needed")))
}

/// The driver's number of device `ordinal`, if there are so many.
pub(super) fn device(ordinal: usize, count: i32) -> Result<i32, KernelError> {
    let index = i32::try_from(ordinal).ok().filter(|index| *index < count);
    index.ok_or_else(|| KernelError::NoDevice(format!("device {ordinal} of {count}")))
}

/// Refuses a device whose compute capability is too old.
pub(super) fn capability(name: &str, capability: (i32, i32)) -> Result<(), KernelError> {
    if capability >= OLDEST_CAPABILITY {
        return Ok(());
    }
    let ((major, minor), (a, b)) = (capability, OLDEST_CAPABILITY);
    Err(KernelError::NoDevice(format!("{name} has compute capability {major}.{minor}, at least {a}.{b} is needed")))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused<T: std::fmt::Debug>(result: Result<T, KernelError>) -> String {
        match result {
            Err(KernelError::NoDevice(what)) => what,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_driver_before_cuda_13_is_refused_by_its_version() {
        assert_eq!(refused(driver(12_090)), "the driver knows CUDA 12.9, 13.0 is needed");
        assert_eq!(refused(driver(0)), "the driver knows CUDA 0.0, 13.0 is needed");
        assert!(driver(13_000).is_ok() && driver(13_020).is_ok() && driver(14_000).is_ok());
    }

    #[test]
    fn a_device_that_is_not_there_is_refused_with_the_count() {
        assert_eq!(refused(device(0, 0)), "device 0 of 0");
        assert_eq!(refused(device(3, 2)), "device 3 of 2");
        assert_eq!(refused(device(usize::MAX, 8)), format!("device {} of 8", usize::MAX));
        assert_eq!((device(0, 1).unwrap(), device(7, 8).unwrap()), (0, 7));
    }

    #[test]
    fn a_capability_before_the_generic_code_is_refused_by_name() {
        assert_eq!(refused(capability("T4", (7, 5))), "T4 has compute capability 7.5, at least 8.0 is needed");
        for newer in [(8, 0), (8, 9), (9, 0), (10, 3), (12, 0)] {
            assert!(capability("x", newer).is_ok(), "{newer:?}");
        }
    }
}
