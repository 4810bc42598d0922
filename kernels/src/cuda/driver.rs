//! One CUDA device: context, stream, loaded kernels, and launches.
//!
//! Driver and cuBLASLt are loaded at run time; without them [`Driver::open`] says what is missing.

use std::collections::HashMap;
use std::ffi::{CString, c_void};

use cudarc::driver::result::{self, DriverError};
use cudarc::driver::sys;

use crate::error::KernelError;
use crate::requirements;

include!(concat!(env!("OUT_DIR"), "/fatbins.rs"));

/// Static and dynamic shared memory that a block has without asking.
const PLAIN_SHARED_BYTES: usize = 48 * 1024;

/// A failed driver call as this crate's error.
pub(super) fn failed(op: &'static str) -> impl Fn(DriverError) -> KernelError {
    move |error| KernelError::Device { op, what: format!("{error:?}") }
}

/// A kernel argument.
#[derive(Debug, Clone, Copy)]
pub(super) enum Argument {
    Pointer(u64),
    Int(i32),
    Size(u64),
    Float(f32),
    /// A tensor map, by value.
    Map(sys::CUtensorMap),
}

/// Shape of a launch.
#[derive(Debug, Clone, Copy)]
pub(super) struct Launch {
    pub grid: [u32; 3],
    pub block: u32,
    pub shared_bytes: u32,
    /// The kernel calls `wait_for_previous`: it may start while the kernel before it drains.
    pub overlaps: bool,
    /// Neighbouring blocks that run together and read each other's shared memory; 0 for a kernel that knows no clusters.
    pub cluster: u32,
}

impl Launch {
    /// `x` blocks of `block` threads that overlap with the kernel before.
    pub fn rows(x: usize, block: u32) -> Self {
        Self { grid: [x as u32, 1, 1], block, shared_bytes: 0, overlaps: true, cluster: 0 }
    }

    pub fn grid_y(mut self, y: usize) -> Self {
        self.grid[1] = y as u32;
        self
    }

    pub fn shared(mut self, bytes: usize) -> Self {
        self.shared_bytes = bytes as u32;
        self
    }

    pub fn cluster(mut self, blocks: usize) -> Self {
        self.cluster = blocks as u32;
        self
    }

    /// Starts only when everything before has ended.
    pub fn alone(mut self) -> Self {
        self.overlaps = false;
        self
    }
}

/// The device.
#[derive(Debug)]
pub(super) struct Driver {
    ordinal: usize,
    device: sys::CUdevice,
    context: sys::CUcontext,
    stream: sys::CUstream,
    modules: Vec<sys::CUmodule>,
    kernels: HashMap<&'static str, sys::CUfunction>,
    /// Streaming multiprocessors.
    pub multiprocessors: usize,
    pub capability: (i32, i32),
    pub name: String,
    /// Shared memory that a block may ask for.
    pub shared_bytes: usize,
}

// SAFETY: the handles are process-wide; every call binds the context to its thread first, and the driver locks inside.
unsafe impl Send for Driver {}
// SAFETY: as above; no call changes a field.
unsafe impl Sync for Driver {}

/// Kernels by name: file and every `extern "C"` kernel in it.
const KERNELS: &[(&str, &[&str])] = &[
    ("rows", &["gather_rows", "embed_rows", "scatter_rows", "scatter_add_rows", "repeat_frames", "normalise_frames"]),
    ("grid", &["patch_angles", "interpolate_grids"]),
    ("norm", &["rms_norm", "add_rms_norm", "rms_norm_any", "layer_norm", "add_layer_norm", "layer_norm_any"]),
    ("activation", &["swiglu", "gelu", "add"]),
    (
        "rope",
        &[
            "rope_table",
            "rope_gather",
            "qkv_norm_rope_cache_write_any",
            "qkv_norm_rope_cache_write_d64",
            "qkv_norm_rope_cache_write_d128",
            "qkv_norm_rope_cache_write_d256",
        ],
    ),
    ("attention", &["paged_attention_any", "segment_attention_any"]),
    ("argmax", &["argmax_rows"]),
    ("sample", &["sample_rows"]),
];

/// The tables of all launchers.
fn tables() -> impl Iterator<Item = &'static [(&'static str, &'static [&'static str])]> {
    [KERNELS, super::attention::KERNELS, super::skinny::KERNELS, super::gated_linear::KERNELS].into_iter()
}

