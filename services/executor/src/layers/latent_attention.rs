//! Multi-head latent attention (GLM-4.7, after DeepSeek-V2): keys and values come out of one small latent for each token, and
//! only latents are cached.

use millrace_kernels::{Backend, RopeTable};

use super::{Linear, RmsNorm};
use crate::checkpoint::{Fields, Loader};
use crate::error::ExecutorError;

/// Of the latents' norms: the class's default, whatever the config says.
const LATENT_EPS: f32 = 1e-6;

/// Sizes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LatentShape {
    /// Hidden size of the model.
    pub hidden: usize,
    /// Heads.
    pub heads: usize,
    /// Latent of the queries; `None` projects them directly.
    pub q_latent: Option<usize>,
    /// Latent of keys and values.
    pub kv_latent: usize,
    /// Elements of a head that are not rotated.
    pub plain: usize,
    /// Elements of a head that are rotated in neighbouring pairs.
    pub rotated: usize,
    /// Elements of a head's value.
    pub value: usize,
}

impl LatentShape {
    /// Reads the sizes; what is absent has the default of `Glm4MoeLiteConfig`.
    ///
    /// # Errors
    /// A value of the wrong kind, or a part that is not supported.
    pub fn read(fields: &Fields<'_>) -> Result<Self, ExecutorError> {
        fields.must_be_off("attention_bias")?;
        if !fields.flag("rope_interleave", true)? {
            return Err(ExecutorError::Unsupported(format!("`{}` = false", fields.key("rope_interleave"))));
        }
        let q_latent = if fields.is_null("q_lora_rank") { None } else { Some(fields.size("q_lora_rank", 768)?) };
        Ok(Self {
            hidden: fields.size("hidden_size", 2048)?,
            heads: fields.size("num_attention_heads", 20)?,
            q_latent,
            kv_latent: fields.size("kv_lora_rank", 512)?,
            plain: fields.size("qk_nope_head_dim", 192)?,
            rotated: fields.size("qk_rope_head_dim", 64)?,
            value: fields.size("v_head_dim", 256)?,
        })
    }
}

/// One attention block.
pub struct LatentAttention<B: Backend> {
    /// Down to the queries' latent and its norm.
    q_down: Option<(Linear<B>, RmsNorm<B>)>,
    q_up: Linear<B>,
    kv_down: Linear<B>,
    kv_norm: RmsNorm<B>,
    kv_up: B::Tensor,
    output: Linear<B>,
    heads: usize,
    scale: f32,
}

impl<B: Backend> LatentAttention<B> {
    /// `q_a_proj`, `q_a_layernorm`, `q_b_proj` (or `q_proj`), `kv_a_proj_with_mqa`, `kv_a_layernorm`, `kv_b_proj`, `o_proj`.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(loader: &mut Loader<'_, B>, shape: &LatentShape) -> Result<Self, ExecutorError> {
        let LatentShape { hidden, heads, q_latent, kv_latent, plain, rotated, value } = *shape;
        let query = plain + rotated;
        let (q_down, q_up) = match q_latent {
            Some(latent) => {
                let down = Linear::load(loader, "q_a_proj", latent, hidden)?;
                let norm = RmsNorm::load(loader, "q_a_layernorm", latent, LATENT_EPS)?;
                (Some((down, norm)), Linear::load(loader, "q_b_proj", heads * query, latent)?)
            }
            None => (None, Linear::load(loader, "q_proj", heads * query, hidden)?),
        };
        Ok(Self {
            q_down,
            q_up,
            kv_down: Linear::load(loader, "kv_a_proj_with_mqa", kv_latent + rotated, hidden)?,
            kv_norm: RmsNorm::load(loader, "kv_a_layernorm", kv_latent, LATENT_EPS)?,
            kv_up: loader.tensor("kv_b_proj.weight", &[heads * (plain + value), kv_latent])?,
            output: Linear::load(loader, "o_proj", hidden, heads * value)?,
            heads,
            scale: (query as f64).powf(-0.5) as f32,
        })
    }

    /// `x [T, H]` -> `[T, H]`; the latents of the step's tokens go into `cache`.
    ///
    /// # Errors
    /// Shapes do not fit, or a block table is too short.
    pub fn forward(
        &self,
        backend: &B,
        x: &B::Tensor,
        rope: &RopeTable<B::Tensor>,
        batch: &B::Batch,
        cache: &mut B::KvCache,
    ) -> Result<B::Tensor, ExecutorError> {
        let q = match &self.q_down {
            Some((down, norm)) => self.q_up.forward(backend, &norm.forward(backend, &down.forward(backend, x)?)?)?,
            None => self.q_up.forward(backend, x)?,
        };
        let kv = self.kv_down.forward(backend, x)?;
        let (norm, heads) = (self.kv_norm.weight(), self.heads);
        let q = backend.mla_norm_rope_cache_write(&q, &kv, norm, LATENT_EPS, heads, rope, batch, cache)?;
        let attended = backend.mla_attention(&q, &self.kv_up, heads, batch, cache, self.scale)?;
        self.output.forward(backend, &attended)
    }
}
