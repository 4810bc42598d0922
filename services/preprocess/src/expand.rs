//! Placeholders of media in a prompt: one token in the text, as many as the media has merged patches for the model.
//!
//! A video's placeholder is first replaced in the text, because its times are ordinary text that the tokenizer must
//! see in place; after tokenising, every placeholder stands for one image or one temporal group.

use millrace_protocol::{ErrorCode, JobError};

use crate::model_files::VisionTokens;

/// The texts of [`VisionTokens`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct VisionTexts {
    pub(crate) video: String,
    pub(crate) start: String,
    pub(crate) end: String,
}

/// Replaces each video placeholder by its groups: time, start, one placeholder, end. `times` has the groups of each
/// video. `nested` keeps the start and end that the template put around it (transformers 5.17).
pub(crate) fn expand_videos(
    text: &str,
    marks: &VisionTexts,
    times: &[&[String]],
    nested: bool,
) -> Result<String, JobError> {
    let pieces: Vec<&str> = text.split(marks.video.as_str()).collect();
    if pieces.len() - 1 != times.len() {
        return Err(mismatch("video", pieces.len() - 1, times.len()));
    }
    let mut out = String::with_capacity(text.len());
    let mut videos = times.iter();
    for (index, piece) in pieces.iter().enumerate() {
        let mut piece = *piece;
        let strip_before = |piece: &str| piece.ends_with(marks.start.as_str());
        let strip_after = |piece: &str| piece.starts_with(marks.end.as_str());
        if !nested && index > 0 && strip_before(pieces[index - 1]) && strip_after(piece) {
            piece = &piece[marks.end.len()..];
        }
        let Some(groups) = videos.next() else {
            out.push_str(piece);
            break;
        };
        if !nested && strip_before(piece) && pieces.get(index + 1).is_some_and(|next| strip_after(next)) {
            piece = &piece[..piece.len() - marks.start.len()];
        }
        out.push_str(piece);
        for time in groups.iter() {
            for part in [time, &marks.start, &marks.video, &marks.end] {
                out.push_str(part);
            }
        }
    }
    Ok(out)
}

/// A prompt in the model's form.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Expanded {
    /// Tokens with all placeholders.
    pub(crate) ids: Vec<u32>,
    /// First placeholder of each image.
    pub(crate) image_starts: Vec<u32>,
    /// First placeholder of each video group.
    pub(crate) group_starts: Vec<u32>,
}

/// Repeats each placeholder as often as its media has tokens; `images` and `groups` say how often. A prompt that holds
/// all of them already is taken as it is.
pub(crate) fn expand_ids(
    ids: &[u32],
    tokens: VisionTokens,
    images: &[u32],
    groups: &[u32],
) -> Result<Expanded, JobError> {
    let count = |token: u32| ids.iter().filter(|&&id| id == token).count();
    let mut kinds = [
        Kind::new("image", tokens.image, count(tokens.image), images)?,
        Kind::new("video", tokens.video, count(tokens.video), groups)?,
    ];
    let mut out = Vec::with_capacity(ids.len() + images.iter().chain(groups).sum::<u32>() as usize);
    let mut at = 0;
    while let Some(&id) = ids.get(at) {
        let kind = kinds.iter_mut().find(|kind| kind.token == id);
        let (Some(kind), start) = (kind, out.len() as u32) else {
            out.push(id);
            at += 1;
            continue;
        };
        let Some(&length) = kind.lengths.get(kind.starts.len()) else { return Err(kind.mismatch()) };
        kind.starts.push(start);
        out.extend(std::iter::repeat_n(id, length as usize));
        let read = if kind.complete { length as usize } else { 1 };
        let whole = ids.get(at..at + read).is_some_and(|run| run.iter().all(|&other| other == id));
        if !whole {
            return Err(kind.mismatch());
        }
        at += read;
    }
    let [images, groups] = kinds;
    Ok(Expanded { ids: out, image_starts: images.starts, group_starts: groups.starts })
}

struct Kind<'a> {
    name: &'static str,
    token: u32,
    found: usize,
    lengths: &'a [u32],
    /// Every placeholder is there already.
    complete: bool,
    starts: Vec<u32>,
}

impl<'a> Kind<'a> {
    fn new(name: &'static str, token: u32, found: usize, lengths: &'a [u32]) -> Result<Self, JobError> {
        let all = lengths.iter().map(|&length| length as usize).sum::<usize>();
        let kind = Self { name, token, found, lengths, complete: found != lengths.len(), starts: Vec::new() };
        if found != lengths.len() && found != all { Err(kind.mismatch()) } else { Ok(kind) }
    }

    fn mismatch(&self) -> JobError {
        mismatch(self.name, self.found, self.lengths.len())
    }
}

fn mismatch(kind: &str, found: usize, given: usize) -> JobError {
    let text = format!(
        "the prompt has {found} {kind} placeholders for {given} given: put media into message parts, and do not write placeholder tokens as text"
    );
    JobError::new(ErrorCode::MediaMismatch, text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TOKENS: VisionTokens = VisionTokens { image: 10, video: 11, start: 7, end: 8 };

    fn marks() -> VisionTexts {
        VisionTexts { video: "V".into(), start: "[".into(), end: "]".into() }
    }

    #[test]
    fn images_and_groups_are_repeated_in_order() {
        let got = expand_ids(&[1, 7, 10, 8, 2, 11, 11, 10], TOKENS, &[3, 1], &[2, 2]).unwrap();
        assert_eq!(got.ids, [1, 7, 10, 10, 10, 8, 2, 11, 11, 11, 11, 10]);
        assert_eq!((got.image_starts, got.group_starts), (vec![2, 11], vec![7, 9]));
    }

    #[test]
    fn a_complete_prompt_stays() {
        let ids = [1, 10, 10, 10, 8, 10, 10];
        let got = expand_ids(&ids, TOKENS, &[3, 2], &[]).unwrap();
        assert_eq!((got.ids.as_slice(), got.image_starts), (&ids[..], vec![1, 5]));
    }

    #[test]
    fn counts_must_agree() {
        for (ids, images, groups) in [
            (&[10u32][..], &[][..], &[][..]),
            (&[1], &[2], &[]),
            (&[10, 10, 1, 10, 10], &[3, 1], &[]),
            (&[11], &[2], &[]),
            (&[10, 10, 10], &[2], &[]),
        ] {
            assert_eq!(expand_ids(ids, TOKENS, images, groups).unwrap_err().code, ErrorCode::MediaMismatch, "{ids:?}");
        }
    }

    #[test]
    fn videos_nest_or_replace() {
        let (a, b) = (vec!["1s".to_string(), "2s".to_string()], vec!["3s".to_string()]);
        let videos = [a.as_slice(), b.as_slice()];
        let text = "x[V]y[V]z";
        assert_eq!(expand_videos(text, &marks(), &videos, true).unwrap(), "x[1s[V]2s[V]]y[3s[V]]z");
        assert_eq!(expand_videos(text, &marks(), &videos, false).unwrap(), "x1s[V]2s[V]y3s[V]z");
        assert_eq!(expand_videos("[V][V]", &marks(), &videos, false).unwrap(), "1s[V]2s[V]3s[V]");
        assert_eq!(expand_videos("V V]", &marks(), &videos, false).unwrap(), "1s[V]2s[V] 3s[V]]");
        assert_eq!(expand_videos("V", &marks(), &videos, true).unwrap_err().code, ErrorCode::MediaMismatch);
    }
}
