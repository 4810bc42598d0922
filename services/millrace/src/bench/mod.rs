//! Measuring a service as its users have it: jobs are published, every result is read. `millrace bench` is the command.
//!
//! Cases and the keys of their results are those of the vLLM runs that this project is compared with.

pub mod case;
pub mod direct;
pub mod measure;
pub mod memory;
pub mod report;
pub mod steps;
pub mod workload;
