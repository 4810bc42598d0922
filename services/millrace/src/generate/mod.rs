//! `millrace generate` beside its arguments: the job from flags, media for given token ids, and what is printed. The
//! work is done by the same preprocessing and the same engine as in the service, without NATS.

pub mod media;
pub mod output;
pub mod place;
pub mod request;
pub mod run;
