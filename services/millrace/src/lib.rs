//! millrace (skeleton)
