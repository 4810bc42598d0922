//! What the project's own tests share: finding the workspace, reading its sources and its dependency graph, and (for
//! end-to-end tests) starting real processes. Nothing here imitates a part of the system.

pub mod cluster;
pub mod samples;
pub mod service;
#[path = "../sim/mod.rs"]
pub mod sim;
pub mod workspace;
