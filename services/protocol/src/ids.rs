//! Identifiers. Each is a newtype whose text is one NATS subject token, so that a subject can always be
//! built from it and parsed back (ADR-6: `A-Z a-z 0-9 - _`).

use std::fmt;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Longest identifier that is accepted, in bytes.
pub const MAX_TOKEN_BYTES: usize = 128;

/// Text that is not one subject token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a name: use 1 to {MAX_TOKEN_BYTES} characters out of A-Z a-z 0-9 - _")]
pub struct InvalidToken(pub String);

fn check(text: &str) -> Result<(), InvalidToken> {
    let fits = !text.is_empty() && text.len() <= MAX_TOKEN_BYTES;
    let allowed = |b: u8| b.is_ascii_alphanumeric() || b == b'-' || b == b'_';
    if fits && text.bytes().all(allowed) {
        return Ok(());
    }
    Err(InvalidToken(text.chars().take(MAX_TOKEN_BYTES).collect()))
}

macro_rules! token {
    ($(#[$doc:meta])* $name:ident) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(#[schemars(length(min = 1, max = 128), regex(pattern = r"^[A-Za-z0-9_-]+$"))] String);

        impl $name {
            /// Takes text that is one subject token.
            ///
            /// # Errors
            /// [`InvalidToken`] names the text that is not.
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidToken> {
                let text = text.into();
                check(&text)?;
                Ok(Self(text))
            }

            /// The identifier's text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidToken;
            fn try_from(text: String) -> Result<Self, Self::Error> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

token! {
    /// A job's identity, chosen by its publisher; also its idempotency key (`Nats-Msg-Id`).
    JobId
}
token! {
    /// The name under which a model is served (`[[models]] name` in pipeline.toml).
    ModelName
}
token! {
    /// One incarnation of one actor: unique per start, so a restarted peer is a different peer.
    ActorId
}

impl ModelName {
    /// A served name made of any text: characters outside the token alphabet become `_`.
    pub fn from_text(text: &str) -> Result<Self, InvalidToken> {
        let token: String = text.chars().map(|c| if c.is_ascii_alphanumeric() || c == '-' { c } else { '_' }).collect();
        Self::new(token)
    }
}

/// A sequence's place in one executor: an index into its slot table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct SlotId(pub u32);

/// One KV page: an index into the executor's block pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct BlockId(pub u32);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_is_exactly_the_subject_alphabet() {
        for good in ["a", "clip-42", "A_b-9", &"x".repeat(128)] {
            assert_eq!(JobId::new(good).map(|id| id.to_string()), Ok(good.to_string()));
        }
        for bad in ["", "a.b", "a b", "*", ">", "é", &"x".repeat(129)] {
            assert!(JobId::new(bad).is_err(), "{bad:?} was accepted");
        }
    }

    #[test]
    fn json_checks_what_new_checks() {
        assert!(serde_json::from_str::<JobId>("\"a.b\"").is_err());
        assert_eq!(serde_json::to_string(&JobId::new("a").unwrap()).unwrap(), "\"a\"");
    }

    #[test]
    fn model_names_are_made_from_repository_ids() {
        assert_eq!(ModelName::from_text("Qwen/Qwen3-4B.x").unwrap().as_str(), "Qwen_Qwen3-4B_x");
    }
}
