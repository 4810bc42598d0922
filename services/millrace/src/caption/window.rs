//! Cuts a file's duration into the windows that become one job each. Pure arithmetic.

/// A part of a video, in seconds from the file's start.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Window {
    /// First moment.
    pub start_secs: f64,
    /// Moment after the last.
    pub end_secs: f64,
}

/// A rest shorter than this share of a window joins the window before it: a caption of two frames helps nobody.
const SHORTEST_REST: f64 = 0.25;

/// Cuts `duration_secs` into windows of `window_secs`. Together they cover the file without gap or overlap; only the
/// last one differs in length (between 0.25 and 1.25 windows). `window_secs` 0 means one window for the whole file.
/// An empty or unknown duration (not finite, or not above zero) gives no window.
pub fn windows(duration_secs: f64, window_secs: f64) -> Vec<Window> {
    if !(duration_secs.is_finite() && duration_secs > 0.0) {
        return Vec::new();
    }
    if !(window_secs.is_finite() && window_secs > 0.0) {
        return vec![Window { start_secs: 0.0, end_secs: duration_secs }];
    }
    let full = (duration_secs / window_secs).floor();
    let rest = duration_secs - full * window_secs;
    let count = if rest < SHORTEST_REST * window_secs { full.max(1.0) } else { full + 1.0 };
    let mut windows = Vec::new();
    let mut number = 0.0;
    while number < count {
        let last = number + 1.0 >= count;
        let end_secs = if last { duration_secs } else { (number + 1.0) * window_secs };
        windows.push(Window { start_secs: number * window_secs, end_secs });
        number += 1.0;
    }
    windows
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn spans(duration_secs: f64, window_secs: f64) -> Vec<(f64, f64)> {
        windows(duration_secs, window_secs).iter().map(|w| (w.start_secs, w.end_secs)).collect()
    }

    #[test]
    fn a_short_rest_joins_the_window_before() {
        assert_eq!(spans(2.0, 8.0), [(0.0, 2.0)]);
        assert_eq!(spans(0.5, 8.0), [(0.0, 0.5)]);
        assert_eq!(spans(8.0, 8.0), [(0.0, 8.0)]);
        assert_eq!(spans(9.9, 8.0), [(0.0, 9.9)]);
        assert_eq!(spans(10.0, 8.0), [(0.0, 8.0), (8.0, 10.0)]);
        assert_eq!(spans(16.5, 8.0), [(0.0, 8.0), (8.0, 16.5)]);
    }

    #[test]
    fn zero_means_the_whole_file_and_nothing_gives_nothing() {
        assert_eq!(spans(100.0, 0.0), [(0.0, 100.0)]);
        for empty in [0.0, -1.0, f64::NAN, f64::INFINITY] {
            assert!(windows(empty, 8.0).is_empty(), "{empty}");
        }
    }

    proptest! {
        #[test]
        fn windows_tile_the_file(duration in 0.01f64..5000.0, window in 0.1f64..60.0) {
            let cut = windows(duration, window);
            prop_assert_eq!(cut[0].start_secs, 0.0);
            prop_assert_eq!(cut[cut.len() - 1].end_secs, duration);
            for pair in cut.windows(2) {
                prop_assert_eq!(pair[0].end_secs, pair[1].start_secs);
            }
            for each in &cut {
                prop_assert!(each.end_secs > each.start_secs);
                prop_assert!(each.end_secs - each.start_secs <= 1.25 * window + 1e-6);
            }
        }
    }
}
