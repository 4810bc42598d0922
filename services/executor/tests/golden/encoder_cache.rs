//! Features that left the device and came back: the tower does not run again, and the answer has equal bits.

use std::sync::atomic::Ordering;

use millrace_executor::{Dtype, StepEngine};

use crate::fixture::Family;

/// Bytes of one placeholder's features as the CPU backend copies them.
pub fn row_bytes(family: &Family) -> u64 {
    let config: serde_json::Value =
        serde_json::from_slice(&std::fs::read(family.dir.join("config.json")).unwrap()).unwrap();
    let hidden = config["text_config"]["hidden_size"].as_u64().unwrap();
    let levels = 1 + config["vision_config"]["deepstack_visual_indexes"].as_array().unwrap().len() as u64;
    hidden * levels * 4
}

/// Bytes of the largest item's features.
fn largest(family: &Family) -> u64 {
    let items = family.cases.iter().flat_map(|case| &case.media);
    items.map(|item| u64::from(item.tokens)).max().unwrap() * row_bytes(family)
}

/// Logits of every case with media, asked for twice over, as bits; pages read; and lookups by device, host, miss.
fn twice(dtype: Dtype, device: u64, host: u64) -> (Vec<Vec<u32>>, usize, [u64; 3]) {
    let mut family = Family::open("qwen3_vl");
    let mut engine = family.engine_with(dtype, |options| {
        (options.encoder_device_bytes, options.encoder_host_bytes) = (device, host);
    });
    let cases: Vec<_> = family.cases.iter().filter(|case| !case.media.is_empty()).map(|case| case.forced()).collect();
    assert!(cases.len() > 1);
    let mut bits = Vec::new();
    for request in cases.iter().chain(&cases) {
        let result = family.run(&mut engine, std::slice::from_ref(request), &Default::default()).remove(0);
        bits.push(result.logits.iter().flat_map(|row| row.logits.iter().map(|x| x.to_bits())).collect());
    }
    let counts = engine.encoder_counts().unwrap();
    (bits, family.reads, [&counts.device, &counts.host, &counts.misses].map(|count| count.load(Ordering::Relaxed)))
}

#[test]
fn content_seen_before_is_not_encoded_again() {
    let family = Family::open("qwen3_vl");
    let items: usize = family.cases.iter().map(|case| case.media.len()).sum();
    for dtype in [Dtype::F32, Dtype::Bf16] {
        let (plain, reads, [_, host, misses]) = twice(dtype, 0, 0);
        assert_eq!(
            (reads, host, misses),
            (2 * items, 0, 2 * items as u64),
            "without a cache every item is encoded twice"
        );
        let (bits, reads, [device, host, misses]) = twice(dtype, largest(&family), 64 << 20);
        assert_eq!((reads, misses), (items, items as u64), "{dtype:?}");
        assert!(host > 0 && device + host == items as u64, "{dtype:?}: {device} on the device, {host} in host memory");
        assert!(bits == plain, "{dtype:?}: other bits");
        let (bits, reads, [device, host, _]) = twice(dtype, 64 << 20, 0);
        assert_eq!((reads, device, host), (items, items as u64, 0), "{dtype:?}: all of it on the device");
        assert!(bits == plain, "{dtype:?}: other bits");
    }
}
