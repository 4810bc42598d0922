//! Patches out of pages: samples normalised here equal pages that were normalised before, and what is refused.
#![allow(clippy::unwrap_used, clippy::panic)] // Helpers of tests.

mod support;

use candle_core::DType;
use millrace_kernels::{Backend, PatchPage};
use support::{Random, assert_refused, backends, bits, samples};

#[test]
fn samples_equal_pages_normalised_before() {
    let mut random = Random::fresh();
    for (label, backend) in backends() {
        for (rows, slots, area) in [(1, 1, 256), (5, 1, 9), (5, 2, 9), (3, 2, 256), (0, 1, 256), (7, 3, 196)] {
            let (bytes, normalise, values) = samples(&mut random, rows, slots, area);
            let floats: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            let short: Vec<u8> = values.iter().flat_map(|v| half::bf16::from_f32(*v).to_le_bytes()).collect();
            let page = |bytes, dtype, normalise| PatchPage { bytes, dtype, rows, channels: 3, slots, area, normalise };
            let temporal = if slots == 1 { 2 } else { slots };
            let patches = |page| bits(&backend, &backend.patches(&[page], temporal).unwrap());
            let made = patches(page(&bytes, DType::U8, Some(normalise)));
            assert_eq!(made.len(), rows * 3 * temporal * area);
            assert_eq!(made, patches(page(&floats, DType::F32, None)), "{label} {rows} x {slots} x {area}");
            if backend.dtype() == DType::BF16 {
                assert_eq!(made, patches(page(&short, DType::BF16, None)), "{label} {rows} x {slots} x {area}");
            }
        }
    }
}

#[test]
fn samples_come_with_their_normalisation_and_three_channels() {
    let colours = Some(([0.5; 3], [0.5; 3]));
    let page = |dtype, channels, normalise| PatchPage {
        bytes: &[7; 24][..8 * channels],
        dtype,
        rows: 2,
        channels,
        slots: 1,
        area: if dtype == DType::U8 { 4 } else { 2 },
        normalise,
    };
    for (_, backend) in backends() {
        assert!(backend.patches(&[page(DType::U8, 3, colours)], 2).is_ok());
        assert!(backend.patches(&[page(DType::BF16, 2, None)], 2).is_ok());
        for wrong in [page(DType::U8, 3, None), page(DType::U8, 1, colours), page(DType::BF16, 3, colours)] {
            assert_refused(backend.patches(&[wrong], 2), "patches");
        }
    }
}
