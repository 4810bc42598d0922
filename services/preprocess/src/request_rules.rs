//! What a job document must be before anything is fetched or decoded for it, and how many tokens it may generate.

use millrace_protocol::job::MAX_PRIORITY;
use millrace_protocol::{Content, ErrorCode, JobError, JobRequest, Part};

use crate::limits::PrepareLimits;
use crate::model_files::ModelFacts;

/// Priority of a job that names none: in the middle, so that both more and less urgent ones can say so.
pub(crate) const DEFAULT_PRIORITY: u8 = 5;
/// Most stop tokens in a job.
const MAX_STOP_TOKENS: usize = 64;

/// Refuses what can be refused from the document alone.
pub(crate) fn check(request: &JobRequest, facts: &ModelFacts, limits: &PrepareLimits) -> Result<(), JobError> {
    check_prompt(request, facts)?;
    if request.priority.is_some_and(|priority| priority > MAX_PRIORITY) {
        return Err(invalid(format!("priority must be 0 to {MAX_PRIORITY}")));
    }
    if request.max_tokens == Some(0) {
        return Err(invalid("max_tokens must be at least 1".into()));
    }
    if request.stop.len() > limits.stop_texts {
        return Err(invalid(format!(
            "stop has {} texts; at most {} are allowed",
            request.stop.len(),
            limits.stop_texts
        )));
    }
    if request.stop.iter().any(|text| text.is_empty() || text.len() > limits.stop_text_bytes) {
        return Err(invalid(format!("each text in stop must have 1 to {} bytes", limits.stop_text_bytes)));
    }
    if request.stop_token_ids.len() > MAX_STOP_TOKENS {
        return Err(invalid(format!("stop_token_ids has more than {MAX_STOP_TOKENS} entries")));
    }
    check_range("stop_token_ids", &request.stop_token_ids, facts.vocab)?;
    if request.tools.as_ref().is_some_and(|tools| !tools.is_array() && !tools.is_null()) {
        return Err(invalid("tools must be a list of tool descriptions".into()));
    }
    check_media(request, facts, limits)
}

fn check_prompt(request: &JobRequest, facts: &ModelFacts) -> Result<(), JobError> {
    let given = [request.messages.is_some(), request.prompt.is_some(), request.prompt_token_ids.is_some()];
    if given.iter().filter(|&&given| given).count() != 1 {
        let text = "a job needs exactly one of `messages`, `prompt` and `prompt_token_ids`";
        return Err(JobError::new(ErrorCode::NoPrompt, text));
    }
    let ids = request.prompt_token_ids.as_deref();
    let empty = request.messages.as_ref().is_some_and(Vec::is_empty)
        || request.prompt.as_deref() == Some("")
        || ids == Some(&[]);
    if empty {
        return Err(JobError::new(ErrorCode::NoPrompt, "the prompt is empty: give at least one message or token"));
    }
    check_range("prompt_token_ids", ids.unwrap_or_default(), facts.vocab)
}

fn check_range(field: &str, ids: &[u32], vocab: u32) -> Result<(), JobError> {
    match ids.iter().find(|&&id| id >= vocab) {
        None => Ok(()),
        Some(id) => {
            let text = format!("{field} holds {id}; the model has ids 0 to {}", vocab.saturating_sub(1));
            Err(JobError::new(ErrorCode::TokenRange, text))
        }
    }
}

/// The parts of a job that are media, in order.
pub(crate) fn media_parts(request: &JobRequest) -> impl Iterator<Item = &Part> {
    let messages = request.messages.as_deref().unwrap_or_default();
    let parts = messages.iter().flat_map(|message| match &message.content {
        Content::Parts(parts) => parts.as_slice(),
        Content::Text(_) | Content::Null(()) => &[],
    });
    parts.filter(|part| !matches!(part, Part::Text { .. }))
}

fn check_media(request: &JobRequest, facts: &ModelFacts, limits: &PrepareLimits) -> Result<(), JobError> {
    let count = media_parts(request).count();
    if count > 0 && facts.vision.is_none() {
        let text = "this model reads text only: remove the media, or use a model that sees";
        return Err(JobError::new(ErrorCode::MediaType, text));
    }
    if count > limits.media_items {
        let text = format!("the job has {count} images and videos; at most {} are allowed", limits.media_items);
        return Err(JobError::new(ErrorCode::TooLarge, text));
    }
    for part in media_parts(request) {
        let Part::Frames { frames, fps, indices } = part else { continue };
        if !(*fps > 0.0 && *fps <= 1000.0) {
            return Err(invalid("fps of a frame list must be above 0 and at most 1000".into()));
        }
        if indices.as_ref().is_some_and(|indices| indices.len() != frames.len() || !indices.is_sorted()) {
            return Err(invalid("indices of a frame list must have one number per frame, in ascending order".into()));
        }
        if frames.len() > limits.video_frames as usize {
            let text = format!("a frame list has {} frames; at most {} are allowed", frames.len(), limits.video_frames);
            return Err(JobError::new(ErrorCode::TooLarge, text));
        }
    }
    Ok(())
}

/// Tokens the job may generate behind a prompt of `prompt` tokens. What the job asks for must fit; defaults are cut.
pub(crate) fn max_tokens(
    request: &JobRequest,
    checkpoint: Option<u32>,
    prompt: usize,
    facts: &ModelFacts,
    limits: &PrepareLimits,
) -> Result<u32, JobError> {
    let context = limits.context_tokens.map_or(facts.max_tokens, |limit| limit.min(facts.max_tokens));
    let room = u32::try_from(prompt).ok().and_then(|prompt| context.checked_sub(prompt)).unwrap_or(0);
    let too_long = |asked: u32| {
        let text = format!(
            "the prompt has {prompt} tokens and max_tokens is {asked}, but the model holds {context} together: shorten the prompt, send fewer or smaller media, or lower max_tokens"
        );
        Err(JobError::new(ErrorCode::ContextLength, text))
    };
    match request.max_tokens {
        Some(asked) if asked > room => too_long(asked),
        Some(asked) => Ok(asked),
        None if room == 0 => too_long(1),
        None => Ok(checkpoint.unwrap_or(limits.default_max_tokens).min(room).max(1)),
    }
}

fn invalid(text: String) -> JobError {
    JobError::new(ErrorCode::InvalidValue, text)
}
