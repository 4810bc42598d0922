//! Normalisation as a table: each of the 256 sample values of each channel maps to its finished bytes, or to itself where the
//! device normalises.

use half::bf16;
use millrace_protocol::PageDtype;

/// Finished little-endian bytes of every sample value, per channel.
pub(crate) enum Table {
    Bf16(Box<[[[u8; 2]; 256]; 3]>),
    F32(Box<[[[u8; 4]; 256]; 3]>),
    U8(Box<[[[u8; 1]; 256]; 3]>),
}

impl Table {
    /// `(x - 255 mean) / (255 std)`, subtraction then division in f32, as the reference fuses rescaling and
    /// normalising; then rounded to `dtype`. Bytes stay samples.
    pub(crate) fn new(mean: [f32; 3], std: [f32; 3], dtype: PageDtype) -> Self {
        let value = |channel: usize, x: usize| (x as f32 - mean[channel] * 255.0) / (std[channel] * 255.0);
        match dtype {
            PageDtype::Bf16 => Self::Bf16(table(|c, x| bf16::from_f32(value(c, x)).to_le_bytes())),
            PageDtype::F32 => Self::F32(table(|c, x| value(c, x).to_le_bytes())),
            PageDtype::U8 => Self::U8(table(|_, x| [x as u8])),
        }
    }
}

fn table<const N: usize>(entry: impl Fn(usize, usize) -> [u8; N]) -> Box<[[[u8; N]; 256]; 3]> {
    let mut out = Box::new([[[0; N]; 256]; 3]);
    for (channel, row) in out.iter_mut().enumerate() {
        for (x, bytes) in row.iter_mut().enumerate() {
            *bytes = entry(channel, x);
        }
    }
    out
}
