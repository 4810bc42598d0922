//! millrace-executor (skeleton)
