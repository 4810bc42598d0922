//! Composition root and command line of Millrace. Wires the libraries together and talks to people; must not hold
//! logic that a library could own.

pub mod asyncapi;
pub mod bench;
pub mod caption;
pub mod check_model;
pub mod check_program;
pub mod cli;
pub mod compose;
pub mod device;
pub mod exit;
pub mod follow;
pub mod generate;
pub mod model_source;
pub mod prepare_limits;
pub mod service;
pub mod session;
pub mod signals;
pub mod stand_in;
pub mod status_table;
pub mod upload;
