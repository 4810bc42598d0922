//! The two element types of activations and weights, with their one conversion each way.
//!
//! Owns rounding: `narrow` is the only place where the CPU twin rounds f32 to the model's type.

use half::bf16;

/// An element of activations and weights.
pub trait Element: candle_core::WithDType + Default {
    /// Elements that fill one 32-bit word: the unit that the vector code steps by.
    const PER_WORD: usize;
    /// Whether narrowing loses bits.
    const ROUNDS: bool;
    /// Exact value as f32.
    fn widen(self) -> f32;
    /// Round to nearest, ties to even; NaN stays NaN.
    fn narrow(value: f32) -> Self;
    /// The same value after one rounding to this type.
    #[inline(always)]
    fn round(value: f32) -> f32 {
        if Self::ROUNDS { Self::narrow(value).widen() } else { value }
    }
}

impl Element for f32 {
    const PER_WORD: usize = 1;
    const ROUNDS: bool = false;
    #[inline(always)]
    fn widen(self) -> f32 {
        self
    }
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        value
    }
}

impl Element for bf16 {
    const PER_WORD: usize = 2;
    const ROUNDS: bool = true;
    #[inline(always)]
    fn widen(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    /// As `half::bf16::from_f32`, written without branches so that loops over it vectorise.
    #[inline(always)]
    fn narrow(value: f32) -> Self {
        let bits = value.to_bits();
        let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
        let quiet = bits | 0x0040_0000;
        let chosen = if value.is_nan() { quiet } else { rounded };
        bf16::from_bits((chosen >> 16) as u16)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn narrow_rounds_like_half() {
        let mut bits = 0u32;
        loop {
            let value = f32::from_bits(bits);
            assert_eq!(bf16::narrow(value).to_bits(), bf16::from_f32(value).to_bits(), "bits {bits:#x}");
            let (next, wrapped) = bits.overflowing_add(4_093);
            if wrapped {
                break;
            }
            bits = next;
        }
        for bits in [0x3f80_8000, 0x3f81_8000, 0x3f80_8001, 0x7f7f_ffff, 0x7f80_0000, 0x7f80_0001, 0xff80_0000] {
            let value = f32::from_bits(bits);
            assert_eq!(bf16::narrow(value).to_bits(), bf16::from_f32(value).to_bits(), "bits {bits:#x}");
        }
    }
}
