//! Frequencies of a rotation and the axes of a position that they turn with.
//!
//! The recipe rounds where transformers rounds (models.md §0): exponent `f32(2i) / f32(dim)`, power in f64 rounded to f32,
//! reciprocal in f32. Angles and their cos and sin are the kernels' (`Backend::rope_table`).

/// `1 / theta^(2i / dim)` for `i` in `0..dim / 2`.
pub fn inverse_frequencies(theta: f64, dim: usize) -> Vec<f32> {
    (0..dim / 2)
        .map(|i| {
            let exponent = (2 * i) as f32 / dim as f32;
            1.0 / (theta.powf(f64::from(exponent)) as f32)
        })
        .collect()
}

/// Axis of each of `frequencies` frequencies under interleaved MRoPE: of every three, the second turns with the height and
/// the third with the width while their sections last; all others turn with the temporal axis.
/// Source: transformers `Qwen3VLTextRotaryEmbedding.recomposition_frequencies`.
pub fn interleaved_axes(frequencies: usize, section: &[usize]) -> Vec<u32> {
    let limit = |axis: usize| section.get(axis).copied().unwrap_or(0) * 3;
    (0..frequencies).map(|i| if i % 3 > 0 && i < limit(i % 3) { i as u32 % 3 } else { 0 }).collect()
}

/// Axis of each of `frequencies` frequencies; `section` holds the MRoPE sections of a model whose positions have three axes.
pub fn axes(frequencies: usize, section: Option<&[usize]>) -> Vec<u32> {
    section.map_or_else(|| vec![0; frequencies], |section| interleaved_axes(frequencies, section))
}

#[cfg(test)]
mod tests {
    use millrace_kernels::angle;

    use super::*;

    #[test]
    fn frequencies_interleave_as_in_qwen3_vl() {
        let axes: String =
            interleaved_axes(64, &[24, 20, 20]).iter().map(|&axis| "THW".as_bytes()[axis as usize] as char).collect();
        assert_eq!(axes, format!("{}TTTT", "THW".repeat(20)));
        assert_eq!(interleaved_axes(8, &[4, 1, 3]), [0, 1, 2, 0, 0, 2, 0, 0]);
    }

    #[test]
    fn the_angle_is_rounded_to_f32_before_cos() {
        let frequency = inverse_frequencies(5e6, 128)[1];
        let (cos, _) = angle(200_003, frequency);
        assert_eq!(cos, f64::from(200_003f32 * frequency).cos() as f32);
        assert_ne!(cos, (200_003f64 * f64::from(frequency)).cos() as f32);
    }

    #[test]
    fn first_frequency_is_one_radian_a_token() {
        let (cos, sin) = angle(3, inverse_frequencies(1e4, 10)[0]);
        assert_eq!((cos, sin), (3f64.cos() as f32, 3f64.sin() as f32));
        assert_eq!(inverse_frequencies(1e4, 10).len(), 5);
    }
}
