//! Sixteen lanes in plain Rust: the path without AVX2, and the check of the others.

use half::bf16;

use super::{LANES, Lanes};

/// f32 words.
#[derive(Clone, Copy)]
pub(crate) struct F32;

/// Pairs of bf16.
#[derive(Clone, Copy)]
pub(crate) struct Bf16;

macro_rules! memory {
    () => {
        type Words = [u32; LANES];
        type Sums = [f32; LANES];
        const WIDE: bool = false;

        #[inline(always)]
        unsafe fn zero() -> Self::Sums {
            [0.0; LANES]
        }
        #[inline(always)]
        unsafe fn load(from: *const u32) -> Self::Words {
            // SAFETY: the caller gives sixteen readable words.
            unsafe { from.cast::<[u32; LANES]>().read_unaligned() }
        }
        #[inline(always)]
        unsafe fn splat(word: u32) -> Self::Words {
            [word; LANES]
        }
        #[inline(always)]
        unsafe fn load_sums(from: *const f32) -> Self::Sums {
            // SAFETY: the caller gives sixteen readable f32.
            unsafe { from.cast::<[f32; LANES]>().read_unaligned() }
        }
        #[inline(always)]
        unsafe fn store(sums: Self::Sums, to: *mut f32) {
            // SAFETY: the caller gives room for sixteen f32.
            unsafe { to.cast::<[f32; LANES]>().write_unaligned(sums) }
        }
    };
}

impl Lanes for F32 {
    type Element = f32;
    memory!();

    #[inline(always)]
    unsafe fn step(mut sums: Self::Sums, a: Self::Words, b: Self::Words) -> Self::Sums {
        for i in 0..LANES {
            sums[i] += f32::from_bits(a[i]) * f32::from_bits(b[i]);
        }
        sums
    }
}

impl Lanes for Bf16 {
    type Element = bf16;
    memory!();

    #[inline(always)]
    unsafe fn step(mut sums: Self::Sums, a: Self::Words, b: Self::Words) -> Self::Sums {
        for i in 0..LANES {
            sums[i] += f32::from_bits(a[i] << 16) * f32::from_bits(b[i] << 16);
            sums[i] += f32::from_bits(a[i] & 0xffff_0000) * f32::from_bits(b[i] & 0xffff_0000);
        }
        sums
    }
}
