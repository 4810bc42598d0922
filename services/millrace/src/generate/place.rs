//! Prepared media for token ids that hold the placeholders already: each item takes the next run of its kind.

use millrace_preprocess::{PreparedMedia, VisionTokens};

use crate::exit::usage;

/// Gives each item its place in `ids`. Stills take runs of the image placeholder, groups of video frames runs of the
/// video placeholder, each in order; every placeholder must be taken. Items come back in prompt order.
///
/// # Errors
/// A usage fault that says which run and which item do not fit.
pub fn place(ids: &[u32], media: Vec<PreparedMedia>, tokens: VisionTokens) -> anyhow::Result<Vec<PreparedMedia>> {
    // A still has one temporal slot, a group of frames has as many as the model's patches are deep.
    let (stills, groups): (Vec<_>, Vec<_>) = media.into_iter().partition(|item| item.shape[2] == 1);
    let (mut stills, mut groups) = (stills.into_iter(), groups.into_iter());
    let (mut placed, mut at) = (Vec::new(), 0);
    while let Some(&id) = ids.get(at) {
        let (kind, item) = match id {
            id if id == tokens.image => ("image", stills.next()),
            id if id == tokens.video => ("video", groups.next()),
            _ => {
                at += 1;
                continue;
            }
        };
        let run = ids[at..].iter().take_while(|next| **next == id).count();
        let Some(mut item) = item else {
            return Err(usage(format!("--ids: more {kind} placeholders than media, first at {at}")));
        };
        let wanted = usize::try_from(item.tokens)?;
        if run < wanted {
            return Err(usage(format!("--ids: {run} {kind} placeholders at {at}, the medium takes {wanted}")));
        }
        item.start = u32::try_from(at)?;
        placed.push(item);
        at += wanted;
    }
    let left = stills.len() + groups.len();
    if left > 0 {
        return Err(usage(format!("--ids: no placeholders for {left} of the images and groups of video frames")));
    }
    Ok(placed)
}

#[cfg(test)]
mod tests {
    use millrace_protocol::PageDtype;

    use super::*;

    const TOKENS: VisionTokens = VisionTokens { image: 8, video: 9, start: 6, end: 7 };

    fn item(tokens: u32, slots: u32) -> PreparedMedia {
        let shape = [tokens * 4, 3, slots, 16, 16];
        let patches = bytes::Bytes::new();
        PreparedMedia { start: 0, tokens, grid_h: 2, grid_w: 2, dtype: PageDtype::F32, shape, patches, normalise: None }
    }

    fn starts(ids: &[u32], media: Vec<PreparedMedia>) -> Result<Vec<(u32, u32)>, String> {
        let placed = place(ids, media, TOKENS).map_err(|error| error.to_string())?;
        Ok(placed.iter().map(|item| (item.start, item.tokens)).collect())
    }

    #[test]
    fn each_kind_fills_its_placeholders_in_order() {
        let ids = [1, 9, 9, 2, 8, 8, 8, 3, 9, 9];
        let media = vec![item(3, 1), item(2, 2), item(2, 2)];
        assert_eq!(starts(&ids, media).unwrap(), [(1, 2), (4, 3), (8, 2)]);
        assert_eq!(starts(&[8, 8], vec![item(1, 1), item(1, 1)]).unwrap(), [(0, 1), (1, 1)]);
        assert_eq!(starts(&[1, 2], Vec::new()).unwrap(), []);
    }

    #[test]
    fn every_mismatch_is_named() {
        assert!(starts(&[8], Vec::new()).unwrap_err().contains("more image placeholders"));
        assert!(
            starts(&[9, 1], vec![item(2, 2)]).unwrap_err().contains("1 video placeholders at 0, the medium takes 2")
        );
        assert!(starts(&[1], vec![item(2, 2)]).unwrap_err().contains("no placeholders for 1"));
        assert!(starts(&[8, 8, 8], vec![item(2, 1)]).unwrap_err().contains("first at 2"));
    }
}
