//! From a job document to what the model takes: template, tokens, decoded media as normalised patches, resolved sampling.
//!
//! The library is pure but for two child processes (ffprobe, ffmpeg) and the files it is told to read; the actor in
//! `actor.rs` connects it to the bus. Must not link kernels. Faults of a job are protocol errors with a stable code.

pub mod actor;
mod build;
mod chat_template;
mod conversation;
mod cores;
mod error;
mod expand;
mod frames;
mod generation_config;
#[cfg(test)]
mod golden_tests;
mod image_decode;
mod image_end;
#[cfg(test)]
mod image_tests;
mod jinja_source;
mod limits;
mod metrics;
mod model_files;
mod normalise;
mod patchify;
mod prepare;
#[cfg(test)]
mod prepare_tests;
mod processor_config;
mod python_text;
mod request_rules;
mod resample;
mod smart_resize;
mod source;
mod strftime;
#[cfg(test)]
mod template_tests;
mod tokenizer;
mod video_decode;
mod video_probe;
mod video_sampling;
#[cfg(test)]
mod video_tests;

pub use actor::{PreprocessActor, PreprocessParts};
pub use chat_template::{ChatTemplate, TemplateInput};
pub use cores::Cores;
pub use error::LoadError;
pub use frames::{FrameWriter, VideoPatches};
pub use generation_config::GenerationConfig;
pub use image_decode::{decode_image, take_raw};
pub use limits::PrepareLimits;
pub use metrics::PreprocessMetrics;
pub use model_files::{ModelFacts, VisionTokens};
pub use patchify::{PatchLayout, Patchifier, Rgb};
pub use prepare::{Gathered, Prepared, PreparedMedia, Preparer};
pub use processor_config::{Pixels, ProcessorConfig, VideoSettings};
pub use smart_resize::{SizeBounds, image_size, video_size};
pub use source::MediaFetch;
pub use tokenizer::Tokenizer;
pub use video_decode::{Window, decode_video};
pub use video_sampling::{sample_indices, timestamp_texts};
