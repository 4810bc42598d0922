//! Pages of samples give exactly the logits of pages that were normalised before.

use std::collections::HashMap;

use bytes::Bytes;
use millrace_executor::Dtype;
use millrace_protocol::PageDtype;
use millrace_protocol::ready::Normalise;

use crate::fixture::Family;

const NORMALISE: Normalise =
    Normalise { mean: [0.481_454_66, 0.457_827_5, 0.408_210_73], std: [0.268_629_54, 0.261_302_6, 0.275_777_1] };

/// Logits of every case with media as bits; its pages hold the same made-up samples in one form or the other.
fn logits(dtype: Dtype, form: PageDtype) -> Vec<Vec<u32>> {
    let mut family = Family::open("qwen3_vl");
    let mut pages = HashMap::new();
    for item in family.cases.iter_mut().flat_map(|case| &mut case.media) {
        let shape: Vec<usize> = item.patches.shape.iter().map(|size| *size as usize).collect();
        let plane = shape[2..].iter().product::<usize>();
        let seed = item.patches.page as usize * 91;
        let samples = (0..shape.iter().product()).map(|n: usize| ((n * 7919 + seed) % 2003 % 256) as u8);
        let value = |(n, x): (usize, u8)| {
            let (mean, std) = (NORMALISE.mean[n / plane % 3], NORMALISE.std[n / plane % 3]);
            (f32::from(x) - mean * 255.0) / (std * 255.0)
        };
        let values = samples.clone().enumerate().map(value);
        let bytes: Vec<u8> = match form {
            PageDtype::U8 => samples.collect(),
            PageDtype::Bf16 => values.flat_map(|x| half::bf16::from_f32(x).to_le_bytes()).collect(),
            PageDtype::F32 => values.flat_map(f32::to_le_bytes).collect(),
        };
        item.normalise = (form == PageDtype::U8).then_some(NORMALISE);
        (item.patches.dtype, item.patches.bytes) = (form, bytes.len() as u64);
        pages.insert(item.patches.page, Bytes::from(bytes));
    }
    family.pages = pages;
    let requests: Vec<_> =
        family.cases.iter().filter(|case| !case.media.is_empty()).map(|case| case.forced()).collect();
    let mut engine = family.engine(dtype);
    let results = family.run(&mut engine, &requests, &Default::default());
    results
        .iter()
        .map(|result| result.logits.iter().flat_map(|row| row.logits.iter().map(|x| x.to_bits())).collect())
        .collect()
}

#[test]
fn samples_give_the_logits_of_normalised_pages() {
    for (dtype, form) in [(Dtype::F32, PageDtype::F32), (Dtype::Bf16, PageDtype::Bf16)] {
        let (wanted, got) = (logits(dtype, form), logits(dtype, PageDtype::U8));
        assert!(wanted.len() >= 6 && wanted.iter().all(|case| !case.is_empty()));
        assert!(got == wanted, "{dtype:?}: other logits");
    }
}
