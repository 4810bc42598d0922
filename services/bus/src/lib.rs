//! millrace-bus (skeleton)
