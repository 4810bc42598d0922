//! Sixteen-lane arithmetic for the CPU twins, chosen at run time.
//!
//! A kernel is written once over [`Lanes`]; [`run`] compiles it for each instruction set and picks one. Bits may differ between
//! instruction sets, never between two runs on one.

#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
pub(crate) mod math;
mod portable;

use crate::element::Element;

/// Lanes of one vector: f32 sums, or 32-bit words of elements.
pub(crate) const LANES: usize = 16;

/// Instruction set of the vector kernels.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Isa {
    /// AVX-512 with its bf16 dot product.
    Avx512,
    /// AVX2 with FMA.
    Avx2,
    /// Plain Rust.
    Portable,
}

impl Isa {
    /// The best set this processor has.
    pub fn detect() -> Self {
        [Self::Avx512, Self::Avx2].into_iter().find(|isa| isa.available()).unwrap_or(Self::Portable)
    }

    /// Whether this processor has the set.
    pub fn available(self) -> bool {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512dq")
                    && is_x86_feature_detected!("avx512bf16")
                    && is_x86_feature_detected!("fma")
                    && is_x86_feature_detected!("avx2")
            }
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            #[cfg(not(target_arch = "x86_64"))]
            Self::Avx512 | Self::Avx2 => false,
            Self::Portable => true,
        }
    }
}

/// Sixteen f32 sums, and sixteen words of elements to multiply into them.
///
/// # Safety
/// Every method may only run on a processor that has the instruction set, which [`run`] sees to; pointers must be readable (or
/// writable) for the lengths given.
pub(crate) trait Lanes: Copy {
    /// Element type packed in the words.
    type Element: Element;
    /// Sixteen words: 16 f32 or 32 bf16.
    type Words: Copy;
    /// Sixteen f32 sums.
    type Sums: Copy;
    /// Whether there are registers for tiles of 24 sums (products: 6 rows x 4 columns), else of 4.
    const WIDE: bool;

    /// All zero.
    unsafe fn zero() -> Self::Sums;
    /// Sixteen words from `from`, any alignment.
    unsafe fn load(from: *const u32) -> Self::Words;
    /// The first `elements` elements from `from`, the rest zero; fewer than sixteen words.
    #[inline(always)]
    unsafe fn load_some(from: *const Self::Element, elements: usize) -> Self::Words {
        let mut words = [0u32; LANES];
        // SAFETY: the caller gives `elements` readable elements, which fit sixteen words.
        unsafe {
            std::ptr::copy_nonoverlapping(from, words.as_mut_ptr().cast(), elements);
            Self::load(words.as_ptr())
        }
    }
    /// One word in all lanes.
    unsafe fn splat(word: u32) -> Self::Words;
    /// sums + a * b, lane by lane; with two elements in a word both products are added.
    unsafe fn step(sums: Self::Sums, a: Self::Words, b: Self::Words) -> Self::Sums;
    /// Sixteen f32 from `from`, any alignment.
    unsafe fn load_sums(from: *const f32) -> Self::Sums;
    /// Sixteen f32 to `to`, any alignment.
    unsafe fn store(sums: Self::Sums, to: *mut f32);
    /// Lane i with lane i + 8, then + 4, + 2, + 1.
    #[inline(always)]
    unsafe fn total(sums: Self::Sums) -> f32 {
        let mut lanes = [0f32; LANES];
        // SAFETY: `lanes` holds sixteen f32.
        unsafe { Self::store(sums, lanes.as_mut_ptr()) };
        crate::norm::tree_sum(&lanes)
    }
    /// [`Self::total`] of four.
    #[inline(always)]
    unsafe fn total4(sums: [Self::Sums; 4]) -> [f32; 4] {
        // SAFETY: same contract.
        sums.map(|sums| unsafe { Self::total(sums) })
    }
}

/// Asks for the cache line at `at` ahead of its use. Any address will do.
#[inline(always)]
pub(crate) fn prefetch(at: *const u8) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: the instruction is in every x86-64 processor, and never faults.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(at.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = at;
}

/// Elements that have vector arithmetic.
pub(crate) trait Vectors: Element {
    #[cfg(target_arch = "x86_64")]
    type Avx512: Lanes<Element = Self>;
    #[cfg(target_arch = "x86_64")]
    type Avx2: Lanes<Element = Self>;
    type Portable: Lanes<Element = Self>;
}

impl Vectors for f32 {
    #[cfg(target_arch = "x86_64")]
    type Avx512 = avx512::F32;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = avx2::F32;
    type Portable = portable::F32;
}

impl Vectors for half::bf16 {
    #[cfg(target_arch = "x86_64")]
    type Avx512 = avx512::Bf16;
    #[cfg(target_arch = "x86_64")]
    type Avx2 = avx2::Bf16;
    type Portable = portable::Bf16;
}

/// Code to compile for each instruction set. `call` and what it calls must be `#[inline(always)]`.
pub(crate) trait Kernel<E> {
    /// Does the work.
    ///
    /// # Safety
    /// The processor must have the instruction set of `L`.
    unsafe fn call<L: Lanes<Element = E>>(self);
}

/// Runs `kernel` with the arithmetic of `isa`, or the portable one if the processor lacks it.
pub(crate) fn run<E: Vectors>(isa: Isa, kernel: impl Kernel<E>) {
    match isa {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: availability was checked.
        Isa::Avx512 if isa.available() => unsafe { avx512::enter::<E, _>(kernel) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: availability was checked.
        Isa::Avx2 if isa.available() => unsafe { avx2::enter::<E, _>(kernel) },
        // SAFETY: plain Rust runs everywhere.
        _ => unsafe { kernel.call::<E::Portable>() },
    }
}
