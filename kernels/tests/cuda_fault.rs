//! A kernel that dies on the device: the backend says so as a failed device, at that op and at every later one. An executable
//! of its own, because the fault takes the process's context with it. Skips, and says so, without a device.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

use std::ffi::CString;

use cudarc::driver::{result, sys};
use millrace_kernels::{Backend, CudaBackend, KernelError};

const TRAP: &str = ".version 7.0\n.target sm_80\n.address_size 64\n.visible .entry dies() { trap; }\n";

/// Launches a kernel that traps on `device`'s primary context, the one that the backend uses.
fn die(ordinal: i32) {
    let text = CString::new(TRAP).unwrap();
    let device = result::device::get(ordinal).unwrap();
    // SAFETY: the driver is started; the context is retained by the backend too and released at the process's end; the text is
    // a whole module that ends in 0; the kernel takes no arguments.
    unsafe {
        let context = result::primary_ctx::retain(device).unwrap();
        result::ctx::set_current(context).unwrap();
        let module = result::module::load_data(text.as_ptr().cast()).unwrap();
        let kernel = result::module::get_function(module, CString::new("dies").unwrap()).unwrap();
        let none = std::ptr::null_mut();
        sys::cuLaunchKernel(kernel, 1, 1, 1, 32, 1, 1, 0, none, none.cast(), none.cast()).result().unwrap();
        // It runs on a stream that the backend's does not wait for.
        sys::cuCtxSynchronize().result().unwrap_err();
    }
}

fn is_device_failure<T>(result: Result<T, KernelError>) -> String {
    match result {
        Err(error @ KernelError::Device { .. }) => error.to_string(),
        Err(error) => panic!("another error: {error}"),
        Ok(_) => panic!("no error"),
    }
}

#[test]
fn a_kernel_that_traps_fails_the_device_for_good() {
    let backend = match CudaBackend::new(0, true) {
        Ok(backend) => backend,
        Err(error) => return println!("skipped: {error}"),
    };
    let one = backend.upload(&[1.0; 64], &[8, 8]).unwrap();
    assert_eq!(backend.to_host(&backend.add(&one, &one).unwrap()).unwrap(), [2.0; 64]);
    die(0);
    let said = is_device_failure(backend.synchronize());
    assert!(said.contains("the device failed"), "{said}");
    println!("{said}");
    for _ in 0..2 {
        println!("{}", is_device_failure(backend.add(&one, &one).and_then(|sum| backend.to_host(&sum))));
        is_device_failure(backend.upload(&[1.0; 64], &[8, 8]));
    }
}
