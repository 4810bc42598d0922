//! What is measured: how many requests at once, how long, with which media; and the name of the result.

/// Media of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Media {
    /// Random token ids alone.
    None,
    /// One image.
    Image {
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
    },
    /// One clip of frames that are decoded already, two a second.
    Clip {
        /// Frames.
        frames: u32,
        /// Pixels in a row.
        width: u32,
        /// Rows.
        height: u32,
    },
}

/// One case: `requests` submitted at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Case {
    /// Requests submitted at once.
    pub requests: usize,
    /// Prompt tokens; counts for text only.
    pub input: usize,
    /// Tokens to generate, past end-of-text tokens.
    pub output: u32,
    /// Media of each request.
    pub media: Media,
}

impl Case {
    /// A case of random token ids.
    pub const fn text(requests: usize, input: usize, output: u32) -> Self {
        Self { requests, input, output, media: Media::None }
    }

    /// Name of the result: `n32_in512_out256`, `prefill_16x4096`, `img_640x360_n64_out64`, `video_8f_640x360_n32_out64`.
    pub fn key(&self) -> String {
        let Self { requests, input, output, media } = self;
        match media {
            Media::None if *output == 1 => format!("prefill_{requests}x{input}"),
            Media::None => format!("n{requests}_in{input}_out{output}"),
            Media::Image { width, height } => format!("img_{width}x{height}_n{requests}_out{output}"),
            Media::Clip { frames, width, height } => {
                format!("video_{frames}f_{width}x{height}_n{requests}_out{output}")
            }
        }
    }

    /// Whether the result is a rate of prompt tokens, images or clips, of which the better of two runs counts.
    pub fn best_of_two(&self) -> bool {
        self.media != Media::None || self.output == 1
    }

    /// The same kind of request, few and short: what runs before a measurement.
    pub fn warm_up(&self) -> Self {
        Self { requests: self.requests.min(8), output: self.output.min(4), ..*self }
    }

    /// The cases of the vLLM table; those with media only for a model that sees.
    pub fn vllm_suite(vision: bool) -> Vec<Self> {
        let mut cases = vec![
            Self::text(1, 128, 256),
            Self::text(8, 128, 256),
            Self::text(32, 512, 256),
            Self::text(128, 512, 256),
            Self::text(256, 512, 256),
            Self::text(512, 1024, 128),
            Self::text(16, 4096, 1),
        ];
        if vision {
            let image =
                |width, height| Self { requests: 64, input: 0, output: 64, media: Media::Image { width, height } };
            let media = Media::Clip { frames: 8, width: 640, height: 360 };
            cases.extend([image(640, 360), image(1280, 720), Self { requests: 32, input: 0, output: 64, media }]);
        }
        cases
    }
}

/// Reads `WxH`.
///
/// # Errors
/// A sentence that says the form.
pub fn image_size(text: &str) -> Result<Media, String> {
    match sides(text).as_deref() {
        Some(&[width, height]) => Ok(Media::Image { width, height }),
        _ => Err("must be WIDTHxHEIGHT, such as 640x360".into()),
    }
}

/// Reads `FRAMESxWxH`.
///
/// # Errors
/// A sentence that says the form.
pub fn clip_size(text: &str) -> Result<Media, String> {
    match sides(text).as_deref() {
        Some(&[frames, width, height]) => Ok(Media::Clip { frames, width, height }),
        _ => Err("must be FRAMESxWIDTHxHEIGHT, such as 8x640x360".into()),
    }
}

fn sides(text: &str) -> Option<Vec<u32>> {
    text.split('x').map(|side| side.parse().ok().filter(|side| *side > 0)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_those_of_the_baselines() {
        let keys: Vec<String> = Case::vllm_suite(true).iter().map(Case::key).collect();
        let expected = [
            "n1_in128_out256",
            "n8_in128_out256",
            "n32_in512_out256",
            "n128_in512_out256",
            "n256_in512_out256",
            "n512_in1024_out128",
            "prefill_16x4096",
            "img_640x360_n64_out64",
            "img_1280x720_n64_out64",
            "video_8f_640x360_n32_out64",
        ];
        assert_eq!(keys, expected);
        assert_eq!(Case::vllm_suite(false).len(), 7);
    }

    #[test]
    fn sizes_say_their_form() {
        assert_eq!(image_size("640x360"), Ok(Media::Image { width: 640, height: 360 }));
        assert_eq!(clip_size("8x640x360"), Ok(Media::Clip { frames: 8, width: 640, height: 360 }));
        for bad in ["", "640", "640x", "0x4", "1x2x3x4", "axb"] {
            assert!(image_size(bad).is_err() && clip_size(bad).is_err(), "{bad}");
        }
    }
}
