//! A snapshot of the service as a table for people. Pure text.

use std::fmt::Write;

use millrace_protocol::engine::SchedulerBeacon;

use crate::cli::status::Snapshot;

/// The whole table.
pub fn text(snapshot: &Snapshot) -> String {
    let mut text = format!("NATS {}\n", snapshot.nats);
    let services: Vec<Vec<String>> = snapshot
        .services
        .iter()
        .map(|info| {
            let facts: Vec<String> = info.metadata.iter().map(|(key, value)| format!("{key}={value}")).collect();
            vec![info.name.clone(), info.id.clone(), info.version.clone(), facts.join(" ")]
        })
        .collect();
    section(&mut text, &["SERVICE", "ID", "VERSION", ""], &services, "none; start `millrace up`");
    let schedulers: Vec<Vec<String>> = snapshot.schedulers.iter().map(scheduler).collect();
    section(
        &mut text,
        &["MODEL", "STATE", "RUNNING", "WAITING", "ROOM FOR", "KV BLOCKS FREE", "DEVICE"],
        &schedulers,
        "no scheduler",
    );
    let executors: Vec<Vec<String>> = snapshot
        .executors
        .iter()
        .map(|beacon| {
            let held = beacon.attached_to.as_ref().map_or("free".to_string(), ToString::to_string);
            vec![beacon.executor.to_string(), beacon.spec.model.to_string(), held, beacon.steps.to_string()]
        })
        .collect();
    section(&mut text, &["EXECUTOR", "MODEL", "HELD BY", "STEPS"], &executors, "no executor");
    let consumers: Vec<Vec<String>> = snapshot
        .consumers
        .iter()
        .map(|consumer| {
            let counts = [consumer.pending, consumer.ack_pending, consumer.redelivered];
            std::iter::once(consumer.class.to_string()).chain(counts.map(|count| count.to_string())).collect()
        })
        .collect();
    section(&mut text, &["JOBS", "QUEUED", "IN WORK", "REDELIVERED"], &consumers, "no consumer");
    let streams: Vec<Vec<String>> = snapshot
        .streams
        .iter()
        .map(|stream| {
            let limit = stream.max_bytes.map_or("no limit".to_string(), |limit| format!("of {}", bytes(limit)));
            vec![stream.name.clone(), stream.messages.to_string(), bytes(stream.bytes), limit]
        })
        .collect();
    section(&mut text, &["STREAM", "MESSAGES", "BYTES", ""], &streams, "no stream");
    text
}

fn scheduler(beacon: &SchedulerBeacon) -> Vec<String> {
    let state = match (&beacon.engine, beacon.draining) {
        (_, true) => "draining",
        (Some(_), false) => "ready",
        (None, false) => "no executor",
    };
    let (blocks, device) = match &beacon.engine {
        Some(spec) => (format!("{} of {}", beacon.free_blocks, spec.blocks), spec.device.clone()),
        None => ("-".to_string(), "-".to_string()),
    };
    let counts = [beacon.running, beacon.waiting, beacon.free_jobs].map(|count| count.to_string());
    [beacon.model.to_string(), state.to_string()].into_iter().chain(counts).chain([blocks, device]).collect()
}

/// A blank line, a head, and aligned rows; `empty` if there are none.
fn section(text: &mut String, head: &[&str], rows: &[Vec<String>], empty: &str) {
    let head: Vec<String> = head.iter().map(ToString::to_string).collect();
    let width = |column: usize| {
        rows.iter().chain([&head]).filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    text.push('\n');
    for row in std::iter::once(&head).chain(rows) {
        let cells = row.iter().enumerate().map(|(column, cell)| format!("{cell:<wide$}", wide = width(column)));
        let line = cells.collect::<Vec<_>>().join("  ");
        let _ = writeln!(text, "{}", line.trim_end());
    }
    if rows.is_empty() {
        let _ = writeln!(text, "{empty}");
    }
}

/// Bytes with a binary unit and three digits.
fn bytes(count: u64) -> String {
    const UNITS: [&str; 5] = ["B", "KiB", "MiB", "GiB", "TiB"];
    let (mut unit, mut scaled) = (0, u32::try_from(count).map_or(count as f64, f64::from));
    while scaled >= 1024.0 && unit + 1 < UNITS.len() {
        (unit, scaled) = (unit + 1, scaled / 1024.0);
    }
    let places = usize::from(unit > 0 && scaled < 100.0);
    format!("{scaled:.places$} {}", UNITS[unit])
}

#[cfg(test)]
#[path = "status_table_tests.rs"]
mod tests;
