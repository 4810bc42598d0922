//! millrace-tests (skeleton)
