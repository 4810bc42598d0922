//! Time codes as people read them: `mm:ss.d`, with hours only where there are any. Pure text.

/// `secs` as `mm:ss.d`, or `h:mm:ss.d` from one hour on, rounded to a tenth of a second.
/// Negative and non-finite values read as zero.
pub fn timecode(secs: f64) -> String {
    let tenths = if secs.is_finite() && secs > 0.0 { (secs * 10.0).round() } else { 0.0 };
    let (whole, tenth) = ((tenths / 10.0).floor(), tenths % 10.0);
    let (hours, minutes, seconds) = ((whole / 3600.0).floor(), (whole / 60.0).floor() % 60.0, whole % 60.0);
    if hours > 0.0 {
        format!("{hours}:{minutes:02}:{seconds:02}.{tenth}")
    } else {
        format!("{minutes:02}:{seconds:02}.{tenth}")
    }
}

/// A span as captions carry it: `[00:00.0 – 00:08.0]`.
pub fn span(start_secs: f64, end_secs: f64) -> String {
    format!("[{} – {}]", timecode(start_secs), timecode(end_secs))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tenths_carry_into_seconds_minutes_and_hours() {
        for (secs, text) in [
            (0.0, "00:00.0"),
            (8.0, "00:08.0"),
            (9.94, "00:09.9"),
            (59.96, "01:00.0"),
            (3599.95, "1:00:00.0"),
            (3661.26, "1:01:01.3"),
            (36_000.0, "10:00:00.0"),
            (-1.0, "00:00.0"),
            (f64::NAN, "00:00.0"),
        ] {
            assert_eq!(timecode(secs), text, "{secs}");
        }
    }

    #[test]
    fn a_span_uses_an_en_dash() {
        assert_eq!(span(0.0, 8.0), "[00:00.0 – 00:08.0]");
    }
}
