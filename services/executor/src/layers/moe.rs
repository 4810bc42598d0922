//! Mixture of experts: a router chooses a few experts for each token; their weighted sum, and a shared expert where there is
//! one, are the output.

use millrace_kernels::{Backend, SigmoidChoice};

use super::SwiGlu;
use crate::checkpoint::Loader;
use crate::error::ExecutorError;

/// How a model routes.
pub enum Router<B: Backend> {
    /// The likeliest of all experts (Qwen3-MoE).
    Softmax {
        /// `[E, H]`.
        gate: B::Tensor,
        /// Experts for each token.
        top_k: usize,
        /// Whether weights are divided by their sum.
        norm_topk: bool,
    },
    /// Sigmoid scores with a bias that chooses but does not weigh (GLM).
    Sigmoid {
        /// `[E, H]`.
        gate: B::Tensor,
        /// `[E]`, f32.
        bias: B::Tensor,
        /// Numbers of experts and groups, and the scale.
        choice: SigmoidChoice,
    },
}

/// One block of experts.
pub struct Moe<B: Backend> {
    router: Router<B>,
    gate_up: B::Tensor,
    down: B::Tensor,
    shared: Option<SwiGlu<B>>,
}

/// Sizes of a block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExpertShape {
    /// Experts.
    pub count: usize,
    /// Hidden size of the model.
    pub hidden: usize,
    /// Size inside an expert.
    pub intermediate: usize,
}

impl<B: Backend> Moe<B> {
    /// `experts.E.{gate,up,down}_proj`, or fused as transformers holds them in memory: `experts.gate_up_proj [E, 2I, H]` (gate
    /// rows, then up rows) and `experts.down_proj [E, H, I]`. The router and the shared expert are at hand.
    ///
    /// # Errors
    /// A tensor is missing or misshapen.
    pub fn load(
        loader: &mut Loader<'_, B>,
        shape: &ExpertShape,
        router: Router<B>,
        shared: Option<SwiGlu<B>>,
    ) -> Result<Self, ExecutorError> {
        let ExpertShape { count, hidden, intermediate } = *shape;
        let mut own = loader.below("experts");
        let (up_shape, down_shape) = ([count, 2 * intermediate, hidden], [count, hidden, intermediate]);
        if own.has("gate_up_proj") {
            let gate_up = own.tensor("gate_up_proj", &up_shape)?;
            return Ok(Self { router, gate_up, down: own.tensor("down_proj", &down_shape)?, shared });
        }
        let each = |part: &str| (0..count).map(move |n| format!("{n}.{part}.weight")).collect::<Vec<_>>();
        let (gates, ups, downs) = (each("gate_proj"), each("up_proj"), each("down_proj"));
        let pairs = gates.iter().zip(&ups).flat_map(|(gate, up)| [gate, up]);
        let gate_up: Vec<(&str, usize)> = pairs.map(|name| (name.as_str(), intermediate)).collect();
        let down: Vec<(&str, usize)> = downs.iter().map(|name| (name.as_str(), hidden)).collect();
        let gate_up = own.stacked_as(&gate_up, hidden, &up_shape)?;
        Ok(Self { router, gate_up, down: own.stacked_as(&down, intermediate, &down_shape)?, shared })
    }

    /// `x [T, H]` -> `[T, H]`.
    ///
    /// # Errors
    /// Shapes do not fit.
    pub fn forward(&self, backend: &B, x: &B::Tensor) -> Result<B::Tensor, ExecutorError> {
        let routing = match &self.router {
            Router::Softmax { gate, top_k, norm_topk } => backend.router_softmax(x, gate, *top_k, *norm_topk)?,
            Router::Sigmoid { gate, bias, choice } => backend.router_sigmoid(x, gate, bias, *choice)?,
        };
        let routed = backend.moe_experts(x, &self.gate_up, &self.down, &routing)?;
        match &self.shared {
            Some(shared) => Ok(backend.add(&routed, &shared.forward(backend, x)?)?),
            None => Ok(routed),
        }
    }
}
