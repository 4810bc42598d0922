//! millrace-telemetry (skeleton)
