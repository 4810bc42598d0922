//! What a CUDA device must be to be used: decisions about facts that the driver told, apart from the driver, so that each of
//! them has a test without a device.

use crate::error::KernelError;

/// The oldest compute capability is that of the generic kernels' machine code.
const OLDEST_CAPABILITY: (i32, i32) = (8, 0);
/// Driver that knows CUDA 13.
const OLDEST_DRIVER: i32 = 13_000;

fn missing(what: String) -> KernelError {
    KernelError::NoDevice(what)
}

/// Errors without the two libraries that are loaded at run time.
pub(crate) fn libraries(driver: bool, cublas: bool) -> Result<(), KernelError> {
    if !driver {
        return Err(missing("libcuda.so is not installed: there is no NVIDIA driver".into()));
    }
    if !cublas {
        let what = "libcublasLt.so.13 is not on the library path; install CUDA 13's cuBLAS or set LD_LIBRARY_PATH";
        return Err(missing(what.into()));
    }
    Ok(())
}

/// Errors if the driver is too old; `version` as `cuDriverGetVersion` gives it.
pub(crate) fn driver(version: i32) -> Result<(), KernelError> {
    if version >= OLDEST_DRIVER {
        return Ok(());
    }
    let dotted = |version: i32| format!("{}.{}", version / 1000, version % 1000 / 10);
    let (known, needed) = (dotted(version), dotted(OLDEST_DRIVER));
    Err(missing(format!(
        "the driver is too old: it knows CUDA {known}, {needed} is needed; install driver 580 or newer"
    )))
}

/// Number of device `ordinal` among `count`.
pub(crate) fn ordinal(ordinal: usize, count: i32) -> Result<i32, KernelError> {
    let index = i32::try_from(ordinal).ok().filter(|index| *index < count);
    index.ok_or_else(|| {
        missing(match count {
            ..=0 => format!("cuda:{ordinal} does not exist: the driver shows no device; check CUDA_VISIBLE_DEVICES"),
            1 => format!("cuda:{ordinal} does not exist: the only device is cuda:0"),
            _ => format!("cuda:{ordinal} does not exist: there are cuda:0 to cuda:{}", count - 1),
        })
    })
}

/// Errors if the device called `name` is older than our kernels' machine code.
pub(crate) fn capability(name: &str, (major, minor): (i32, i32)) -> Result<(), KernelError> {
    if (major, minor) >= OLDEST_CAPABILITY {
        return Ok(());
    }
    let (a, b) = OLDEST_CAPABILITY;
    Err(missing(format!("{name} has compute capability {major}.{minor}, at least {a}.{b} (Ampere) is needed")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[track_caller]
    fn refuses<T: std::fmt::Debug>(result: Result<T, KernelError>, text: &str) {
        let error = result.unwrap_err();
        assert!(matches!(error, KernelError::NoDevice(_)));
        assert_eq!(error.to_string(), format!("no CUDA device: {text}"));
    }

    #[test]
    fn missing_libraries_are_named() {
        refuses(libraries(false, true), "libcuda.so is not installed: there is no NVIDIA driver");
        refuses(
            libraries(true, false),
            "libcublasLt.so.13 is not on the library path; install CUDA 13's cuBLAS or set LD_LIBRARY_PATH",
        );
        assert!(libraries(true, true).is_ok());
    }

    #[test]
    fn an_old_driver_is_refused() {
        refuses(
            driver(12_080),
            "the driver is too old: it knows CUDA 12.8, 13.0 is needed; install driver 580 or newer",
        );
        refuses(driver(0), "the driver is too old: it knows CUDA 0.0, 13.0 is needed; install driver 580 or newer");
        assert!([13_000, 13_010, 14_000].into_iter().all(|version| driver(version).is_ok()));
    }

    #[test]
    fn an_ordinal_is_one_of_the_devices() {
        assert_eq!((ordinal(0, 1).unwrap(), ordinal(7, 8).unwrap()), (0, 7));
        refuses(ordinal(0, 0), "cuda:0 does not exist: the driver shows no device; check CUDA_VISIBLE_DEVICES");
        refuses(ordinal(1, 1), "cuda:1 does not exist: the only device is cuda:0");
        refuses(ordinal(8, 8), "cuda:8 does not exist: there are cuda:0 to cuda:7");
        refuses(ordinal(usize::MAX, 2), "cuda:18446744073709551615 does not exist: there are cuda:0 to cuda:1");
    }

    #[test]
    fn an_old_device_is_refused() {
        refuses(
            capability("Tesla V100-SXM2-16GB", (7, 0)),
            "Tesla V100-SXM2-16GB has compute capability 7.0, at least 8.0 (Ampere) is needed",
        );
        refuses(capability("T4", (7, 5)), "T4 has compute capability 7.5, at least 8.0 (Ampere) is needed");
        assert!([(8, 0), (8, 6), (9, 0), (10, 0), (12, 1)].into_iter().all(|own| capability("x", own).is_ok()));
    }
}
