//! millrace-pager (skeleton)
