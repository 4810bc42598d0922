//! millrace-scheduler (skeleton)
