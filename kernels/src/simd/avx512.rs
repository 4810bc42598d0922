//! Sixteen lanes as one AVX-512 register; bf16 products by `vdpbf16ps`.

use std::arch::x86_64::*;

use half::bf16;

use super::{Kernel, Lanes, Vectors};

/// f32 words.
#[derive(Clone, Copy)]
pub(crate) struct F32;

/// Pairs of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

/// Runs `kernel` in a frame that has AVX-512 with bf16.
///
/// # Safety
/// The processor must have the features named.
#[target_feature(enable = "avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma")]
pub(crate) unsafe fn enter<E: Vectors, K: Kernel<E>>(kernel: K) {
    // SAFETY: this frame has the features.
    unsafe { kernel.call::<E::Avx512>() }
}

macro_rules! memory {
    () => {
        type Words = __m512i;
        type Sums = __m512;
        const WIDE: bool = true;

        #[inline(always)]
        unsafe fn zero() -> Self::Sums {
            // SAFETY: AVX-512 by the trait's contract.
            unsafe { _mm512_setzero_ps() }
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> Self::Words {
            // SAFETY: AVX-512 and sixteen readable words by contract.
            unsafe { _mm512_loadu_si512(from.cast()) }
        }
        #[inline(always)]
        unsafe fn splat(word: u32) -> Self::Words {
            // SAFETY: AVX-512 by contract.
            unsafe { _mm512_set1_epi32(word as i32) }
        }
        #[inline(always)]
        unsafe fn load_sums(from: *const f32) -> Self::Sums {
            // SAFETY: AVX-512 and sixteen readable f32 by contract.
            unsafe { _mm512_loadu_ps(from) }
        }
        #[inline(always)]
        unsafe fn store(sums: Self::Sums, to: *mut f32) {
            // SAFETY: AVX-512 and room for sixteen f32 by contract.
            unsafe { _mm512_storeu_ps(to, sums) }
        }
        #[inline(always)]
        unsafe fn total(sums: Self::Sums) -> f32 {
            // SAFETY: same contract.
            unsafe { Self::total4([sums, sums, sums, sums])[0] }
        }
        #[inline(always)]
        unsafe fn total4([a, b, c, d]: [Self::Sums; 4]) -> [f32; 4] {
            // SAFETY: AVX-512 by contract.
            unsafe {
                // Lanes i + 8, two sums to a register; then i + 4, four sums to a register; then within each quarter.
                let ab = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(a, b), _mm512_shuffle_f32x4::<0xee>(a, b));
                let cd = _mm512_add_ps(_mm512_shuffle_f32x4::<0x44>(c, d), _mm512_shuffle_f32x4::<0xee>(c, d));
                let all = _mm512_add_ps(_mm512_shuffle_f32x4::<0x88>(ab, cd), _mm512_shuffle_f32x4::<0xdd>(ab, cd));
                let two = _mm512_add_ps(all, _mm512_permute_ps::<0xee>(all));
                let one = _mm512_add_ps(two, _mm512_permute_ps::<0x55>(two));
                let quarters =
                    _mm512_permutexvar_ps(_mm512_setr_epi32(0, 4, 8, 12, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), one);
                let mut out = [0f32; 4];
                _mm_storeu_ps(out.as_mut_ptr(), _mm512_castps512_ps128(quarters));
                out
            }
        }
    };
}

impl Lanes for F32 {
    type Element = f32;
    memory!();

    #[inline(always)]
    unsafe fn step(sums: Self::Sums, a: Self::Words, b: Self::Words) -> Self::Sums {
        // SAFETY: AVX-512 by contract.
        unsafe { _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sums) }
    }
}

impl Lanes for Bf16 {
    type Element = bf16;
    memory!();

    #[inline(always)]
    unsafe fn step(sums: Self::Sums, a: Self::Words, b: Self::Words) -> Self::Sums {
        // SAFETY: AVX-512 with bf16 by contract; the transmutes keep all 512 bits.
        unsafe {
            _mm512_dpbf16_ps(
                sums,
                std::mem::transmute::<__m512i, __m512bh>(a),
                std::mem::transmute::<__m512i, __m512bh>(b),
            )
        }
    }
}
