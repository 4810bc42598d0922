//! Bicubic antialiased resampling weights in integers, as torchvision computes them for uint8 on the CPU: f64
//! weights, normalised, then quantised to i16 with as many fraction bits as the largest weight allows.

/// Weights of one axis: output `i` is a weighted sum of `count[i]` inputs from `first[i]` on.
pub(crate) struct Taps {
    first: Vec<u32>,
    count: Vec<u32>,
    weights: Vec<i16>,
    stride: usize,
    /// Fraction bits of the weights.
    pub(crate) precision: u32,
}

impl Taps {
    /// Weights from `input` to `output` samples, `None` if they are equal (the pass is skipped).
    pub(crate) fn new(input: u32, output: u32) -> Option<Self> {
        if input == output || input == 0 || output == 0 {
            return None;
        }
        let scale = f64::from(input) / f64::from(output);
        let (support, inverse) = if scale >= 1.0 { (2.0 * scale, 1.0 / scale) } else { (2.0, 1.0) };
        let stride = support.ceil() as usize * 2 + 1;
        let mut taps = Self { first: Vec::new(), count: Vec::new(), weights: Vec::new(), stride, precision: 0 };
        let mut exact = vec![0.0f64; stride * output as usize];
        for (i, row) in exact.chunks_exact_mut(stride).enumerate() {
            let centre = scale * (i as f64 + 0.5);
            let first = ((centre - support + 0.5) as i64).max(0);
            let end = ((centre + support + 0.5) as i64).min(i64::from(input));
            let count = (end - first).clamp(0, stride as i64) as usize;
            for (j, weight) in row[..count].iter_mut().enumerate() {
                *weight = cubic((j as f64 + first as f64 - centre + 0.5) * inverse);
            }
            let total: f64 = row[..count].iter().sum();
            if total != 0.0 {
                row[..count].iter_mut().for_each(|weight| *weight /= total);
            }
            taps.first.push(first as u32);
            taps.count.push(count as u32);
        }
        taps.precision = precision(exact.iter().copied().fold(0.0, f64::max));
        let unit = f64::from(1u32 << taps.precision);
        taps.weights = exact.iter().map(|w| (w * unit + 0.5f64.copysign(*w)) as i16).collect();
        Some(taps)
    }

    /// First input and weights of output `i`.
    #[inline(always)]
    pub(crate) fn at(&self, i: usize) -> (usize, &[i16]) {
        let start = i * self.stride;
        (self.first[i] as usize, &self.weights[start..start + self.count[i] as usize])
    }

    /// Inputs that the outputs `from..to` read, as a range. Both ends grow with the output.
    pub(crate) fn inputs(&self, from: usize, to: usize) -> std::ops::Range<usize> {
        let last = to - 1;
        self.first[from] as usize..(self.first[last] + self.count[last]) as usize
    }
}

/// Most fraction bits with which the largest weight still fits i16.
fn precision(largest: f64) -> u32 {
    let mut bits = 0u32;
    while bits < 22 && (0.5 + largest * f64::from(1u32 << (bits + 1))) as i64 <= i64::from(i16::MAX) {
        bits += 1;
    }
    bits
}

/// Keys' cubic with a = -0.5.
fn cubic(x: f64) -> f64 {
    const A: f64 = -0.5;
    let x = x.abs();
    if x < 1.0 {
        ((A + 2.0) * x - (A + 3.0)) * x * x + 1.0
    } else if x < 2.0 {
        (((x - 5.0) * x + 8.0) * x - 4.0) * A
    } else {
        0.0
    }
}

// Sums cannot overflow: at 22 fraction bits, 255 times the weights' absolute sum (below 2) is below 2^31. They are written
// with wrapping operations so that overflow checks do not keep the loops from being vectorised.

/// Samples that are summed side by side: a few vector registers of i32.
const LANES: usize = 64;

