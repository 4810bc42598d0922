//! millrace-preprocess (skeleton)
