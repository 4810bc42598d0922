//! millrace-config (skeleton)