/// One output row out of `weights.len()` input rows of the same length: `out = clamp((half + sum w*p) >> precision)`.
#[inline(always)]
pub(crate) fn blend_rows<'a>(row: impl Fn(usize) -> &'a [u8], weights: &[i16], precision: u32, out: &mut [u8]) {
    let whole = out.len() / LANES * LANES;
    let mut start = 0;
    while start < whole {
        let mut sums = [1i32 << (precision - 1); LANES];
        for (j, &weight) in weights.iter().enumerate() {
            for (sum, &sample) in sums.iter_mut().zip(&row(j)[start..start + LANES]) {
                *sum = sum.wrapping_add(i32::from(weight).wrapping_mul(i32::from(sample)));
            }
        }
        for (to, sum) in out[start..start + LANES].iter_mut().zip(sums) {
            *to = (sum >> precision).clamp(0, 255) as u8;
        }
        start += LANES;
    }
    for (offset, to) in out[whole..].iter_mut().enumerate() {
        let mut sum = 1i32 << (precision - 1);
        for (j, &weight) in weights.iter().enumerate() {
            sum = sum.wrapping_add(i32::from(weight).wrapping_mul(i32::from(row(j)[whole + offset])));
        }
        *to = (sum >> precision).clamp(0, 255) as u8;
    }
}

/// Rows resampled together in the horizontal pass.
pub(crate) const BLOCK_ROWS: usize = 16;
const BLOCK_LANES: usize = BLOCK_ROWS * 3;
/// Bytes of a column in scratch: one more than its samples, so that a pixel can be stored as four bytes.
const COLUMN_BYTES: usize = BLOCK_LANES + 1;
/// Columns filled before the next row's turn; small enough to stay in the first-level cache.
const COLUMNS_AT_ONCE: usize = 128;

/// Resamples up to [`BLOCK_ROWS`] RGB rows to `out_width`. The rows are laid side by side per pixel first
/// (`columns`, scratch), so that a vector holds the same column of all rows.
#[inline(always)]
pub(crate) fn resample_block(
    rows: &[u8],
    in_width: usize,
    taps: &Taps,
    out_width: usize,
    columns: &mut Vec<u8>,
    out: &mut [u8],
) {
    let count = rows.len() / (in_width * 3);
    columns.resize(in_width * COLUMN_BYTES, 0);
    for (group, columns) in columns.chunks_mut(COLUMNS_AT_ONCE * COLUMN_BYTES).enumerate() {
        let (columns, _) = columns.as_chunks_mut::<COLUMN_BYTES>();
        for (r, row) in rows.chunks_exact(in_width * 3).enumerate().take(BLOCK_ROWS) {
            let (pixels, _) = row[group * COLUMNS_AT_ONCE * 3..].as_chunks::<3>();
            for (column, &[red, green, blue]) in columns.iter_mut().zip(pixels) {
                // The fourth byte is the next row's, which comes later, or padding.
                column[r * 3..r * 3 + 4].copy_from_slice(&[red, green, blue, 0]);
            }
        }
    }
    let (columns, _) = columns.as_chunks::<COLUMN_BYTES>();
    let half = 1i32 << (taps.precision - 1);
    for x in 0..out_width {
        let (first, weights) = taps.at(x);
        let mut sums = [half; BLOCK_LANES];
        for (&weight, column) in weights.iter().zip(&columns[first..]) {
            for (sum, &sample) in sums.iter_mut().zip(column) {
                *sum = sum.wrapping_add(i32::from(weight).wrapping_mul(i32::from(sample)));
            }
        }
        let mut samples = [0u8; BLOCK_LANES];
        for (to, sum) in samples.iter_mut().zip(sums) {
            *to = (sum >> taps.precision).clamp(0, 255) as u8;
        }
        for (r, pixel) in samples.chunks_exact(3).take(count).enumerate() {
            out[(r * out_width + x) * 3..][..3].copy_from_slice(pixel);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_sizes_need_no_pass() {
        assert!(Taps::new(96, 96).is_none());
    }

    #[test]
    fn weights_sum_to_one_and_stay_inside() {
        for (input, output) in [(1, 32), (3, 32), (1080, 1088), (1920, 448), (6000, 32), (33, 32)] {
            let taps = Taps::new(input, output).unwrap();
            let one = 1i32 << taps.precision;
            for i in 0..output as usize {
                let (first, weights) = taps.at(i);
                assert!(first + weights.len() <= input as usize);
                let sum: i32 = weights.iter().map(|&w| i32::from(w)).sum();
                assert!((sum - one).abs() <= weights.len() as i32, "{input} -> {output} at {i}: {sum} of {one}");
            }
        }
    }
}
