//! Building blocks that model files are written against: each holds its weights and calls the backend's ops. Must not know
//! a model's tensor names beyond those of its own block.

pub mod attention;
pub mod decoder;
pub mod draft;
pub mod ffn;
pub mod head;
pub mod kv_layout;
pub mod language;
pub mod latent_attention;
pub mod linear;
pub mod moe;
pub mod norm;
pub mod rope;
pub mod text_config;
pub mod vision;

pub use attention::{Attention, AttentionShape};
pub use decoder::{Decoder, DecoderLayer, Mixer, Tail};
pub use draft::DraftLayer;
pub use ffn::{Ffn, SwiGlu};
pub use head::LmHead;
pub use kv_layout::KvLayout;
pub use language::LanguageModel;
pub use latent_attention::{LatentAttention, LatentShape};
pub use linear::Linear;
pub use moe::Moe;
pub use norm::{LayerNorm, RmsNorm};
pub use text_config::{TextConfig, TextDefaults};
