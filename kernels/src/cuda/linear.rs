//! Linear layers: few rows by our own kernels (see `skinny`), others by cuBLASLt with one plan (layouts and algorithm) for each problem
//! seen, chosen by its heuristic once.
//!
//! cuBLASLt is column-major: a row-major `x [T, K]` is its `[K, T]`, so `y^T [N, T] = W^T x^T` with W read transposed.

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::{Arc, Mutex, PoisonError};

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys;

use super::ahead::Ahead;
use super::driver::Driver;
use super::memory::{Memory, Owned};
use super::skinny;
use super::tensor::CudaTensor;
use crate::device_memory::MemoryKind;
use crate::error::KernelError;

/// What cuBLASLt may use beside its operands.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Split-K sums in f32 only: partial sums in bf16 would round twice.
const F32_REDUCTIONS: u32 = 0b011;

/// Proposals that are tried for a problem, and how often.
const PROPOSALS: usize = 6;
const TRIES: usize = 2;
/// Rows beyond which more of them change nothing about which algorithm is fastest.
const MANY_ROWS: usize = 4096;

/// `CUBLAS_OP_T`.
const TRANSPOSED: i32 = 1;

fn failed(call: &'static str) -> impl Fn(CublasError) -> KernelError {
    move |error| KernelError::Device { op: call, what: format!("{error:?}") }
}

/// A problem: rows, inputs, outputs, and whether there is a bias; and how far its pointers are aligned.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Problem {
    rows: usize,
    inputs: usize,
    outputs: usize,
    bias: bool,
    align: u32,
}

/// Descriptors and algorithm of one problem.
#[derive(Debug)]
struct Plan {
    description: sys::cublasLtMatmulDesc_t,
    weight: sys::cublasLtMatrixLayout_t,
    input: sys::cublasLtMatrixLayout_t,
    output: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
    /// The library's proposals, best first by its own reckoning.
    others: Vec<sys::cublasLtMatmulAlgo_t>,
}

/// cuBLASLt and its plans.
#[derive(Debug)]
pub(super) struct Linear {
    driver: Arc<Driver>,
    /// What linears of few rows ask for ahead of its use.
    pub ahead: Ahead,
    handle: sys::cublasLtHandle_t,
    workspace: Owned,
    plans: Mutex<HashMap<Problem, Plan>>,
    /// The fastest algorithm of problems of about this many rows, found by trying.
    tuned: Mutex<HashMap<Problem, sys::cublasLtMatmulAlgo_t>>,
}

// SAFETY: a cuBLASLt handle may be used from several threads; plans are behind a lock.
unsafe impl Send for Linear {}
// SAFETY: as above.
unsafe impl Sync for Linear {}

impl Linear {
    pub fn new(driver: &Arc<Driver>, memory: &Memory) -> Result<Self, KernelError> {
        skinny::prepare(driver)?;
        driver.bind()?;
        let handle = result::create_handle().map_err(failed("cublasLtCreate"))?;
        let workspace = memory.allocate(MemoryKind::Scratch, WORKSPACE_BYTES)?;
        let (driver, ahead) = (driver.clone(), Ahead::default());
        Ok(Self { driver, ahead, handle, workspace, plans: Mutex::default(), tuned: Mutex::default() })
    }

    /// `out [T, N] = x [T, K] w [N, K]^T (+ bias [N])`, shapes checked by the caller, none of them empty.
    pub fn run(
        &self,
        x: &CudaTensor,
        w: &CudaTensor,
        bias: Option<&CudaTensor>,
        out: &CudaTensor,
        sizes: [usize; 3],
    ) -> Result<(), KernelError> {
        if skinny::run(&self.driver, &self.ahead, [x, w, out], bias, sizes, false)? {
            return Ok(());
        }
        self.run_library(x, w, bias, out, sizes)
    }

    /// SwiGLU of `x [T, K] w [N, K]^T` -> `out [T, N / 2]` in one launch; false if there is none for these sizes.
    pub fn run_gated(
        &self,
        x: &CudaTensor,
        w: &CudaTensor,
        out: &CudaTensor,
        sizes: [usize; 3],
    ) -> Result<bool, KernelError> {
        skinny::run(&self.driver, &self.ahead, [x, w, out], None, sizes, true)
    }

