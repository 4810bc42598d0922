//! Bucket bounds of histograms, so that the same quantity has the same buckets everywhere. Latencies reach far enough
//! that overload is seen as a number and not as the top bucket.

/// Time to the first token, in seconds.
pub const TTFT_SECS: &[f64] = &[
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2_560.0,
];

/// Time between two tokens of a job, in seconds.
pub const INTER_TOKEN_SECS: &[f64] = &[
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0,
    20.0, 40.0, 80.0,
];

/// Whole jobs, queues and deadlines, in seconds.
pub const JOB_SECS: &[f64] = &[
    0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0,
    480.0, 960.0, 1_920.0, 7_680.0,
];

/// Device steps and message hops, in seconds.
pub const STEP_SECS: &[f64] =
    &[0.000_1, 0.000_25, 0.000_5, 0.001, 0.002_5, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0];

/// Tokens of one step: powers of two.
pub const STEP_TOKENS: &[f64] =
    &[1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0, 256.0, 512.0, 1_024.0, 2_048.0, 4_096.0, 8_192.0, 16_384.0];

/// Tokens of one prompt or answer: 1-2-5.
pub const JOB_TOKENS: &[f64] = &[
    1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 500.0, 1_000.0, 2_000.0, 5_000.0, 10_000.0, 20_000.0, 50_000.0,
    100_000.0, 200_000.0,
];

/// Sizes in bytes: powers of four from 1 KiB to 4 GiB.
pub const SIZE_BYTES: &[f64] = &[
    1_024.0,
    4_096.0,
    16_384.0,
    65_536.0,
    262_144.0,
    1_048_576.0,
    4_194_304.0,
    16_777_216.0,
    67_108_864.0,
    268_435_456.0,
    1_073_741_824.0,
    4_294_967_296.0,
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_rise_and_are_accepted() {
        for bounds in [TTFT_SECS, INTER_TOKEN_SECS, JOB_SECS, STEP_SECS, STEP_TOKENS, JOB_TOKENS, SIZE_BYTES] {
            assert!(bounds.windows(2).all(|pair| pair[0] < pair[1]), "{bounds:?}");
            let options = prometheus::HistogramOpts::new("a", "b").buckets(bounds.to_vec());
            assert!(prometheus::Histogram::with_opts(options).is_ok());
        }
    }
}
