//! millrace-runtime (skeleton)