    fn run_library(
        &self,
        x: &CudaTensor,
        w: &CudaTensor,
        bias: Option<&CudaTensor>,
        out: &CudaTensor,
        [rows, inputs, outputs]: [usize; 3],
    ) -> Result<(), KernelError> {
        self.driver.bind()?;
        let pointers = [x.address(), w.address(), out.address(), bias.map_or(0, CudaTensor::address)];
        let widths = [inputs as u64 * 2, outputs as u64 * 2];
        let align = pointers
            .iter()
            .chain(&widths)
            .fold(256, |align: u64, value| if *value == 0 { align } else { align.min(1 << value.trailing_zeros()) });
        let problem = Problem { rows, inputs, outputs, bias: bias.is_some(), align: align as u32 };
        let mut plans = self.plans.lock().unwrap_or_else(PoisonError::into_inner);
        let plan = match plans.entry(problem) {
            std::collections::hash_map::Entry::Occupied(known) => known.into_mut(),
            std::collections::hash_map::Entry::Vacant(free) => {
                let mut plan = self.plan(problem)?;
                self.choose(problem, &mut plan, [x, w, out], bias)?;
                free.insert(plan)
            }
        };
        self.multiply(plan, &plan.algorithm, [x, w, out], bias).map_err(failed("cublasLtMatmul"))
    }

    /// Starts the product of `plan` by `algorithm`.
    fn multiply(
        &self,
        plan: &Plan,
        algorithm: &sys::cublasLtMatmulAlgo_t,
        [x, w, out]: [&CudaTensor; 3],
        bias: Option<&CudaTensor>,
    ) -> Result<(), CublasError> {
        let stream = self.driver.raw_stream();
        if let Some(bias) = bias {
            let (which, pointer) =
                (sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER, bias.address());
            // SAFETY: the descriptor is valid and the attribute is a pointer.
            unsafe { result::set_matmul_desc_attribute(plan.description, which, (&raw const pointer).cast(), 8) }?;
        }
        let (one, zero) = (1.0f32, 0.0f32);
        // SAFETY: the plan's layouts describe these tensors, whose sizes the caller checked; the workspace has the size that
        // the heuristic was told; everything lives until the stream has passed (see `memory`).
        unsafe {
            result::matmul(
                self.handle,
                plan.description,
                (&raw const one).cast(),
                (&raw const zero).cast(),
                w.address() as *const c_void,
                plan.weight,
                x.address() as *const c_void,
                plan.input,
                out.address() as *const c_void,
                plan.output,
                out.address() as *mut c_void,
                plan.output,
                algorithm,
                self.workspace.pointer as *mut c_void,
                WORKSPACE_BYTES,
                stream.cast(),
            )
        }
    }

    /// Puts the fastest of the library's proposals into `plan`, tried once for problems of about as many rows. Where it cannot
    /// be tried (a step is being recorded) or fails, the library's first proposal stays.
    fn choose(
        &self,
        problem: Problem,
        plan: &mut Plan,
        tensors: [&CudaTensor; 3],
        bias: Option<&CudaTensor>,
    ) -> Result<(), KernelError> {
        if plan.others.is_empty() || self.driver.recording()? {
            return Ok(());
        }
        let class = Problem { rows: problem.rows.next_power_of_two().min(MANY_ROWS), ..problem };
        let mut tuned = self.tuned.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = tuned.get(&class) {
            // It was found for other rows: this problem's list says whether it fits here.
            if let Some(same) = plan.others.iter().find(|own| own.data == known.data) {
                plan.algorithm = *same;
            }
            return Ok(());
        }
        let mut best = f32::INFINITY;
        let candidates = std::mem::take(&mut plan.others);
        for candidate in &candidates {
            let run = || self.multiply(plan, candidate, tensors, bias).is_ok();
            if !run() {
                continue;
            }
            let mut least = f32::INFINITY;
            for _ in 0..TRIES {
                least = least.min(self.driver.time(run)?);
            }
            if least < best {
                (best, plan.algorithm) = (least, *candidate);
            }
        }
        plan.others = candidates;
        tuned.insert(class, plan.algorithm);
        Ok(())
    }

