//! Sixteen lanes as two AVX2 registers with FMA.

use std::arch::x86_64::*;

use half::bf16;

use super::{Kernel, Lanes, Vectors};

/// f32 words.
#[derive(Clone, Copy)]
pub(crate) struct F32;

/// Pairs of bf16, widened by shift and mask.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

/// Runs `kernel` in a frame that has AVX2 and FMA.
///
/// # Safety
/// The processor must have both.
#[target_feature(enable = "avx2,fma")]
pub(crate) unsafe fn enter<E: Vectors, K: Kernel<E>>(kernel: K) {
    // SAFETY: this frame has the features.
    unsafe { kernel.call::<E::Avx2>() }
}

macro_rules! memory {
    () => {
        type Words = [__m256i; 2];
        type Sums = [__m256; 2];
        const WIDE: bool = false;

        #[inline(always)]
        unsafe fn zero() -> Self::Sums {
            // SAFETY: AVX2 by the trait's contract.
            unsafe { [_mm256_setzero_ps(); 2] }
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> Self::Words {
            // SAFETY: AVX2 and sixteen readable words by contract.
            unsafe { [_mm256_loadu_si256(from.cast()), _mm256_loadu_si256(from.add(8).cast())] }
        }
        #[inline(always)]
        unsafe fn splat(word: u32) -> Self::Words {
            // SAFETY: AVX2 by contract.
            unsafe { [_mm256_set1_epi32(word as i32); 2] }
        }
        #[inline(always)]
        unsafe fn load_sums(from: *const f32) -> Self::Sums {
            // SAFETY: AVX2 and sixteen readable f32 by contract.
            unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
        }
        #[inline(always)]
        unsafe fn store(sums: Self::Sums, to: *mut f32) {
            // SAFETY: AVX2 and room for sixteen f32 by contract.
            unsafe {
                _mm256_storeu_ps(to, sums[0]);
                _mm256_storeu_ps(to.add(8), sums[1]);
            }
        }
    };
}

impl Lanes for F32 {
    type Element = f32;
    memory!();

    #[inline(always)]
    unsafe fn step(mut sums: Self::Sums, a: Self::Words, b: Self::Words) -> Self::Sums {
        for i in 0..2 {
            // SAFETY: AVX2 and FMA by contract.
            sums[i] = unsafe { _mm256_fmadd_ps(_mm256_castsi256_ps(a[i]), _mm256_castsi256_ps(b[i]), sums[i]) };
        }
        sums
    }
}

impl Lanes for Bf16 {
    type Element = bf16;
    memory!();

    #[inline(always)]
    unsafe fn step(mut sums: Self::Sums, a: Self::Words, b: Self::Words) -> Self::Sums {
        for i in 0..2 {
            // SAFETY: AVX2 and FMA by contract.
            unsafe {
                let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
                let low = |x| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(x));
                let top = |x| _mm256_castsi256_ps(_mm256_and_si256(x, high));
                sums[i] = _mm256_fmadd_ps(low(a[i]), low(b[i]), sums[i]);
                sums[i] = _mm256_fmadd_ps(top(a[i]), top(b[i]), sums[i]);
            }
        }
        sums
    }
}