impl Driver {
    /// Opens device `ordinal`.
    ///
    /// # Errors
    /// [`KernelError::NoDevice`] that says what is missing: driver, device, capability, cuBLASLt.
    pub fn open(ordinal: usize) -> Result<Self, KernelError> {
        // SAFETY: loads the libraries by name, which runs their initialisers only.
        let present = unsafe { [sys::is_culib_present(), cudarc::cublaslt::sys::is_culib_present()] };
        requirements::libraries(present[0], present[1])?;
        let dead = |error| KernelError::NoDevice(format!("the driver does not start: {error:?}"));
        result::init().map_err(dead)?;
        let mut version = 0;
        // SAFETY: writes one integer.
        unsafe { sys::cuDriverGetVersion(&raw mut version) }.result().map_err(failed("cuDriverGetVersion"))?;
        requirements::driver(version)?;
        let count = result::device::get_count().map_err(failed("cuDeviceGetCount"))?;
        let index = requirements::ordinal(ordinal, count)?;
        let device = result::device::get(index).map_err(failed("cuDeviceGet"))?;
        let name = result::device::get_name(device).map_err(failed("cuDeviceGetName"))?;
        use sys::CUdevice_attribute as Attribute;
        // SAFETY: the device is valid.
        let attribute =
            |which| unsafe { result::device::get_attribute(device, which) }.map_err(failed("cuDeviceGetAttribute"));
        let capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
        );
        requirements::capability(&name, capability)?;
        let multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as usize;
        let shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)? as usize;
        // SAFETY: the device is valid; `drop` releases what is retained here.
        let context = unsafe { result::primary_ctx::retain(device) }.map_err(failed("cuDevicePrimaryCtxRetain"))?;
        // SAFETY: the context was just retained.
        unsafe { result::ctx::set_current(context) }.map_err(failed("cuCtxSetCurrent"))?;
        let stream =
            result::stream::create(result::stream::StreamKind::NonBlocking).map_err(failed("cuStreamCreate"))?;
        let mut driver = Self {
            ordinal,
            device,
            context,
            stream,
            modules: Vec::new(),
            kernels: HashMap::new(),
            multiprocessors,
            capability,
            name,
            shared_bytes,
        };
        driver.load()?;
        Ok(driver)
    }

    fn load(&mut self) -> Result<(), KernelError> {
        for (stem, names) in tables().flat_map(|table| table.iter()) {
            let image = FATBINS.iter().find(|(own, _)| own == stem);
            let no_kernel = |name: &str| KernelError::Device { op: "load", what: format!("no kernel {stem}/{name}") };
            let (_, image) = image.ok_or_else(|| no_kernel(""))?;
            // SAFETY: the image is a whole fatbin that nvcc made.
            let module =
                unsafe { result::module::load_data(image.as_ptr().cast()) }.map_err(failed("cuModuleLoadData"))?;
            self.modules.push(module);
            for name in *names {
                let text = CString::new(*name).map_err(|_| no_kernel(name))?;
                // SAFETY: the module stays loaded as long as `self`.
                let kernel = unsafe { result::module::get_function(module, text) }.map_err(|_| no_kernel(name))?;
                self.kernels.insert(name, kernel);
            }
        }
        Ok(())
    }

    /// Which device of the machine this is.
    pub fn ordinal(&self) -> usize {
        self.ordinal
    }

    /// The stream that everything runs on. The context is current on the calling thread afterwards.
    pub fn stream(&self) -> Result<sys::CUstream, KernelError> {
        self.bind()?;
        Ok(self.stream)
    }

    /// The stream, for a caller that has bound the context.
    pub fn raw_stream(&self) -> sys::CUstream {
        self.stream
    }

    /// Whether what is launched is recorded rather than run.
    pub fn recording(&self) -> Result<bool, KernelError> {
        let stream = self.stream()?;
        // SAFETY: the stream lives as long as `self`.
        let status = unsafe { result::stream::is_capturing(stream) }.map_err(failed("cuStreamIsCapturing"))?;
        Ok(status != sys::CUstreamCaptureStatus::CU_STREAM_CAPTURE_STATUS_NONE)
    }

    /// Milliseconds that the device takes for what `run` launches; infinite if it launches nothing.
    pub fn time(&self, run: impl FnOnce() -> bool) -> Result<f32, KernelError> {
        let stream = self.stream()?;
        let event = || result::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(failed("cuEventCreate"));
        let (start, end) = (event()?, event()?);
        // SAFETY: events and stream are valid; the events are destroyed once, after their last use.
        unsafe {
            result::event::record(start, stream).map_err(failed("cuEventRecord"))?;
            let ran = run();
            result::event::record(end, stream).map_err(failed("cuEventRecord"))?;
            result::event::synchronize(end).map_err(failed("cuEventSynchronize"))?;
            let time = result::event::elapsed(start, end).map_err(failed("cuEventElapsedTime"));
            let _ = result::event::destroy(start);
            let _ = result::event::destroy(end);
            time.map(|time| if ran { time } else { f32::INFINITY })
        }
    }

    /// Makes the context current on the calling thread.
    pub fn bind(&self) -> Result<(), KernelError> {
        // SAFETY: the context lives as long as `self`.
        unsafe { result::ctx::set_current(self.context) }.map_err(failed("cuCtxSetCurrent"))
    }

    /// Launches `kernel`. An empty grid launches nothing.
    ///
    /// `arguments` must be those of the kernel's declaration, in number, order and size: the driver cannot check them, the
    /// tests of each op do. Pointers must stay valid until the stream has passed this launch.
    pub fn launch(&self, kernel: &'static str, shape: Launch, arguments: &[Argument]) -> Result<(), KernelError> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        if shape.grid[1] > 65_535 || shape.grid[2] > 65_535 {
            return Err(KernelError::Shape { op: kernel, what: format!("a grid of {:?} blocks", shape.grid) });
        }
        let missing = || KernelError::Device { op: kernel, what: "the kernel is not loaded".into() };
        let function = *self.kernels.get(kernel).ok_or_else(missing)?;
        let mut pointers: Vec<*mut c_void> = arguments
            .iter()
            .map(|argument| match argument {
                Argument::Pointer(value) | Argument::Size(value) => (value as *const u64).cast_mut().cast(),
                Argument::Int(value) => (value as *const i32).cast_mut().cast(),
                Argument::Float(value) => (value as *const f32).cast_mut().cast(),
                Argument::Map(value) => (value as *const sys::CUtensorMap).cast_mut().cast(),
            })
            .collect();
        use sys::CUlaunchAttributeID as Id;
        let mut attributes = Vec::with_capacity(2);
        let mut attribute = |id, set: &dyn Fn(&mut sys::CUlaunchAttributeValue)| {
            let mut value = sys::CUlaunchAttributeValue { pad: [0; 64] };
            set(&mut value);
            attributes.push(sys::CUlaunchAttribute_st { id, pad: [0; 4], value });
        };
        if shape.overlaps && self.capability >= (9, 0) {
            let id = Id::CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION;
            attribute(id, &|value| value.programmaticStreamSerializationAllowed = 1);
        }
        if shape.cluster > 0 {
            let x = shape.cluster;
            let dimension = sys::CUlaunchAttributeValue_union__bindgen_ty_1 { x, y: 1, z: 1 };
            attribute(Id::CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, &|value| value.clusterDim = dimension);
        }
        let config = sys::CUlaunchConfig_st {
            gridDimX: shape.grid[0],
            gridDimY: shape.grid[1],
            gridDimZ: shape.grid[2],
            blockDimX: shape.block,
            blockDimY: 1,
            blockDimZ: 1,
            sharedMemBytes: shape.shared_bytes,
            hStream: self.stream()?,
            attrs: attributes.as_mut_ptr(),
            numAttrs: attributes.len() as u32,
        };
        // SAFETY: the function and the stream are of this context; arguments are as the caller promises, and the driver
        // copies them before it returns.
        unsafe { sys::cuLaunchKernelEx(&raw const config, function, pointers.as_mut_ptr(), std::ptr::null_mut()) }
            .result()
            .map_err(failed(kernel))
    }

    /// A tensor map of the bf16 matrix `[rows, columns]` at `address`: boxes of `[rows, columns]`, 64 columns at most, in swizzled rows of
    /// 128 bytes, with zeros outside of the matrix. The address and a row's bytes must be multiples of 16.
    pub fn matrix_map(
        &self,
        address: u64,
        [rows, columns]: [usize; 2],
        boxes: [usize; 2],
    ) -> Result<Argument, KernelError> {
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let sizes = [columns as u64, rows as u64];
        let (row_bytes, steps) = ([columns as u64 * 2], [1, 1]);
        let boxes = [boxes[1] as u32, boxes[0] as u32];
        // SAFETY: writes the map; reads the arrays, whose lengths are those of two dimensions. The address is only noted.
        unsafe {
            sys::cuTensorMapEncodeTiled(
                &raw mut map,
                sys::CUtensorMapDataType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                address as *mut c_void,
                sizes.as_ptr(),
                row_bytes.as_ptr(),
                boxes.as_ptr(),
                steps.as_ptr(),
                sys::CUtensorMapInterleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
                sys::CUtensorMapFloatOOBfill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        }
        .result()
        .map_err(failed("cuTensorMapEncodeTiled"))?;
        Ok(Argument::Map(map))
    }

    /// Lets blocks of `kernel` use up to `bytes` of dynamic shared memory.
    pub fn allow_shared(&self, kernel: &'static str, bytes: usize) -> Result<(), KernelError> {
        let Some(function) = self.kernels.get(kernel).filter(|_| bytes > PLAIN_SHARED_BYTES) else { return Ok(()) };
        self.bind()?;
        let which = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
        // SAFETY: the function is of this context.
        unsafe { result::function::set_function_attribute(*function, which, bytes as i32) }.map_err(failed(kernel))
    }

    /// Waits until the stream is empty.
    pub fn synchronize(&self) -> Result<(), KernelError> {
        let stream = self.stream()?;
        // SAFETY: the stream lives as long as `self`.
        unsafe { result::stream::synchronize(stream) }.map_err(failed("cuStreamSynchronize"))
    }

    /// Free and total bytes of the device.
    pub fn memory(&self) -> Result<(usize, usize), KernelError> {
        self.bind()?;
        result::mem_get_info().map_err(failed("cuMemGetInfo"))
    }
}

impl Drop for Driver {
    fn drop(&mut self) {
        if self.bind().is_err() {
            return;
        }
        // SAFETY: nothing uses the handles after this; a failure leaves them to the end of the process.
        unsafe {
            let _ = result::stream::synchronize(self.stream);
            for module in self.modules.drain(..) {
                let _ = result::module::unload(module);
            }
            let _ = result::stream::destroy(self.stream);
            let _ = result::primary_ctx::release(self.device);
        }
    }
}