    fn plan(&self, problem: Problem) -> Result<Plan, KernelError> {
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        let Problem { rows, inputs, outputs, bias, align } = problem;
        let (single, half) = (sys::cudaDataType_t::CUDA_R_32F, sys::cudaDataType_t::CUDA_R_16BF);
        let description = result::create_matmul_desc(sys::cublasComputeType_t::CUBLAS_COMPUTE_32F, single)
            .map_err(failed("cublasLtMatmulDescCreate"))?;
        set(description, Attribute::CUBLASLT_MATMUL_DESC_TRANSA, &TRANSPOSED)?;
        if bias {
            set(
                description,
                Attribute::CUBLASLT_MATMUL_DESC_EPILOGUE,
                &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS,
            )?;
        }
        let layout = |rows: usize, columns: usize| {
            result::create_matrix_layout(half, rows as u64, columns as u64, rows as i64)
                .map_err(failed("cublasLtMatrixLayoutCreate"))
        };
        let (weight, input, output) = (layout(inputs, outputs)?, layout(inputs, rows)?, layout(outputs, rows)?);
        let preference = result::create_matmul_pref().map_err(failed("cublasLtMatmulPreferenceCreate"))?;
        use sys::cublasLtMatmulPreferenceAttributes_t as Preference;
        let prefer = |which, value: &[u8]| {
            // SAFETY: the preference is valid and the value has the attribute's size.
            unsafe { result::set_matmul_pref_attribute(preference, which, value.as_ptr().cast(), value.len()) }
                .map_err(failed("cublasLtMatmulPreferenceSetAttribute"))
        };
        prefer(Preference::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &WORKSPACE_BYTES.to_ne_bytes())?;
        prefer(Preference::CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, &F32_REDUCTIONS.to_ne_bytes())?;
        for operand in [
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
            Preference::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
        ] {
            prefer(operand, &align.to_ne_bytes())?;
        }
        // SAFETY: a result is plain data that may be all zeros.
        let mut found: [sys::cublasLtMatmulHeuristicResult_t; PROPOSALS] = unsafe { std::mem::zeroed() };
        let mut count = 0;
        // SAFETY: all handles were just made, and `found` has room for as many as are asked for.
        let asked = unsafe {
            sys::cublasLtMatmulAlgoGetHeuristic(
                self.handle,
                description,
                weight,
                input,
                output,
                output,
                preference,
                PROPOSALS as i32,
                found.as_mut_ptr(),
                &raw mut count,
            )
        };
        // SAFETY: made above, used nowhere else.
        let _ = unsafe { result::destroy_matmul_pref(preference) };
        asked.result().map_err(failed("cublasLtMatmulAlgoGetHeuristic"))?;
        let good = |own: &&sys::cublasLtMatmulHeuristicResult_t| own.state.result().is_ok();
        let others: Vec<_> = found.iter().take(count as usize).filter(good).map(|own| own.algo).collect();
        let algorithm = *others.first().ok_or_else(|| KernelError::Unsupported {
            op: "linear",
            what: format!("cuBLASLt has no algorithm for {rows} x {inputs} x {outputs}"),
        })?;
        Ok(Plan { description, weight, input, output, algorithm, others })
    }
}

fn set<T>(
    description: sys::cublasLtMatmulDesc_t,
    which: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), KernelError> {
    // SAFETY: the descriptor is valid, and every caller passes a value of the attribute's type.
    unsafe { result::set_matmul_desc_attribute(description, which, (value as *const T).cast(), size_of::<T>()) }
        .map_err(failed("cublasLtMatmulDescSetAttribute"))
}

impl Drop for Linear {
    fn drop(&mut self) {
        if self.driver.synchronize().is_err() {
            return;
        }
        let plans = std::mem::take(&mut *self.plans.lock().unwrap_or_else(PoisonError::into_inner));
        for plan in plans.into_values() {
            // SAFETY: made in `plan`, freed once.
            unsafe {
                let _ = result::destroy_matmul_desc(plan.description);
                for layout in [plan.weight, plan.input, plan.output] {
                    let _ = result::destroy_matrix_layout(layout);
                }
            }
        }
        // SAFETY: made in `new`, freed once.
        let _ = unsafe { result::destroy_handle(self.handle) };
    }
}
