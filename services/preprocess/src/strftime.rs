//! Dates for templates that call `strftime_now`: UTC, English names, the directives templates use.

use std::fmt::Write;

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"];

/// Year, month (1..=12) and day (1..=31) of a day counted from 1970-01-01, in the proleptic Gregorian calendar.
fn civil(days: u64) -> (u64, u64, u64) {
    // Years from March 0000, so that a leap day is the last day of its year.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1_460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let month = if shifted < 10 { shifted + 3 } else { shifted - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    (year, month, day_of_year - (153 * shifted + 2) / 5 + 1)
}

/// `datetime.strftime` for the moment `unix_ms`. `None` for a directive that is not known here.
pub(crate) fn format(format: &str, unix_ms: u64) -> Option<String> {
    let secs = unix_ms / 1000;
    let (days, clock) = (secs / 86_400, secs % 86_400);
    let (year, month, day) = civil(days);
    let (hour, minute, second) = (clock / 3600, clock / 60 % 60, clock % 60);
    let (month_name, day_name) = (MONTHS[month as usize - 1], DAYS[((days + 3) % 7) as usize]);
    let half_day = (hour + 11) % 12 + 1;
    let mut out = String::new();
    let mut chars = format.chars();
    while let Some(c) = chars.next() {
        if c != '%' {
            out.push(c);
            continue;
        }
        let mut directive = chars.next()?;
        let bare = directive == '-';
        if bare {
            directive = chars.next()?;
        }
        let (number, width) = match directive {
            'Y' => (year, 4),
            'y' => (year % 100, 2),
            'm' => (month, 2),
            'd' => (day, 2),
            'H' => (hour, 2),
            'I' => (half_day, 2),
            'M' => (minute, 2),
            'S' => (second, 2),
            _ => {
                out.push_str(match directive {
                    'B' => month_name,
                    'b' | 'h' => &month_name[..3],
                    'A' => day_name,
                    'a' => &day_name[..3],
                    'p' => ["AM", "PM"][usize::from(hour >= 12)],
                    '%' => "%",
                    _ => return None,
                });
                continue;
            }
        };
        let width = if bare { 1 } else { width };
        let _ = write!(out, "{number:0width$}");
    }
    Some(out)
}

#[cfg(test)]
mod tests {
    #[test]
    fn dates_as_python_writes_them() {
        // datetime.fromtimestamp(t, UTC).strftime(f), computed with Python 3.11.
        for (secs, text) in [
            (0u64, "01 Jan 1970|Thursday|12:00 AM|1"),
            (951_782_399, "28 Feb 2000|Monday|11:59 PM|28"),
            (951_782_400, "29 Feb 2000|Tuesday|12:00 AM|29"),
            (1_795_424_523, "23 Nov 2026|Monday|09:02 AM|23"),
        ] {
            assert_eq!(super::format("%d %b %Y|%A|%I:%M %p|%-d", secs * 1000).as_deref(), Some(text), "{secs}");
        }
        assert_eq!(super::format("%Q", 0), None);
    }
}
