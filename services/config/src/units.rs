//! Byte sizes and durations as people write them: `512MiB`, `30s`. Whole numbers with one unit, nothing else.

use std::time::Duration;

const SIZES: [(&str, u64); 9] = [
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("KB", 1_000),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
    ("B", 1),
];

const TIMES_MS: [(&str, u64); 5] = [("ms", 1), ("s", 1_000), ("m", 60_000), ("h", 3_600_000), ("d", 86_400_000)];

/// Reads a byte size.
///
/// # Errors
/// A sentence that names the text and the forms that are accepted.
pub fn bytes(text: &str) -> Result<u64, String> {
    scaled(text, &SIZES).ok_or_else(|| {
        format!("`{text}` is not a size: write a whole number and a unit, such as \"512MiB\" or \"2GB\"")
    })
}

/// Reads a duration.
///
/// # Errors
/// A sentence that names the text and the forms that are accepted.
pub fn duration(text: &str) -> Result<Duration, String> {
    scaled(text, &TIMES_MS).map(Duration::from_millis).ok_or_else(|| {
        format!("`{text}` is not a duration: write a whole number and ms, s, m, h or d, such as \"250ms\" or \"30s\"")
    })
}

fn scaled(text: &str, units: &[(&str, u64)]) -> Option<u64> {
    let split = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(split);
    let factor = units.iter().find(|(name, _)| *name == unit.trim_start())?.1;
    number.parse::<u64>().ok()?.checked_mul(factor)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_and_times_are_exact() {
        assert_eq!(bytes("512MiB"), Ok(512 << 20));
        assert_eq!(bytes("2 GB"), Ok(2_000_000_000));
        assert_eq!(bytes("0B"), Ok(0));
        assert_eq!(duration("30s"), Ok(Duration::from_secs(30)));
        assert_eq!(duration("1500ms"), Ok(Duration::from_millis(1_500)));
        assert_eq!(duration("2d"), Ok(Duration::from_secs(172_800)));
    }

    #[test]
    fn anything_else_is_refused_with_its_text() {
        for bad in ["", "512", "MiB", "1.5GiB", "-1B", "1 mib", "99999999999999TiB", "1MiB ", "1MiBs"] {
            assert!(bytes(bad).unwrap_err().contains(&format!("`{bad}`")), "{bad}");
        }
        for bad in ["", "30", "s", "1.5s", "1min", "1 h 2 m"] {
            assert!(duration(bad).unwrap_err().contains(&format!("`{bad}`")), "{bad}");
        }
    }
}
