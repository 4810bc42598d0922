//! End to end: real `millrace` processes on a real nats-server, the shipped checkpoint, real ffmpeg; seen as a publisher sees it.

mod bad_input;
mod batching;
mod bench;
mod captions;
mod cli;
mod examples;
mod operations;
mod shutdown;
