//! Rotary parameters in both spellings: `rope_parameters` (transformers 5) and `rope_scaling` beside `rope_theta`.
//! Precedence as in transformers' `RotaryEmbeddingConfigMixin`: `rope_scaling` if it is set, else `rope_parameters`;
//! inside, `rope_theta` falls back to the key beside it and then to the class's default.

use super::Fields;
use crate::error::ExecutorError;

/// Rotary parameters of one attention stack.
#[derive(Debug, Clone, PartialEq)]
pub struct RopeConfig {
    /// Base of the geometric series of frequencies.
    pub theta: f64,
    /// Frequencies of each axis (temporal, height, width) of interleaved MRoPE, if the config holds any.
    pub mrope_section: Option<Vec<usize>>,
}

impl RopeConfig {
    /// Reads the parameters beside which `fields` holds the model's sizes.
    ///
    /// `kind` is the class's rope type (`default` or `axial`); `default` in the file stands for it as well.
    ///
    /// # Errors
    /// Another rope type, or a factor that changes the angles, is [`ExecutorError::Unsupported`].
    pub fn read(fields: &Fields<'_>, kind: &str, default_theta: f64) -> Result<Self, ExecutorError> {
        let beside = fields.number("rope_theta", default_theta)?;
        partial_factor(fields)?;
        let scaling = fields.optional_object("rope_scaling")?;
        let Some(inner) = scaling.map_or_else(|| fields.optional_object("rope_parameters"), |map| Ok(Some(map)))?
        else {
            return Ok(Self { theta: positive(fields, beside)?, mrope_section: None });
        };
        let found = inner.text("rope_type")?.or(inner.text("type")?).unwrap_or(kind);
        if found != kind && found != "default" {
            return Err(ExecutorError::Unsupported(format!("rope type \"{found}\" in `{}`", inner.key("rope_type"))));
        }
        partial_factor(&inner)?;
        if !inner.flag("mrope_interleaved", true)? {
            return Err(ExecutorError::Unsupported(format!("`{}` = false", inner.key("mrope_interleaved"))));
        }
        let section = if inner.has("mrope_section") { Some(inner.sizes("mrope_section", &[])?) } else { None };
        if section.as_ref().is_some_and(|axes| axes.len() != 3) {
            return Err(inner.error("mrope_section", "must hold three numbers: temporal, height, width"));
        }
        let theta = positive(&inner, inner.number("rope_theta", beside)?)?;
        Ok(Self { theta, mrope_section: section })
    }
}

fn positive(fields: &Fields<'_>, theta: f64) -> Result<f64, ExecutorError> {
    if theta > 0.0 { Ok(theta) } else { Err(fields.error("rope_theta", "must be greater than 0")) }
}

fn partial_factor(fields: &Fields<'_>) -> Result<(), ExecutorError> {
    let factor = fields.number("partial_rotary_factor", 1.0)?;
    if (factor - 1.0).abs() > f64::EPSILON {
        let key = fields.key("partial_rotary_factor");
        return Err(ExecutorError::Unsupported(format!("`{key}` = {factor} (only 1)")));
    }
    Ok(())
}
