//! Typed reading of config.json: a value of the wrong kind is an error with its key path, `null` counts as absent, and
//! what is absent falls back to the default of the Hugging Face class, which the model file states.

use serde_json::{Map, Value};

use crate::error::ExecutorError;

/// One object of config.json and its path.
#[derive(Debug, Clone)]
pub struct Fields<'a> {
    path: String,
    map: &'a Map<String, Value>,
}

impl<'a> Fields<'a> {
    /// The whole document.
    ///
    /// # Errors
    /// It is not an object.
    pub fn root(value: &'a Value) -> Result<Self, ExecutorError> {
        let map = value
            .as_object()
            .ok_or_else(|| ExecutorError::Config { key: "config.json".into(), what: "is not an object".into() })?;
        Ok(Self { path: String::new(), map })
    }

    fn get(&self, key: &str) -> Option<&'a Value> {
        self.map.get(key).filter(|value| !value.is_null())
    }

    /// Path of `key` from the root.
    pub fn key(&self, key: &str) -> String {
        if self.path.is_empty() { key.into() } else { format!("{}.{key}", self.path) }
    }

    /// An error about `key`.
    pub fn error(&self, key: &str, what: impl Into<String>) -> ExecutorError {
        ExecutorError::Config { key: self.key(key), what: what.into() }
    }

    /// Whether `key` holds something other than `null`.
    pub fn has(&self, key: &str) -> bool {
        self.get(key).is_some()
    }

    /// Whether `key` is there and holds `null`.
    pub fn is_null(&self, key: &str) -> bool {
        self.map.get(key).is_some_and(Value::is_null)
    }

    /// A nested object, if there is one.
    ///
    /// # Errors
    /// `key` holds something else.
    pub fn optional_object(&self, key: &str) -> Result<Option<Fields<'a>>, ExecutorError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Object(map)) => Ok(Some(Fields { path: self.key(key), map })),
            Some(_) => Err(self.error(key, "must be an object")),
        }
    }

    /// A nested object that must be there.
    ///
    /// # Errors
    /// `key` is absent or holds something else.
    pub fn object(&self, key: &str) -> Result<Fields<'a>, ExecutorError> {
        self.optional_object(key)?.ok_or_else(|| self.error(key, "is missing"))
    }

    /// A size that may be absent.
    ///
    /// # Errors
    /// `key` holds no unsigned integer.
    pub fn optional_size(&self, key: &str) -> Result<Option<usize>, ExecutorError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        let number = value.as_u64().and_then(|n| usize::try_from(n).ok());
        number.map(Some).ok_or_else(|| self.error(key, "must be an integer >= 0"))
    }

    /// A size of at least 1, `default` if absent.
    ///
    /// # Errors
    /// `key` holds something else.
    pub fn size(&self, key: &str, default: usize) -> Result<usize, ExecutorError> {
        match self.optional_size(key)?.unwrap_or(default) {
            0 => Err(self.error(key, "must be an integer >= 1")),
            size => Ok(size),
        }
    }

    /// A token id, `default` if absent.
    ///
    /// # Errors
    /// `key` holds something else.
    pub fn token(&self, key: &str, default: u32) -> Result<u32, ExecutorError> {
        let Some(id) = self.optional_size(key)? else { return Ok(default) };
        u32::try_from(id).map_err(|_| self.error(key, "must be a token id"))
    }

    /// A number, `default` if absent.
    ///
    /// # Errors
    /// `key` holds something else.
    pub fn number(&self, key: &str, default: f64) -> Result<f64, ExecutorError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_f64().filter(|n| n.is_finite()).ok_or_else(|| self.error(key, "must be a number"))
    }

    /// A switch, `default` if absent.
    ///
    /// # Errors
    /// `key` holds something else.
    pub fn flag(&self, key: &str, default: bool) -> Result<bool, ExecutorError> {
        let Some(value) = self.get(key) else { return Ok(default) };
        value.as_bool().ok_or_else(|| self.error(key, "must be true or false"))
    }

    /// A text, if there is one.
    ///
    /// # Errors
    /// `key` holds something else.
    pub fn text(&self, key: &str) -> Result<Option<&'a str>, ExecutorError> {
        let Some(value) = self.get(key) else { return Ok(None) };
        value.as_str().map(Some).ok_or_else(|| self.error(key, "must be a text"))
    }

    /// A list of texts, empty if absent.
    ///
    /// # Errors
    /// `key` holds something else.
    pub fn texts(&self, key: &str) -> Result<Vec<String>, ExecutorError> {
        let Some(value) = self.get(key) else { return Ok(Vec::new()) };
        let items = value.as_array().and_then(|list| list.iter().map(|v| v.as_str().map(String::from)).collect());
        items.ok_or_else(|| self.error(key, "must be a list of texts"))
    }

    /// A list of sizes, `default` if absent.
    ///
    /// # Errors
    /// `key` holds something else.
    pub fn sizes(&self, key: &str, default: &[usize]) -> Result<Vec<usize>, ExecutorError> {
        let Some(value) = self.get(key) else { return Ok(default.to_vec()) };
        let size = |v: &Value| v.as_u64().and_then(|n| usize::try_from(n).ok());
        let items = value.as_array().and_then(|list| list.iter().map(size).collect());
        items.ok_or_else(|| self.error(key, "must be a list of integers >= 0"))
    }

    /// Refuses any value but `only`: the model file computes that one alone.
    ///
    /// # Errors
    /// [`ExecutorError::Unsupported`] with the key and the value found.
    pub fn only_text(&self, key: &str, only: &str) -> Result<(), ExecutorError> {
        match self.text(key)? {
            Some(other) if other != only => {
                Err(ExecutorError::Unsupported(format!("`{}` = \"{other}\" (only \"{only}\")", self.key(key))))
            }
            _ => Ok(()),
        }
    }

    /// Refuses a switch that is on.
    ///
    /// # Errors
    /// [`ExecutorError::Unsupported`] with the key.
    pub fn must_be_off(&self, key: &str) -> Result<(), ExecutorError> {
        if self.flag(key, false)? {
            return Err(ExecutorError::Unsupported(format!("`{}` = true", self.key(key))));
        }
        Ok(())
    }
}
