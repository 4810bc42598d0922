//! GLM-4.7-Flash: latent attention and experts with a shared one. Source: transformers `Glm4MoeLiteForCausalLM`
//! (models.md §3). The layer behind the last drafts tokens ahead (MTP); a model leaves it out as transformers does, and [`draft`]
//! loads it by itself.

use millrace_kernels::{Backend, SigmoidChoice};

use super::Model;
use super::text::TextModel;
use crate::checkpoint::{Fields, Loader, RopeConfig};
use crate::error::ExecutorError;
use crate::layers::moe::{ExpertShape, Moe, Router};
use crate::layers::{
    AttentionShape, DecoderLayer, DraftLayer, Ffn, KvLayout, LanguageModel, LatentAttention, LatentShape, Mixer,
    SwiGlu, TextConfig,
};

struct Config {
    text: TextConfig,
    latent: LatentShape,
    experts: ExpertShape,
    choice: SigmoidChoice,
    shared: usize,
    /// Which layers have experts.
    sparse: Vec<bool>,
}

impl Config {
    fn read(fields: &Fields<'_>) -> Result<Self, ExecutorError> {
        fields.only_text("hidden_act", "silu")?;
        let latent = LatentShape::read(fields)?;
        let LatentShape { hidden, heads, kv_latent, rotated, .. } = latent;
        let layers = fields.size("num_hidden_layers", 47)?;
        let text = TextConfig {
            vocab: fields.size("vocab_size", 154_880)?,
            intermediate: fields.size("intermediate_size", 10_240)?,
            layers,
            attention: AttentionShape { hidden, heads, kv_heads: 1, head_dim: rotated },
            kv: KvLayout::Latent { latent: kv_latent, rotated },
            eps: fields.number("rms_norm_eps", 1e-5)? as f32,
            max_tokens: fields.size("max_position_embeddings", 202_752)?,
            rope: RopeConfig::read(fields, "default", 10_000.0)?,
            tied: fields.flag("tie_word_embeddings", false)?,
        };
        let choice = SigmoidChoice {
            top_k: fields.size("num_experts_per_tok", 4)?,
            groups: fields.size("n_group", 1)?,
            top_groups: fields.size("topk_group", 1)?,
            norm_topk: fields.flag("norm_topk_prob", true)?,
            scale: fields.number("routed_scaling_factor", 1.8)? as f32,
        };
        let (count, intermediate) = (fields.size("n_routed_experts", 64)?, fields.size("moe_intermediate_size", 1536)?);
        let kinds = fields.texts("mlp_layer_types")?;
        let sparse = match kinds.len() {
            0 => (0..layers).map(|layer| layer > 0).collect(),
            n if n == layers => kinds.iter().map(|kind| kind == "sparse").collect(),
            n => return Err(fields.error("mlp_layer_types", format!("names {n} of {layers} layers"))),
        };
        let shared = fields.size("n_shared_experts", 1)?;
        Ok(Self { text, latent, experts: ExpertShape { count, hidden, intermediate }, choice, shared, sparse })
    }
}

/// Loads it.
///
/// # Errors
/// Config or tensors that do not fit.
pub fn build<B: Backend + 'static>(
    fields: &Fields<'_>,
    loader: &mut Loader<'_, B>,
) -> Result<Box<dyn Model<B>>, ExecutorError> {
    let config = Config::read(fields)?;
    for extra in 0..draft_layers(fields)? {
        let name = format!("model.layers.{}", config.text.layers + extra);
        let tensors = loader.leave_out(&name);
        tracing::info!(name, tensors, "draft (MTP) layer recognised; left out until something asks for it");
    }
    let language = LanguageModel::load(loader, "model", &config.text, |own, index| layer(own, &config, index))?;
    Ok(Box::new(TextModel::new(config.text, language)))
}

fn draft_layers(fields: &Fields<'_>) -> Result<usize, ExecutorError> {
    Ok(fields.optional_size("num_nextn_predict_layers")?.unwrap_or(0))
}

/// Loads the draft layer; `None` if the config has none.
///
/// # Errors
/// Config or tensors that do not fit, or a draft layer with tables of its own (models.md §3.4: they are copies).
pub fn draft<B: Backend>(
    fields: &Fields<'_>,
    loader: &mut Loader<'_, B>,
) -> Result<Option<DraftLayer<B>>, ExecutorError> {
    let config = Config::read(fields)?;
    let index = config.text.layers;
    let tables = [("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight")];
    match draft_layers(fields)? {
        0 => Ok(None),
        1 => {
            let (vocab, hidden) = (config.text.vocab, config.latent.hidden);
            let mut own = loader.below(format!("model.layers.{index}"));
            for (copy, table) in tables {
                let copy = own.host(copy, &[vocab, hidden])?;
                own.expect_copy(&copy, table)?;
            }
            let decoder = layer(&mut own, &Config { sparse: vec![true; index + 1], ..config }, index)?;
            DraftLayer::load(&mut own, hidden, fields.number("rms_norm_eps", 1e-5)? as f32, decoder).map(Some)
        }
        n => Err(ExecutorError::Unsupported(format!("`num_nextn_predict_layers` = {n} (only 1)"))),
    }
}

fn layer<B: Backend>(
    loader: &mut Loader<'_, B>,
    config: &Config,
    index: usize,
) -> Result<DecoderLayer<B>, ExecutorError> {
    let ExpertShape { count, hidden, intermediate } = config.experts;
    let attention = LatentAttention::load(&mut loader.below("self_attn"), &config.latent)?;
    let mut mlp = loader.below("mlp");
    let ffn = if config.sparse.get(index).copied().unwrap_or(false) {
        let gate = mlp.tensor("gate.weight", &[count, hidden])?;
        let bias = mlp.tensor_f32("gate.e_score_correction_bias", &[count])?;
        let router = Router::Sigmoid { gate, bias, choice: config.choice };
        let shared = SwiGlu::load(&mut mlp.below("shared_experts"), hidden, intermediate * config.shared)?;
        Ffn::Moe(Moe::load(&mut mlp, &config.experts, router, Some(shared))?)
    } else {
        Ffn::Dense(SwiGlu::load(&mut mlp, hidden, config.text.intermediate)?)
    };
    DecoderLayer::load(loader, hidden, config.text.eps, Mixer::Latent(attention), ffn)
}
